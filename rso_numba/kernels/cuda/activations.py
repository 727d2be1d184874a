"""What treats every number by itself: sum, scale and shift of a channel, and ReLU."""

from numba import cuda

from .. import formulas
from .device import LANES, empty, launch, to_device
from .layout import by_channel

relu = cuda.jit(device=True)(formulas.relu)
relu_gradient = cuda.jit(device=True)(formulas.relu_gradient)


def add(a, b):
    """Return a + b: the sum of two branches, or of their gradients."""
    y = empty(a.shape, a.dtype)
    launch(add_kernel, a.size // LANES, a.reshape(a.size), b.reshape(b.size), y.reshape(y.size))
    return y


@cuda.jit
def add_kernel(a, b, y):
    # a, b, y (n * LANES,)
    lane, first = cuda.grid(2)
    for i in range(first * LANES + lane, a.size, cuda.gridsize(2)[1] * LANES):
        y[i] = a[i] + b[i]


def scale_shift(x, scale, shift):
    """Return scale * x + shift, channel by channel."""
    y = empty(x.shape, x.dtype)
    n_pixels = by_channel(x).shape[2]
    launch(scale_shift_kernel, len(x) * x.shape[1] * n_pixels,
           by_channel(x), to_device(scale), to_device(shift), by_channel(y))
    return y


@cuda.jit
def scale_shift_kernel(x, scale, shift, y):
    # x, y (n_blocks, C, n_pixels, LANES), scale and shift (C,)
    lane, first = cuda.grid(2)
    for task in range(first, x.shape[0] * x.shape[1] * x.shape[2], cuda.gridsize(2)[1]):
        p, rest = task % x.shape[2], task // x.shape[2]
        b, c = rest // x.shape[1], rest % x.shape[1]
        y[b, c, p, lane] = scale[c] * x[b, c, p, lane] + shift[c]


def relu_forward(x):
    """Return max(x, 0)."""
    y = empty(x.shape, x.dtype)
    launch(relu_kernel, x.size // LANES, x.reshape(x.size), y.reshape(y.size))
    return y


@cuda.jit
def relu_kernel(x, y):
    # x, y (n * LANES,)
    lane, first = cuda.grid(2)
    for i in range(first * LANES + lane, x.size, cuda.gridsize(2)[1] * LANES):
        y[i] = relu(x[i])


def relu_backward(y, dy):
    """Return dy where the output was positive, else 0."""
    dx = empty(y.shape, y.dtype)
    launch(relu_gradient_kernel, y.size // LANES, y.reshape(y.size), dy.reshape(y.size), dx.reshape(y.size))
    return dx


@cuda.jit
def relu_gradient_kernel(y, dy, dx):
    # y, dy, dx (n * LANES,)
    lane, first = cuda.grid(2)
    for i in range(first * LANES + lane, y.size, cuda.gridsize(2)[1] * LANES):
        dx[i] = relu_gradient(y[i], dy[i])
