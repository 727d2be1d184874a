"""What stands between two layers that mix channels, applied while the second one reads its input.

A BatchNorm (by then a scale and a shift for every channel), a ReLU and a pool cost more time as passes over
memory than as arithmetic. Here they are done to a map on its way into the scratch memory that a convolution
copies its input to anyway. The packed layout is drawn in `cpu.py`.
"""

from collections import namedtuple

import numpy as np

from .compiling import formula, kernel
from .lanes import LANES, add, fetch, fill, larger, load, multiply, multiply_add, store

KEEP, MAX, MEAN, GLOBAL_MAX, GLOBAL_MEAN = range(5)  # how a Tail pools; MAX and MEAN take windows of 2x2

AHEAD = 128  # pixels: how far ahead of its use a map is asked for

# y = pool(relu(scale * z + shift)): scale and shift (C,), relu a bool, pool one of the numbers above
Tail = namedtuple("Tail", "scale shift relu pool")


class Pending(namedtuple("Pending", "z tail")):
    """What a Tail makes of z, left to the convolution that will read it."""

    @property
    def shape(self):
        """Shape (n_blocks, C, h, w, LANES) of what is made."""
        return (len(self.z), *pooled_shape(self.z.shape[1:4], self.tail.pool), LANES)


def no_tail(z):
    """Return the Tail that changes nothing in z (n_blocks, C, ..., LANES)."""
    return Tail(np.ones(z.shape[1], z.dtype), np.zeros(z.shape[1], z.dtype), False, KEEP)


def tailed(x):
    """Return (z, tail) of packed maps x, Pending or not."""
    return x if isinstance(x, Pending) else (x, no_tail(x))


def pooled_shape(shape, pool):
    """Return the shape (C, h, w) of what a Tail makes of maps (C, H, W)."""
    if pool in (MAX, MEAN):
        return shape[0], shape[1] // 2, shape[2] // 2
    return shape if pool == KEEP else (shape[0], 1, 1)


@kernel
def enter(z, b, k, n_channels, tail, k_tail, first, margin, padded, t):
    # channels k to k + n_channels - 1 of z[b] (C, H, W, LANES), which are k_tail and so on of the tail
    # -> padded[t], n_channels maps (n_rows, at least w + 2 * margin, LANES): from row `first` on what the
    # tail makes of them, (h, w, LANES), in zeros where there is none
    # (A view of one block would do, but each view is counted as a user of the array, all threads count in the
    # same place, and wait for each other there.)
    height, width = z.shape[2], z.shape[3]
    if tail.pool == MAX or tail.pool == MEAN:
        height, width = height // 2, width // 2
    elif tail.pool != KEEP:
        height, width = 1, 1
    zero = fill(padded.dtype.type(0))
    for c in range(n_channels):
        scale, shift = tail.scale[k_tail + c], fill(tail.shift[k_tail + c])
        for i in range(padded.shape[2]):
            for j in range(margin):
                store(padded, (t, c, i, j), zero)
            for j in range(width, padded.shape[3] - margin):
                store(padded, (t, c, i, margin + j), zero)
            if 0 <= first + i < height:
                tail_row(z, b, k + c, tail, scale, shift, first + i, width, padded, (t, c, i), margin)
            else:
                for j in range(width):
                    store(padded, (t, c, i, margin + j), zero)


@formula
def tail_row(z, b, c, tail, scale, shift, h, width, y, row, start):
    """Write row h of what the tail makes of channel c of block b of z to y[row], from `start` on."""
    # relu(max(a, b)) is max(relu(a), relu(b)), of which the former is less work.
    zero, relu = fill(z.dtype.type(0)), tail.relu
    n_rows = 1 if tail.pool == KEEP else 2 if tail.pool == MAX or tail.pool == MEAN else z.shape[2]
    for i in range(n_rows * h, n_rows * h + n_rows):  # behind the last row of a channel is the next one
        for w in range(z.shape[3]):
            fetch(z, (b, c, i + AHEAD // z.shape[3], w))
    if tail.pool == KEEP and relu:
        for w in range(width):
            store(y, (*row, start + w), larger(zero, multiply_add(scale, load(z, (b, c, h, w)), shift)))
    elif tail.pool == KEEP:
        for w in range(width):
            store(y, (*row, start + w), multiply_add(scale, load(z, (b, c, h, w)), shift))
    elif tail.pool == MAX:
        for w in range(width):
            v0 = multiply_add(scale, load(z, (b, c, 2 * h, 2 * w)), shift)
            v1 = multiply_add(scale, load(z, (b, c, 2 * h, 2 * w + 1)), shift)
            v2 = multiply_add(scale, load(z, (b, c, 2 * h + 1, 2 * w)), shift)
            v3 = multiply_add(scale, load(z, (b, c, 2 * h + 1, 2 * w + 1)), shift)
            value = larger(larger(v0, v1), larger(v2, v3))
            store(y, (*row, start + w), larger(zero, value) if relu else value)
    elif tail.pool == GLOBAL_MAX:
        v0 = v1 = v2 = v3 = multiply_add(scale, load(z, (b, c, 0, 0)), shift)
        last = z.shape[2] - 1
        for i in range(0, z.shape[2], 4):  # four rows at once, so that one need not wait for the other
            for j in range(z.shape[3]):
                v0 = larger(v0, multiply_add(scale, load(z, (b, c, i, j)), shift))
                v1 = larger(v1, multiply_add(scale, load(z, (b, c, min(i + 1, last), j)), shift))
                v2 = larger(v2, multiply_add(scale, load(z, (b, c, min(i + 2, last), j)), shift))
                v3 = larger(v3, multiply_add(scale, load(z, (b, c, min(i + 3, last), j)), shift))
        value = larger(larger(v0, v1), larger(v2, v3))
        store(y, (*row, start), larger(zero, value) if relu else value)
    else:
        size = 2 if tail.pool == MEAN else max(z.shape[2], z.shape[3])
        for w in range(width):
            total, n = zero, 0
            for i in range(size * h, min(size * h + size, z.shape[2])):
                for j in range(size * w, min(size * w + size, z.shape[3])):
                    value = multiply_add(scale, load(z, (b, c, i, j)), shift)
                    total = add(larger(zero, value) if relu else value, total)
                    n += 1
            store(y, (*row, start + w), multiply(1 / n, total))
