"""What treats every number by itself: sum, scale and shift of a channel, and ReLU.

Scale, shift and the ReLU behind them are not computed at once: they are `Deferred` until somebody asks for
the numbers, and a convolution does not.
"""

from numba import prange

from .. import formulas
from ..compiling import formula, parallel_kernel
from ..formulas import NO_POOL
from .fusion import Deferred, Epilogue, MaskedGradient, apply_epilogue
from .lanes import LANES
from .memory import empty

relu = formula(formulas.relu)
relu_gradient = formula(formulas.relu_gradient)


def add(a, b):
    """Return a + b: the sum of two branches, or of their gradients."""
    a, b = computed(a), computed(b)
    y = empty(a.shape, a.dtype)
    sum_blocks(a.reshape(len(a), -1), b.reshape(len(a), -1), y.reshape(len(a), -1))
    return y


@parallel_kernel
def sum_blocks(a, b, y):
    # a, b, y (n_blocks, n * LANES)
    for n in prange(a.shape[0]):
        for i in range(a.shape[1]):
            y[n, i] = a[n, i] + b[n, i]


def scale_shift(x, scale, shift):
    """Return scale * x + shift, channel by channel: Deferred."""
    return Deferred(computed(x), Epilogue(scale, shift, False, NO_POOL))


def computed(x):
    """Return the numbers that x stands for: x itself, or what is Deferred or masked in it, computed now."""
    if isinstance(x, MaskedGradient):
        return relu_backward(computed(x.y), x.dy)
    if not isinstance(x, Deferred):
        return x
    if x.numbers is None:  # nobody has asked before
        z, (scale, shift, relu, pool) = x
        if pool == NO_POOL:
            x.numbers = empty(z.shape, z.dtype)
            by_channel = *z.shape[:2], -1, LANES
            scale_shift_blocks(z.reshape(by_channel), scale, shift, relu, x.numbers.reshape(by_channel))
        else:
            x.numbers = apply_epilogue(z, x.epilogue)
    return x.numbers


@parallel_kernel
def scale_shift_blocks(x, scale, shift, with_relu, y):
    # x, y (n_blocks, C, n_pixels, LANES), scale and shift (C,)
    for b in prange(x.shape[0]):
        for c in range(x.shape[1]):
            for p in range(x.shape[2]):
                for lane in range(LANES):
                    value = scale[c] * x[b, c, p, lane] + shift[c]
                    y[b, c, p, lane] = relu(value) if with_relu else value


def relu_forward(x):
    """Return max(x, 0), Deferred if x is and has no pool yet."""
    if isinstance(x, Deferred) and x.epilogue.pool == NO_POOL:
        return Deferred(x.z, x.epilogue._replace(relu=True))
    x = computed(x)
    y = empty(x.shape, x.dtype)
    relu_blocks(x.reshape(len(x), -1), y.reshape(len(x), -1))
    return y


@parallel_kernel
def relu_blocks(x, y):
    # x, y (n_blocks, n * LANES)
    for b in prange(x.shape[0]):
        for i in range(x.shape[1]):
            y[b, i] = relu(x[b, i])


def relu_backward(y, dy):
    """Return dy where the output was positive, else 0; if that is Deferred, so is the gradient."""
    if isinstance(y, Deferred):
        return MaskedGradient(dy, y)
    dx = empty(y.shape, y.dtype)
    relu_gradient_blocks(y.reshape(len(y), -1), dy.reshape(len(y), -1), dx.reshape(len(y), -1))
    return dx


@parallel_kernel
def relu_gradient_blocks(y, dy, dx):
    # y, dy, dx (n_blocks, n * LANES)
    for b in prange(y.shape[0]):
        for i in range(y.shape[1]):
            dx[b, i] = relu_gradient(y[b, i], dy[b, i])
