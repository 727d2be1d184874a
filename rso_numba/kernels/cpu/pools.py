"""The pooling layers."""

import numpy as np
from numba import prange

from .. import formulas
from ..compiling import formula, kernel, parallel_kernel
from ..formulas import MEAN, NO_POOL
from .activations import computed
from .fusion import Deferred
from .lanes import LANES, broadcast, load, store, where_equal
from .layout import by_channel
from .memory import empty

ZERO = np.float32(0)

maximum = formula(formulas.maximum)
mean_of_four = formula(formulas.mean_of_four)
quarter = formula(formulas.quarter)


def maxpool_forward(x):
    """Return the maximum of every 2x2 window; an odd last row or column is dropped."""
    x = computed(x)
    y = empty((*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2, LANES), x.dtype)
    maxpool_blocks(x, y)
    return y


@parallel_kernel
def maxpool_blocks(x, y):
    # x (n_blocks, C, H, W, LANES), y (n_blocks, C, H // 2, W // 2, LANES)
    for b in prange(x.shape[0]):
        for c in range(y.shape[1]):
            for h in range(y.shape[2]):
                for w in range(y.shape[3]):
                    for lane in range(LANES):
                        upper = maximum(x[b, c, 2 * h, 2 * w, lane], x[b, c, 2 * h, 2 * w + 1, lane])
                        lower = maximum(x[b, c, 2 * h + 1, 2 * w, lane], x[b, c, 2 * h + 1, 2 * w + 1, lane])
                        y[b, c, h, w, lane] = maximum(upper, lower)


def maxpool_backward(x, y, dy):
    """Return dx: each window's gradient goes to its first maximum in row-major order."""
    x, dy = computed(x), computed(dy)
    dx = empty(x.shape, x.dtype)
    if x.shape[2] % 2 or x.shape[3] % 2:
        dx[:] = 0  # also a dropped last row or column
    maxpool_gradient_blocks(x, y, dy, dx)
    return dx


@parallel_kernel
def maxpool_gradient_blocks(x, y, dy, dx):
    # x, dx (n_blocks, C, H, W, LANES), y, dy (n_blocks, C, H // 2, W // 2, LANES)
    for b in prange(x.shape[0]):
        maxpool_gradient_block(x[b], y[b], dy[b], dx[b])


@kernel
def maxpool_gradient_block(x, y, dy, dx):
    # x, dx (C, H, W, LANES), y, dy (C, H // 2, W // 2, LANES)
    for c in range(y.shape[0]):
        for h in range(y.shape[1]):
            for w in range(y.shape[2]):
                largest, rest, none = load(y, (c, h, w)), load(dy, (c, h, w)), broadcast(dx.dtype.type(0))
                for row in range(2 * h, 2 * h + 2):
                    for column in range(2 * w, 2 * w + 2):
                        value = load(x, (c, row, column))
                        store(dx, (c, row, column), where_equal(value, largest, rest, none))
                        rest = where_equal(value, largest, none, rest)


def avgpool_forward(x):
    """Return the mean of every 2x2 window; an odd last row or column is dropped."""
    if isinstance(x, Deferred) and x.epilogue.pool == NO_POOL:
        return Deferred(x.z, x.epilogue._replace(pool=MEAN))
    x = computed(x)
    y = empty((*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2, LANES), x.dtype)
    avgpool_blocks(x, y)
    return y


@parallel_kernel
def avgpool_blocks(x, y):
    # x (n_blocks, C, H, W, LANES), y (n_blocks, C, H // 2, W // 2, LANES)
    for b in prange(x.shape[0]):
        for c in range(y.shape[1]):
            for h in range(y.shape[2]):
                for w in range(y.shape[3]):
                    for lane in range(LANES):
                        y[b, c, h, w, lane] = mean_of_four(
                            x[b, c, 2 * h, 2 * w, lane], x[b, c, 2 * h, 2 * w + 1, lane],
                            x[b, c, 2 * h + 1, 2 * w, lane], x[b, c, 2 * h + 1, 2 * w + 1, lane],
                        )


def avgpool_backward(x, dy):
    """Return dx: each pixel of a window gets a quarter of its gradient."""
    dy = computed(dy)
    dx = empty(x.shape, dy.dtype)
    avgpool_gradient_blocks(dy, dx)
    return dx


@parallel_kernel
def avgpool_gradient_blocks(dy, dx):
    # dy (n_blocks, C, H // 2, W // 2, LANES), dx (n_blocks, C, H, W, LANES)
    for b in prange(dx.shape[0]):
        for c in range(dx.shape[1]):
            for h in range(dx.shape[2]):
                for w in range(dx.shape[3]):
                    inside = h // 2 < dy.shape[2] and w // 2 < dy.shape[3]
                    for lane in range(LANES):
                        dx[b, c, h, w, lane] = quarter(dy[b, c, h // 2, w // 2, lane]) if inside else ZERO


def globalmax_forward(x):
    """Return the maximum of every channel's map."""
    x = computed(x)
    y = empty((*x.shape[:2], LANES), x.dtype)
    globalmax_blocks(by_channel(x), y)
    return y


@parallel_kernel
def globalmax_blocks(x, y):
    # x (n_blocks, C, n_pixels, LANES), y (n_blocks, C, LANES)
    for b in prange(x.shape[0]):
        for c in range(x.shape[1]):
            for lane in range(LANES):
                y[b, c, lane] = x[b, c, 0, lane]
            for p in range(1, x.shape[2]):
                for lane in range(LANES):
                    y[b, c, lane] = maximum(y[b, c, lane], x[b, c, p, lane])


def globalmax_backward(x, y, dy):
    """Return dx: the gradient goes to the first maximum in row-major order."""
    x, dy = computed(x), computed(dy)
    dx = empty(x.shape, x.dtype)
    rest = dy.copy()  # what is still to be handed out
    globalmax_gradient_blocks(by_channel(x), y, rest, by_channel(dx))
    return dx


@parallel_kernel
def globalmax_gradient_blocks(x, y, rest, dx):
    # x, dx (n_blocks, C, n_pixels, LANES), y, rest (n_blocks, C, LANES)
    for b in prange(x.shape[0]):
        for c in range(x.shape[1]):
            for p in range(x.shape[2]):
                for lane in range(LANES):
                    is_maximum = x[b, c, p, lane] == y[b, c, lane]
                    dx[b, c, p, lane] = rest[b, c, lane] if is_maximum else ZERO
                    rest[b, c, lane] = ZERO if is_maximum else rest[b, c, lane]


def globalmean_forward(x):
    """Return the mean of every channel's map."""
    x = computed(x)
    y = empty((*x.shape[:2], LANES), x.dtype)
    globalmean_blocks(by_channel(x), y)
    return y


@parallel_kernel
def globalmean_blocks(x, y):
    # x (n_blocks, C, n_pixels, LANES), y (n_blocks, C, LANES)
    for b in prange(x.shape[0]):
        for c in range(x.shape[1]):
            for lane in range(LANES):
                y[b, c, lane] = ZERO
            for p in range(x.shape[2]):
                for lane in range(LANES):
                    y[b, c, lane] += x[b, c, p, lane]
            for lane in range(LANES):
                y[b, c, lane] /= np.float32(x.shape[2])


def globalmean_backward(x, dy):
    """Return dx: every pixel gets the same share of the gradient."""
    dy = computed(dy)
    dx = empty(x.shape, dy.dtype)
    share = dy / dy.dtype.type(np.prod(x.shape[2:-1]))
    by_channel(dx)[:] = share[:, :, None]
    return dx
