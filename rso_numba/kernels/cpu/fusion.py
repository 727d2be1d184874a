"""What stands between two linear layers, computed while the second one reads its input.

A BatchNorm (by then a scale and a shift for every channel), a ReLU and a pool cost more time as passes over
memory than as arithmetic. Together they are the *epilogue* of the layer before them. It is computed while the
next convolution copies its input into its workspace, which it does anyway.
"""

import functools
from collections import namedtuple

import numpy as np
from numba import prange

from ..compiling import formula, kernel, parallel_kernel
from ..formulas import GLOBAL_MAX, MAX, MEAN, NO_POOL, QUARTER, pooled_shape
from .lanes import LANES, add, broadcast, load, maximum, multiply, multiply_add, prefetch, store
from .memory import empty

AHEAD = 128  # pixels: how far ahead of its use a map is asked for

# y = pool(relu(scale * z + shift)): scale and shift (C,), relu a bool, pool a number of `formulas.py`
Epilogue = namedtuple("Epilogue", "scale shift relu pool")


class Deferred(namedtuple("Deferred", "z epilogue")):
    """What an Epilogue makes of z, left to the convolution that will read it."""

    numbers = None  # what is made, as soon as it was asked for: see `activations.computed`

    @property
    def shape(self):
        """Shape (n_blocks, C, h, w, LANES) of what is made."""
        return (len(self.z), *pooled_shape(self.z.shape[1:4], self.epilogue.pool), LANES)


# the gradient of a ReLU with respect to its input: dy where y, a Deferred, is positive, else 0
MaskedGradient = namedtuple("MaskedGradient", "dy y")


@functools.cache
def unscaled(n_channels, dtype):
    """Return scale and shift (C,) that change nothing, the same at each call: nobody may write to them."""
    return np.ones(n_channels, dtype), np.zeros(n_channels, dtype)


def no_epilogue(z):
    """Return the Epilogue that changes nothing in z (n_blocks, C, ..., LANES)."""
    return Epilogue(*unscaled(z.shape[1], z.dtype), False, NO_POOL)


def of_channels(epilogue, channels):
    """Return the Epilogue of some channels only, a slice or an array of their numbers."""
    return epilogue._replace(scale=epilogue.scale[channels], shift=epilogue.shift[channels])


def deferred(x):
    """Return packed maps x as Deferred, with an epilogue that changes nothing if they are not yet."""
    return x if isinstance(x, Deferred) else Deferred(x, no_epilogue(x))


def apply_epilogue(z, epilogue):
    """Return what an `Epilogue` makes of z."""
    y = empty((len(z), *pooled_shape(z.shape[1:4], epilogue.pool), LANES), z.dtype)
    epilogue_blocks(z, epilogue, y)
    return y


@parallel_kernel
def epilogue_blocks(z, epilogue, y):
    # z (n_blocks, C, H, W, LANES), y (n_blocks, C, h, w, LANES)
    for b in prange(z.shape[0]):
        load_padded(z, b, 0, z.shape[1], epilogue, 0, 0, 0, y, b, False, False)


@kernel
def load_padded(z, b, k, n_channels, epilogue, k_epilogue, first, margin, padded, t, has_border,
                with_means):
    # channels k to k + n_channels - 1 of z[b] (C, H, W, LANES), in the epilogue from k_epilogue on
    # -> padded[t], n_channels maps (n_rows, at least w + 2 * margin, LANES): from row `first` on what the
    # epilogue makes of them, (h, w, LANES), and zeros around it, if it does not have them yet
    # (z and b, not a view of z[b]: see `conv2d_blocks` for what a view costs.)
    height, width, relu, pool = z.shape[2], z.shape[3], epilogue.relu, epilogue.pool
    if pool in (MAX, MEAN):
        height, width = height // 2, width // 2
    elif pool != NO_POOL:
        height, width = 1, 1
    rows_each, ahead = z.shape[2] // height, AHEAD // z.shape[3]
    zero = broadcast(padded.dtype.type(0))
    for c in range(n_channels):
        scale, shift = epilogue.scale[k_epilogue + c], broadcast(epilogue.shift[k_epilogue + c])
        for i in range(padded.shape[2]):
            h = first + i
            if 0 <= h < height:
                for row in range(rows_each * h + ahead, rows_each * (h + 1) + ahead):
                    for w in range(z.shape[3]):  # behind the last row of a channel is the next one
                        prefetch(z, (b, k + c, row, w))
                epilogue_row(z, b, k + c, relu, pool, scale, shift, h, width, padded, (t, c, i), margin)
            if not has_border:
                begin = margin + (width if 0 <= h < height else 0)
                for j in range(margin):
                    store(padded, (t, c, i, j), zero)
                for j in range(begin, padded.shape[3]):
                    store(padded, (t, c, i, j), zero)
        if with_means:
            square_means(padded, t, c)


@kernel
def square_means(padded, t, c):
    # channel c of padded[t] (C_in, rows, columns, LANES), in place: each pixel becomes the mean of the square
    # of 2x2 of which it is the upper left one
    for i in range(padded.shape[2] - 1):
        left = add(load(padded, (t, c, i, 0)), load(padded, (t, c, i + 1, 0)))
        for j in range(padded.shape[3] - 1):
            right = add(load(padded, (t, c, i, j + 1)), load(padded, (t, c, i + 1, j + 1)))
            store(padded, (t, c, i, j), multiply(QUARTER, add(left, right)))
            left = right


@formula
def epilogue_row(z, b, c, relu, pool, scale, shift, h, width, y, row, start):
    """Write row h of what an epilogue makes of channel c of block b of z to y[row], from `start` on."""
    # relu(max(a, b)) is max(relu(a), relu(b)), of which the former is less work.
    zero = broadcast(z.dtype.type(0))
    if pool == NO_POOL and relu:
        for w in range(width):
            store(y, (*row, start + w), maximum(zero, multiply_add(scale, load(z, (b, c, h, w)), shift)))
    elif pool == NO_POOL:
        for w in range(width):
            store(y, (*row, start + w), multiply_add(scale, load(z, (b, c, h, w)), shift))
    elif pool == MAX:
        for w in range(width):
            v0 = multiply_add(scale, load(z, (b, c, 2 * h, 2 * w)), shift)
            v1 = multiply_add(scale, load(z, (b, c, 2 * h, 2 * w + 1)), shift)
            v2 = multiply_add(scale, load(z, (b, c, 2 * h + 1, 2 * w)), shift)
            v3 = multiply_add(scale, load(z, (b, c, 2 * h + 1, 2 * w + 1)), shift)
            value = maximum(maximum(v0, v1), maximum(v2, v3))
            store(y, (*row, start + w), maximum(zero, value) if relu else value)
    elif pool == GLOBAL_MAX:
        v0 = v1 = v2 = v3 = multiply_add(scale, load(z, (b, c, 0, 0)), shift)
        last = z.shape[2] - 1
        for i in range(0, z.shape[2], 4):  # four rows at once, so that one need not wait for the other
            for j in range(z.shape[3]):
                v0 = maximum(v0, multiply_add(scale, load(z, (b, c, i, j)), shift))
                v1 = maximum(v1, multiply_add(scale, load(z, (b, c, min(i + 1, last), j)), shift))
                v2 = maximum(v2, multiply_add(scale, load(z, (b, c, min(i + 2, last), j)), shift))
                v3 = maximum(v3, multiply_add(scale, load(z, (b, c, min(i + 3, last), j)), shift))
        value = maximum(maximum(v0, v1), maximum(v2, v3))
        store(y, (*row, start), maximum(zero, value) if relu else value)
    else:
        size = 2 if pool == MEAN else max(z.shape[2], z.shape[3])
        for w in range(width):
            total, n = zero, 0
            for i in range(size * h, min(size * h + size, z.shape[2])):
                for j in range(size * w, min(size * w + size, z.shape[3])):
                    value = multiply_add(scale, load(z, (b, c, i, j)), shift)
                    total = add(maximum(zero, value) if relu else value, total)
                    n += 1
            store(y, (*row, start + w), multiply(1 / n, total))
