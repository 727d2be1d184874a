"""Scalar maths of the kernels, written once.

Plain Python functions of single numbers: `cpu/` compiles them for the CPU and `cuda/` for the GPU. Where the
CPU computes with vectors it needs some of them in another form: those kernels name the formula they compute,
and `tests/test_formulas.py` compares both.

Formulas follow the type of their arguments. A literal such as `0.25` is a float64 to Numba and would turn a
float32 formula into a float64 one; constants are therefore float32, exact, and widen next to a float64.
"""

import math

import numpy as np

ZERO = np.float32(0)
QUARTER = np.float32(0.25)

# how a pool between two linear layers is told to a kernel; MAX and MEAN take windows of 2x2
NO_POOL, MAX, MEAN, GLOBAL_MAX, GLOBAL_MEAN = range(5)


def relu(x):
    """Return max(x, 0). NaN stays NaN, so that a spoilt network shows in its loss."""
    return ZERO if x <= ZERO else x


def relu_gradient(y, dy):
    """Return dy where the output y = relu(x) is positive, else 0."""
    return dy if y > ZERO else ZERO


def maximum(a, b):
    """Return the larger number, the first if they are equal, NaN if one is NaN."""
    return a if a >= b or a != a else b


def mean_of_four(a, b, c, d):
    """Return the mean of the pixels of a 2x2 window."""
    return ((a + b) + (c + d)) * QUARTER


def quarter(dy):
    """Return the share of each pixel of a 2x2 window in the gradient of their mean."""
    return dy * QUARTER


def batchnorm_gradient(x, dy, mean, inverse_std, gamma, mean_dy, mean_dy_normalized):
    """Return dx of y = gamma * (x - mean) * inverse_std + beta, where mean and inverse_std depend on x too.

    `mean_dy` and `mean_dy_normalized` are the channel's means of dy and of dy * (x - mean) * inverse_std.
    (The CPU has this with vectors, behind the gradient of a ReLU: `batchnorm_gradient_blocks`.)
    """
    normalized = (x - mean) * inverse_std
    return gamma * inverse_std * (dy - mean_dy - normalized * mean_dy_normalized)


def exp_difference(logit, largest):
    """Return exp(logit - largest), a softmax probability up to a factor.

    `largest` is the largest logit of the image: subtracting it keeps exp from overflowing.
    """
    return math.exp(logit - largest)


def cross_entropy(logit, largest, total):
    """Return -log softmax of the label's logit; `total` is the sum of exp_difference over the classes."""
    return math.log(total) - (logit - largest)


def changed_cross_entropy(own, others, largest, labelled):
    """Return cross_entropy of an image one of whose logits is `own` now; `labelled` is that of the label.

    `others` is the sum of exp_difference over the other classes, `largest` their largest logit.
    (The CPU has this for many images at once, with one logarithm for LANES of them: `cpu/last_layer.py`.)
    """
    top = own if own >= largest or own != own else largest
    return math.log(others * math.exp(largest - top) + math.exp(own - top)) + top - labelled


def smallest_of_three(keep, plus, minus):
    """Return 0, 1 or 2: which loss is the smallest, the first on a tie. NaN and infinity lose."""
    best, least = 0, keep if abs(keep) < math.inf else math.inf
    if plus < least and plus > -math.inf:
        best, least = 1, plus
    if minus < least and minus > -math.inf:
        best = 2
    return best


def has_vertex(keep, plus, minus):
    """Return whether the parabola through the losses of w, w + Delta, w - Delta has a lowest point."""
    return 0 < plus + minus - 2 * keep < math.inf


def vertex(keep, plus, minus):
    """Return where that point is: the step from w to it as a multiple of Delta, damped and at most 2.

    With the slope g = (plus - minus) / 2 and the curvature h = plus + minus - 2 keep, in units of Delta,
    Newton's step is -g / h. Half of it is taken: the loss is that of a mini-batch.
    """
    step = -(plus - minus) / (4 * (plus + minus - 2 * keep))
    return min(max(step, -2), 2)


def parabola(keep, plus, minus, step):
    """Return how much that parabola is higher at a step, a multiple of Delta, than at w."""
    return (plus - minus) / 2 * step + (plus + minus - 2 * keep) / 2 * step**2


def cross_entropy_gradient(logit, largest, total, target, n_images):
    """Return d(mean cross-entropy)/d(logit); target is 1 for the label's logit and 0 for the others."""
    return (math.exp(logit - largest) / total - target) / n_images


def pooled_shape(shape, pool):
    """Return the shape (C, h, w) of what an Epilogue makes of maps (C, H, W)."""
    if pool in (MAX, MEAN):
        return shape[0], shape[1] // 2, shape[2] // 2
    return shape if pool == NO_POOL else (shape[0], 1, 1)
