"""The `cpu` backend: every kernel compiled by Numba, several threads, vector instructions.

Each function here has a twin of the same name and arguments in `plain.py`, in the same order; read that one
to see what is computed, this one to see how it is made fast.

Layout. Images are packed into blocks of LANES = 16, the index of the image innermost:

    images (N, C, H, W)                          x (n_blocks, C, H, W, LANES)

    image 0   a0 a1 a2 ...                                 lane 0  1  2      15
    image 1   b0 b1 b2 ...        pack         pixel 0  | a0 b0 c0 ... p0 |
    image 2   c0 c1 c2 ...       ------>       pixel 1  | a1 b1 c1 ... p1 |   block 0 = images 0 to 15
      ...                                      pixel 2  | a2 b2 c2 ... p2 |
    image 15  p0 p1 p2 ...                       ...
    image 16  q0 q1 q2 ...                     pixel 0  | q0 r0 s0 ...    |   block 1 = images 16 to 31

The same pixel of 16 images lies side by side and fills one vector register, so each inner loop runs over
images: it is as fast for a 7x7 map as for a 28x28 map, and it has no borders. Threads share the blocks.
The last block is filled up with zeros; what later layers make of those lanes is never read.

No result depends on the number of threads: a sum over images is made block by block, and the sums of the
blocks are added in their order.
"""

import numpy as np
from numba import prange

from . import formulas
from .compiling import formula, parallel_kernel
from .lanes import LANES
from .memory import empty, scratch, slabs
from .norms import add_rows, add_statistics, batchnorm_gradient_blocks, gradient_sum_blocks, statistics_blocks
from .pools import (
    avgpool_blocks,
    avgpool_gradient_blocks,
    globalmax_blocks,
    globalmax_gradient_blocks,
    globalmean_blocks,
    maxpool_blocks,
    maxpool_gradient_blocks,
)
from .products import (
    conv2d_blocks,
    conv2d_weight_blocks,
    dense_blocks,
    dense_weight_blocks,
    padded_scratch,
    side_by_side,
)
from .softmax import cross_entropy_blocks, cross_entropy_gradient_blocks, loss_blocks
from .tails import KEEP, MEAN, Pending, Tail, enter, no_tail, pooled_shape, tailed
from .winograd import pays, winograd_blocks, winograd_scratch

ZERO = np.float32(0)
STREAMED = 2**23  # bytes: larger outputs of a convolution are written past the caches

relu = formula(formulas.relu)
relu_gradient = formula(formulas.relu_gradient)


def by_channel(x):
    """View (n_blocks, C, ..., LANES) as (n_blocks, C, n_pixels, LANES)."""
    return x.reshape(*x.shape[:2], -1, LANES)


def as_maps(x):
    """View features (n_blocks, n, LANES) as n maps of one pixel; maps stay as they are."""
    return x if x.ndim == 5 else x.reshape(*x.shape[:2], 1, 1, LANES)


def as_row(x):
    """View the features of an image, (n_blocks, ..., LANES), as one row, (n_blocks, 1, 1, n, LANES)."""
    return x.reshape(len(x), 1, 1, -1, LANES)


def pack(images):
    """Return images (N, ...) as (n_blocks, ..., LANES), filled up with zeros."""
    rows = np.ascontiguousarray(images).reshape(len(images), -1)
    x = empty((-(-len(images) // LANES), *images.shape[1:], LANES), images.dtype)
    pack_blocks(rows, x.reshape(len(x), -1, LANES))
    return x


@parallel_kernel
def pack_blocks(rows, x):
    # rows (N, n), x (n_blocks, n, LANES)
    for b in prange(x.shape[0]):
        first, n = b * LANES, min(LANES, rows.shape[0] - b * LANES)
        for i in range(x.shape[1]):
            for lane in range(LANES):
                x[b, i, lane] = rows[first + lane, i] if lane < n else ZERO


def unpack(x, n_images):
    """Return the first n_images of (n_blocks, ..., LANES) as (n_images, ...)."""
    rows = np.empty((n_images, *x.shape[1:-1]), x.dtype)
    unpack_blocks(x.reshape(len(x), -1, LANES), rows.reshape(n_images, -1))
    return rows


@parallel_kernel
def unpack_blocks(x, rows):
    # x (n_blocks, n, LANES), rows (N, n)
    for b in prange(x.shape[0]):
        for lane in range(min(LANES, rows.shape[0] - b * LANES)):
            for i in range(x.shape[1]):
                rows[b * LANES + lane, i] = x[b, i, lane]


def scale_shift(x, scale, shift, with_relu=False, lazy=False):
    """Return scale * x + shift, channel by channel, or the ReLU of it.

    If `lazy` it is Pending: for a convolution that reads it as it is, or the mean of every 2x2 window.
    """
    if lazy:
        return Pending(x, Tail(scale, shift, with_relu, KEEP))
    y = empty(x.shape, x.dtype)
    scale_shift_blocks(by_channel(x), scale, shift, with_relu, by_channel(y))
    return y


@parallel_kernel
def scale_shift_blocks(x, scale, shift, with_relu, y):
    # x, y (n_blocks, C, n_pixels, LANES), scale and shift (C,)
    for b in prange(x.shape[0]):
        for c in range(x.shape[1]):
            for p in range(x.shape[2]):
                for lane in range(LANES):
                    value = scale[c] * x[b, c, p, lane] + shift[c]
                    y[b, c, p, lane] = relu(value) if with_relu else value


def conv2d_forward(x, weight, bias, exact_zeros=True):
    """Return the cross-correlation of x with 3x3 (padded by 1) or 1x1 filters, plus bias.

    With `exact_zeros` a sum of zeros is 0, for a ReLU that is next: its gradient is 0 there, 1 just above.
    """
    y, _ = conv2d_stage(*tailed(x), weight, bias, n_images=None, exact_zeros=exact_zeros)
    return y


def conv2d_stage(z, tail, weight, bias, n_images, start=None, stride=1, y=None, exact_zeros=False):
    """Return the convolution of what a `Tail` makes of z, and its statistics (None if n_images is None).

    With `start` it is added to that, instead of the bias. `stride` 2 is for filters that an average pool was
    merged into. It is written to y if that is given, which may be `start`. `exact_zeros`: see above.
    """
    shape = pooled_shape(z.shape[1:4], tail.pool)
    if y is None:
        y = empty((len(z), len(weight), shape[1] // stride, shape[2] // stride, LANES), z.dtype)
    statistics = np.empty((2, 0 if n_images is None else len(z), len(weight)))
    filters, started, streamed = side_by_side(weight, bias), start is not None, y.nbytes > STREAMED
    sums = slabs("sums", (len(filters.bias), 3, LANES), z.dtype)
    if not (started or stride > 1 or exact_zeros) and pays(weight, shape):
        room = winograd_scratch(shape, filters, z.dtype)
        winograd_blocks(z, tail, filters, streamed, n_images or 0, y, statistics, *room, sums)
    else:
        padded = padded_scratch(shape, weight.shape[2], stride, z.dtype)
        conv2d_blocks(z, tail, filters, start if started else y, started, stride, streamed, n_images or 0,
                      y, statistics, padded, sums)
    return y, None if n_images is None else mean_and_variance(statistics, n_images, y)


def apply_tail(z, tail):
    """Return what a `Tail` makes of z."""
    y = empty((len(z), *pooled_shape(z.shape[1:4], tail.pool), LANES), z.dtype)
    tail_blocks(z, tail, y)
    return y


@parallel_kernel
def tail_blocks(z, tail, y):
    # z (n_blocks, C, H, W, LANES), y (n_blocks, C, h, w, LANES)
    for b in prange(z.shape[0]):
        enter(z, b, 0, z.shape[1], tail, 0, 0, 0, y, b)


def conv2d_backward(x, weight, dy, wants_dx=True):
    """Return the gradients (dx, dweight, dbias) of conv2d_forward; dx is None if nobody wants it."""
    # dx is a convolution of dy with the filters turned by 180 degrees
    turned = np.ascontiguousarray(weight[:, :, ::-1, ::-1].swapaxes(0, 1))
    dx = conv2d_forward(dy, turned, np.zeros(len(turned), dy.dtype), False) if wants_dx else None
    dweight = scratch("dweight", (len(dy), *weight.shape), dy.dtype)
    dbias = np.empty((len(dy), len(weight)))
    padded = padded_scratch(x.shape[1:4], 3, 1, dy.dtype, strips=False)
    conv2d_weight_blocks(*tailed(x), dy, dweight, dbias, padded)
    return dx, add_blocks(dweight, dy.dtype), add_blocks(dbias, dy.dtype)


def add_blocks(parts, dtype):
    """Return the sum of the blocks' parts (n_blocks, ...), added in their order."""
    totals = np.zeros(parts[0].size)
    add_rows(parts.reshape(len(parts), -1), totals)
    return totals.astype(dtype).reshape(parts.shape[1:])


def dense_forward(x, weight, bias):
    """Return x @ weight.T + bias."""
    x = as_row(x)
    return dense_stage(x, no_tail(x), weight, bias)


def dense_stage(z, tail, weight, bias, start=None, y=None):
    """Return the dense layer's output for what a `Tail` makes of z: see `conv2d_stage`."""
    y = empty((len(z), len(weight), LANES), z.dtype) if y is None else y
    room = slabs("features", (*pooled_shape(z.shape[1:4], tail.pool), LANES), z.dtype)
    started = start is not None
    dense_blocks(z, tail, weight, bias, start if started else y, started, y, room)
    return y


def dense_backward(x, weight, dy):
    """Return the gradients (dx, dweight, dbias) of dense_forward."""
    dx = dense_forward(dy, np.ascontiguousarray(weight.T), np.zeros(weight.shape[1], x.dtype))
    dweight = scratch("dweight", (len(x), *weight.shape), x.dtype)
    rows = unpack(x, len(x) * LANES).reshape(len(x), LANES, -1)
    dense_weight_blocks(rows, dy, dweight)
    return dx, add_blocks(dweight, x.dtype), dy.sum(axis=(0, 2), dtype=np.float64).astype(x.dtype)


def batchnorm_statistics(x, n_images):
    """Return mean and (biased) variance of each channel over images and pixels."""
    return mean_and_variance(all_statistics(x, n_images), n_images, x)


def all_statistics(x, n_images):
    """Return sums and sums of squares around the mean, (2, n_blocks, C) float64."""
    statistics = np.empty((2, *x.shape[:2]))
    statistics_blocks(by_channel(x), n_images, statistics)
    return statistics


def mean_and_variance(statistics, n_images, x):
    """Return mean and variance of each channel of x from the statistics of its blocks."""
    moments = np.empty((2, statistics.shape[2]), x.dtype)
    add_statistics(statistics, n_images, x[0, 0].size // LANES, moments)
    return moments[0], moments[1]


def batchnorm_backward(x, dy, mean, variance, gamma, epsilon, n_images, relu=None):
    """Return the gradients (dx, dgamma, dbeta) of BatchNorm with the statistics of this batch.

    With `relu`, the scale and shift of the forward pass, dy is the gradient behind a ReLU.
    """
    dx = empty(x.shape, x.dtype)
    sums = np.empty((2, *x.shape[:2]))
    inverse_std = (1 / np.sqrt(variance + x.dtype.type(epsilon))).astype(x.dtype)
    scale, shift = (np.zeros_like(mean), np.ones_like(mean)) if relu is None else relu  # 0 x + 1 is positive
    moments = mean, inverse_std, scale, shift
    gradient_sum_blocks(by_channel(x), by_channel(dy), *moments, sums)
    dbeta, dgamma = sums.sum(axis=1)
    count = n_images * (x[0, 0].size // LANES)
    means = (dbeta / count).astype(x.dtype), (dgamma / count).astype(x.dtype)
    batchnorm_gradient_blocks(by_channel(x), by_channel(dy), *moments, gamma, *means, n_images,
                              by_channel(dx))
    return dx, dgamma.astype(x.dtype), dbeta.astype(x.dtype)


def relu_forward(x):
    """Return max(x, 0)."""
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
    """Return dy where the output was positive, else 0."""
    dx = empty(y.shape, y.dtype)
    relu_gradient_blocks(y.reshape(len(y), -1), dy.reshape(len(y), -1), dx.reshape(len(y), -1))
    return dx


@parallel_kernel
def relu_gradient_blocks(y, dy, dx):
    # y, dy, dx (n_blocks, n * LANES)
    for b in prange(y.shape[0]):
        for i in range(y.shape[1]):
            dx[b, i] = relu_gradient(y[b, i], dy[b, i])


def maxpool_forward(x):
    """Return the maximum of every 2x2 window; an odd last row or column is dropped."""
    y = empty((*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2, LANES), x.dtype)
    maxpool_blocks(x, y)
    return y


def maxpool_backward(x, y, dy):
    """Return dx: each window's gradient goes to its first maximum in row-major order."""
    dx = empty(x.shape, x.dtype)
    if x.shape[2] % 2 or x.shape[3] % 2:
        dx[:] = 0  # also a dropped last row or column
    maxpool_gradient_blocks(x, y, dy, dx)
    return dx


def avgpool_forward(x):
    """Return the mean of every 2x2 window; an odd last row or column is dropped."""
    if isinstance(x, Pending):
        return Pending(x.z, x.tail._replace(pool=MEAN))
    y = empty((*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2, LANES), x.dtype)
    avgpool_blocks(x, y)
    return y


def avgpool_backward(x, dy):
    """Return dx: each pixel of a window gets a quarter of its gradient."""
    dx = empty(x.shape, dy.dtype)
    avgpool_gradient_blocks(dy, dx)
    return dx


def globalmax_forward(x):
    """Return the maximum of every channel's map."""
    y = empty((*x.shape[:2], LANES), x.dtype)
    globalmax_blocks(by_channel(x), y)
    return y


def globalmax_backward(x, y, dy):
    """Return dx: the gradient goes to the first maximum in row-major order."""
    dx = empty(x.shape, x.dtype)
    rest = dy.copy()  # what is still to be handed out
    globalmax_gradient_blocks(by_channel(x), y, rest, by_channel(dx))
    return dx


def globalmean_forward(x):
    """Return the mean of every channel's map."""
    y = empty((*x.shape[:2], LANES), x.dtype)
    globalmean_blocks(by_channel(x), y)
    return y


def globalmean_backward(x, dy):
    """Return dx: every pixel gets the same share of the gradient."""
    dx = empty(x.shape, x.dtype)
    share = dy / dy.dtype.type(np.prod(x.shape[2:-1]))
    by_channel(dx)[:] = share[:, :, None]
    return dx


def flatten_forward(x):
    """Return (n_blocks, C, H, W, LANES) as (n_blocks, C * H * W, LANES)."""
    return x.reshape(len(x), -1, LANES)


def flatten_backward(x, dy):
    """Return dy in the shape of x."""
    return dy.reshape(x.shape)


def cross_entropy(logits, labels):
    """Return -log softmax(logits)[label] of every image."""
    losses = np.empty(len(labels), logits.dtype)
    cross_entropy_blocks(logits, labels, losses)
    return losses


def mean_loss(logits, labels):
    """Return the mean cross-entropy: summed block by block, then over the blocks, in float64."""
    sums = np.empty(len(logits))
    loss_blocks(logits, labels, sums)
    return float(sums.sum()) / len(labels)


def cross_entropy_backward(logits, labels):
    """Return the gradient of the mean cross-entropy: (softmax - one-hot) / N, 0 in lanes without image."""
    dlogits = empty(logits.shape, logits.dtype)
    cross_entropy_gradient_blocks(logits, labels, dlogits)
    return dlogits
