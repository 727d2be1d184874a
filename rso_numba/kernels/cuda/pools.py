"""The pooling layers.

A task is an output of LANES images, or an input where gradients go back to the inputs.
"""

import numpy as np
from numba import cuda

from .. import formulas
from .device import LANES, empty, launch
from .layout import by_channel

ZERO = np.float32(0)

maximum = cuda.jit(device=True)(formulas.maximum)
mean_of_four = cuda.jit(device=True)(formulas.mean_of_four)
quarter = cuda.jit(device=True)(formulas.quarter)


def maxpool_forward(x):
    """Return the maximum of every 2x2 window; an odd last row or column is dropped."""
    y = empty((*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2, LANES), x.dtype)
    launch(maxpool_kernel, y.size // LANES, x, y)
    return y


@cuda.jit
def maxpool_kernel(x, y):
    # x (n_blocks, C, H, W, LANES), y (n_blocks, C, H // 2, W // 2, LANES)
    lane, first = cuda.grid(2)
    for task in range(first, y.shape[0] * y.shape[1] * y.shape[2] * y.shape[3], cuda.gridsize(2)[1]):
        b, c, h, w = map_position(task, y.shape)
        upper = maximum(x[b, c, 2 * h, 2 * w, lane], x[b, c, 2 * h, 2 * w + 1, lane])
        lower = maximum(x[b, c, 2 * h + 1, 2 * w, lane], x[b, c, 2 * h + 1, 2 * w + 1, lane])
        y[b, c, h, w, lane] = maximum(upper, lower)


@cuda.jit(device=True)
def map_position(task, shape):
    """Return (b, c, h, w), the place of pixel number `task` in an array of that shape."""
    # shape (n_blocks, C, H, W, LANES)
    w, rest = task % shape[3], task // shape[3]
    h, rest = rest % shape[2], rest // shape[2]
    return rest // shape[1], rest % shape[1], h, w


def maxpool_backward(x, y, dy):
    """Return dx: each window's gradient goes to its first maximum in row-major order."""
    dx = empty(x.shape, x.dtype)
    launch(maxpool_gradient_kernel, y.size // LANES, x, y, dy, dx)
    return dx


@cuda.jit
def maxpool_gradient_kernel(x, y, dy, dx):
    # x, dx (n_blocks, C, H, W, LANES), y, dy (n_blocks, C, H // 2, W // 2, LANES)
    # A task is a window, or what is left of one where a last row or column is dropped: those get zeros.
    lane, first = cuda.grid(2)
    height, width = (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2
    for task in range(first, x.shape[0] * x.shape[1] * height * width, cuda.gridsize(2)[1]):
        b, c, h, w = map_position(task, (x.shape[0], x.shape[1], height, width))
        whole = h < y.shape[2] and w < y.shape[3]
        largest = y[b, c, h, w, lane] if whole else ZERO
        rest = dy[b, c, h, w, lane] if whole else ZERO
        for row in range(2 * h, min(2 * h + 2, x.shape[2])):
            for column in range(2 * w, min(2 * w + 2, x.shape[3])):
                is_maximum = whole and x[b, c, row, column, lane] == largest
                dx[b, c, row, column, lane] = rest if is_maximum else ZERO
                rest = ZERO if is_maximum else rest


def avgpool_forward(x):
    """Return the mean of every 2x2 window; an odd last row or column is dropped."""
    y = empty((*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2, LANES), x.dtype)
    launch(avgpool_kernel, y.size // LANES, x, y)
    return y


@cuda.jit
def avgpool_kernel(x, y):
    # x (n_blocks, C, H, W, LANES), y (n_blocks, C, H // 2, W // 2, LANES)
    lane, first = cuda.grid(2)
    for task in range(first, y.shape[0] * y.shape[1] * y.shape[2] * y.shape[3], cuda.gridsize(2)[1]):
        b, c, h, w = map_position(task, y.shape)
        y[b, c, h, w, lane] = mean_of_four(
            x[b, c, 2 * h, 2 * w, lane], x[b, c, 2 * h, 2 * w + 1, lane],
            x[b, c, 2 * h + 1, 2 * w, lane], x[b, c, 2 * h + 1, 2 * w + 1, lane],
        )


def avgpool_backward(x, dy):
    """Return dx: each pixel of a window gets a quarter of its gradient."""
    dx = empty(x.shape, x.dtype)
    launch(avgpool_gradient_kernel, dx.size // LANES, dy, dx)
    return dx


@cuda.jit
def avgpool_gradient_kernel(dy, dx):
    # dy (n_blocks, C, H // 2, W // 2, LANES), dx (n_blocks, C, H, W, LANES)
    lane, first = cuda.grid(2)
    for task in range(first, dx.shape[0] * dx.shape[1] * dx.shape[2] * dx.shape[3], cuda.gridsize(2)[1]):
        b, c, h, w = map_position(task, dx.shape)
        inside = h // 2 < dy.shape[2] and w // 2 < dy.shape[3]
        dx[b, c, h, w, lane] = quarter(dy[b, c, h // 2, w // 2, lane]) if inside else ZERO


def globalmax_forward(x):
    """Return the maximum of every channel's map."""
    y = empty((*x.shape[:2], LANES), x.dtype)
    launch(globalmax_kernel, y.size // LANES, by_channel(x), y)
    return y


@cuda.jit
def globalmax_kernel(x, y):
    # x (n_blocks, C, n_pixels, LANES), y (n_blocks, C, LANES)
    lane, first = cuda.grid(2)
    for task in range(first, x.shape[0] * x.shape[1], cuda.gridsize(2)[1]):
        b, c = task // x.shape[1], task % x.shape[1]
        largest = x[b, c, 0, lane]
        for p in range(1, x.shape[2]):
            largest = maximum(largest, x[b, c, p, lane])
        y[b, c, lane] = largest


def globalmax_backward(x, y, dy):
    """Return dx: the gradient goes to the first maximum in row-major order."""
    dx = empty(x.shape, x.dtype)
    launch(globalmax_gradient_kernel, y.size // LANES, by_channel(x), y, dy, by_channel(dx))
    return dx


@cuda.jit
def globalmax_gradient_kernel(x, y, dy, dx):
    # x, dx (n_blocks, C, n_pixels, LANES), y, dy (n_blocks, C, LANES)
    lane, first = cuda.grid(2)
    for task in range(first, x.shape[0] * x.shape[1], cuda.gridsize(2)[1]):
        b, c = task // x.shape[1], task % x.shape[1]
        rest = dy[b, c, lane]  # what is still to be handed out
        for p in range(x.shape[2]):
            is_maximum = x[b, c, p, lane] == y[b, c, lane]
            dx[b, c, p, lane] = rest if is_maximum else ZERO
            rest = ZERO if is_maximum else rest


def globalmean_forward(x):
    """Return the mean of every channel's map."""
    y = empty((*x.shape[:2], LANES), x.dtype)
    launch(globalmean_kernel, y.size // LANES, by_channel(x), y)
    return y


@cuda.jit
def globalmean_kernel(x, y):
    # x (n_blocks, C, n_pixels, LANES), y (n_blocks, C, LANES)
    lane, first = cuda.grid(2)
    for task in range(first, x.shape[0] * x.shape[1], cuda.gridsize(2)[1]):
        b, c = task // x.shape[1], task % x.shape[1]
        total = ZERO
        for p in range(x.shape[2]):
            total += x[b, c, p, lane]
        y[b, c, lane] = total / np.float32(x.shape[2])


def globalmean_backward(x, dy):
    """Return dx: every pixel gets the same share of the gradient."""
    dx = empty(x.shape, x.dtype)
    launch(globalmean_gradient_kernel, dx.size // LANES, dy, by_channel(dx))
    return dx


@cuda.jit
def globalmean_gradient_kernel(dy, dx):
    # dy (n_blocks, C, LANES), dx (n_blocks, C, n_pixels, LANES)
    lane, first = cuda.grid(2)
    for task in range(first, dx.shape[0] * dx.shape[1] * dx.shape[2], cuda.gridsize(2)[1]):
        p, rest = task % dx.shape[2], task // dx.shape[2]
        b, c = rest // dx.shape[1], rest % dx.shape[1]
        dx[b, c, p, lane] = dy[b, c, lane] / np.float32(dx.shape[2])
