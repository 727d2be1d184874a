"""The `cuda` backend: every kernel compiled by Numba for an NVIDIA GPU, where a thread is an image.

Each function here has a twin of the same name and arguments in `plain.py`, in the same order; read that one
to see what is computed. The formulas are the ones that `cpu.py` compiles for the CPU.

Layout. As on the CPU, images are packed into blocks with the index of the image innermost, here LANES = 32:

    images (N, C, H, W)                          x (n_blocks, C, H, W, LANES), on the GPU

    image 0   a0 a1 a2 ...                                 lane 0  1  2      31
    image 1   b0 b1 b2 ...        pack         pixel 0  | a0 b0 c0 ... f0 |
      ...                        ------>       pixel 1  | a1 b1 c1 ... f1 |   block 0 = images 0 to 31
    image 31  f0 f1 f2 ...                       ...
    image 32  g0 g1 g2 ...                     pixel 0  | g0 h0 ...       |   block 1 = images 32 to 63

The 32 threads of a warp do the same at the same time, each for its own image: they read 128 bytes side by
side, and none of them waits for another at the border of a map. The last block is filled up with zeros; what
later layers make of those lanes is never read.

Activations stay on the GPU. Weights come as NumPy arrays and are copied there at each call; losses,
statistics and gradients of weights come back as NumPy arrays. Functions named `..._kernel` run on the GPU:
they take arrays that are there, allocate nothing and wait for nothing. No result depends on which thread is
first: a sum over images is made block by block in a fixed order, and the sums of the blocks are added in
float64.
"""

import numpy as np
from numba import cuda

from . import formulas
from .cuda_device import LANES, THREADS, block_sum, empty, launch, launch_blocks, to_device, to_host
from .cuda_norms import batchnorm_gradient_kernel, product_kernel, statistics_kernel
from .cuda_pools import (
    avgpool_gradient_kernel,
    avgpool_kernel,
    globalmax_gradient_kernel,
    globalmax_kernel,
    globalmean_gradient_kernel,
    globalmean_kernel,
    maxpool_gradient_kernel,
    maxpool_kernel,
)
from .cuda_products import (
    CHANNELS,
    CONV2D_KERNELS,
    CONV2D_WEIGHT_KERNELS,
    PIXELS,
    dense_kernel,
    dense_weight_kernel,
)

ZERO, ONE = np.float32(0), np.float32(1)

relu = cuda.jit(device=True)(formulas.relu)
relu_gradient = cuda.jit(device=True)(formulas.relu_gradient)
maximum = cuda.jit(device=True)(formulas.maximum)
exp_difference = cuda.jit(device=True)(formulas.exp_difference)
image_loss = cuda.jit(device=True)(formulas.cross_entropy)
image_loss_gradient = cuda.jit(device=True)(formulas.cross_entropy_gradient)


def by_channel(x):
    """View (n_blocks, C, ..., LANES) as (n_blocks, C, n_pixels, LANES)."""
    return x.reshape(*x.shape[:2], int(np.prod(x.shape[2:-1])), LANES)


def by_row(x):
    """View (n_blocks, ..., LANES) as (n_blocks, n, LANES)."""
    return x.reshape(len(x), int(np.prod(x.shape[1:-1])), LANES)


def pack(images):
    """Return NumPy images (N, ...) as (n_blocks, ..., LANES) on the GPU, filled up with zeros."""
    rows = to_device(np.reshape(images, (len(images), -1)))
    x = empty((-(-len(images) // LANES), *images.shape[1:], LANES), images.dtype)
    launch(pack_kernel, len(x) * rows.shape[1], rows, by_row(x))
    return x


@cuda.jit
def pack_kernel(rows, x):
    # rows (N, n), x (n_blocks, n, LANES)
    lane, first = cuda.grid(2)
    for task in range(first, x.shape[0] * x.shape[1], cuda.gridsize(2)[1]):
        b, i = task // x.shape[1], task % x.shape[1]
        image = b * LANES + lane
        x[b, i, lane] = rows[image, i] if image < rows.shape[0] else ZERO


def unpack(x, n_images):
    """Return the first n_images of (n_blocks, ..., LANES) as a NumPy array (n_images, ...)."""
    rows = empty((n_images, int(np.prod(x.shape[1:-1]))), x.dtype)
    launch(unpack_kernel, len(x) * rows.shape[1], by_row(x), rows)
    return to_host(rows).reshape(n_images, *x.shape[1:-1])


@cuda.jit
def unpack_kernel(x, rows):
    # x (n_blocks, n, LANES), rows (N, n)
    lane, first = cuda.grid(2)
    for task in range(first, x.shape[0] * x.shape[1], cuda.gridsize(2)[1]):
        b, i = task // x.shape[1], task % x.shape[1]
        if b * LANES + lane < rows.shape[0]:
            rows[b * LANES + lane, i] = x[b, i, lane]


def scale_shift(x, scale, shift, with_relu=False, lazy=False):
    """Return scale * x + shift, channel by channel, or the ReLU of it; at once, even if it may be `lazy`."""
    y = empty(x.shape, x.dtype)
    n_pixels = by_channel(x).shape[2]
    launch(scale_shift_kernel, len(x) * x.shape[1] * n_pixels,
           by_channel(x), to_device(scale), to_device(shift), by_channel(y))
    return relu_forward(y) if with_relu else y


@cuda.jit
def scale_shift_kernel(x, scale, shift, y):
    # x, y (n_blocks, C, n_pixels, LANES), scale and shift (C,)
    lane, first = cuda.grid(2)
    for task in range(first, x.shape[0] * x.shape[1] * x.shape[2], cuda.gridsize(2)[1]):
        p, rest = task % x.shape[2], task // x.shape[2]
        b, c = rest // x.shape[1], rest % x.shape[1]
        y[b, c, p, lane] = scale[c] * x[b, c, p, lane] + shift[c]


def conv2d_forward(x, weight, bias, exact_zeros=True, stride=1):
    """Return the cross-correlation of x with 3x3 (padded by 1) or 1x1 filters, plus bias.

    With stride 2, weight is a 3x3 or 1x1 filter merged with the 2x2 average pool that follows it: 4x4 or 2x2.
    Here a sum of zeros is 0 in any case; see `cpu.py`.
    """
    n_blocks, _, height, width, _ = x.shape
    y = empty((n_blocks, len(weight), height // stride, width // stride, LANES), x.dtype)
    tiles = -(-len(weight) // CHANNELS) * y.shape[2] * -(-y.shape[3] // PIXELS)
    launch(CONV2D_KERNELS[weight.shape[2], stride], n_blocks * tiles,
           by_line(x), to_device(weight), to_device(bias), by_line(y), (0, 0, 0, x.shape[1]), by_line(y))
    return y


def by_line(x):
    """View (n_blocks, C, H, W, LANES) as (n_blocks, C, H, W * LANES)."""
    return x.reshape(*x.shape[:3], x.shape[3] * LANES)


def conv2d_backward(x, weight, dy, wants_dx=True):
    """Return the gradients (dx, dweight, dbias) of conv2d_forward; dx is None unless somebody wants it."""
    dx = None
    if wants_dx:  # a convolution of dy with the filters turned by 180 degrees
        turned = weight[:, :, ::-1, ::-1].swapaxes(0, 1)
        dx = conv2d_forward(dy, turned, np.zeros(len(turned), x.dtype))
    dweight = empty((len(x), *weight.shape), x.dtype)
    launch_blocks(CONV2D_WEIGHT_KERNELS[weight.shape[2]], len(x) * weight.shape[0] * weight.shape[1],
                  x, dy, dweight)
    return dx, add_blocks(to_host(dweight), x.dtype), channel_totals(dy)


def add_blocks(parts, dtype):
    """Return the sum of the blocks' parts (n_blocks, ...), added in their order."""
    return parts.sum(axis=0, dtype=np.float64).astype(dtype)


def dense_forward(x, weight, bias):
    """Return x @ weight.T + bias."""
    y = empty((len(x), len(weight), LANES), x.dtype)
    launch_blocks(dense_kernel, len(x) * len(weight),
                  x, to_device(weight), to_device(bias), y, (0, 0, 0, x.shape[1]), y)
    return y


def dense_backward(x, weight, dy):
    """Return the gradients (dx, dweight, dbias) of dense_forward."""
    dx = dense_forward(dy, weight.T, np.zeros(weight.shape[1], x.dtype))
    dweight = empty((len(x), *weight.shape), x.dtype)
    launch_blocks(dense_weight_kernel, -(-dweight.size // THREADS), x, dy, dweight)
    return dx, add_blocks(to_host(dweight), x.dtype), channel_totals(dy)


def channel_totals(x):
    """Return the sums (C,) of each channel over all lanes and pixels."""
    sums, _ = block_statistics(by_channel(x), len(x) * LANES)
    return add_blocks(sums, x.dtype)


def batchnorm_statistics(x, n_images):
    """Return mean and (biased) variance of each channel over images and pixels."""
    x = by_channel(x)
    sums, squares = block_statistics(x, n_images)
    counts = np.minimum(LANES, n_images - LANES * np.arange(len(x)))[:, None] * x.shape[2]
    mean = sums.sum(axis=0) / counts.sum()
    # squares are taken around the mean of their block; moving them to the common mean cancels nothing
    squares += counts * (sums / counts - mean) ** 2
    return mean.astype(x.dtype), (squares.sum(axis=0) / counts.sum()).astype(x.dtype)


def block_statistics(x, n_images):
    """Return sums and sums of squares around the mean, of every block and channel, (n_blocks, C) float64."""
    sums = empty((2, *x.shape[:2]), np.float64)
    launch_blocks(statistics_kernel, len(x) * x.shape[1], x, n_images, sums)
    return to_host(sums)


def batchnorm_backward(x, dy, mean, variance, gamma, epsilon, n_images, relu=None):
    """Return the gradients (dx, dgamma, dbeta) of BatchNorm with the statistics of this batch.

    With `relu`, the scale and shift of the forward pass, dy is the gradient behind a ReLU.
    """
    dy = dy if relu is None else relu_backward(scale_shift(x, *relu), dy)
    dx, sums = empty(x.shape, x.dtype), empty((2, *x.shape[:2]), np.float64)
    inverse_std = (1 / np.sqrt(variance + x.dtype.type(epsilon))).astype(x.dtype)
    both, parameters = (by_channel(x), by_channel(dy)), (to_device(mean), to_device(inverse_std))
    launch_blocks(product_kernel, len(x) * x.shape[1], *both, *parameters, n_images, sums)
    dbeta, dgamma = to_host(sums).sum(axis=1)
    count = n_images * np.prod(x.shape[2:-1])
    means = to_device((dbeta / count).astype(x.dtype)), to_device((dgamma / count).astype(x.dtype))
    launch(batchnorm_gradient_kernel, len(x) * x.shape[1] * both[0].shape[2],
           *both, *parameters, to_device(gamma), *means, n_images, by_channel(dx))
    return dx, dgamma.astype(x.dtype), dbeta.astype(x.dtype)


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


def maxpool_forward(x):
    """Return the maximum of every 2x2 window; an odd last row or column is dropped."""
    y = empty((*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2, LANES), x.dtype)
    launch(maxpool_kernel, y.size // LANES, x, y)
    return y


def maxpool_backward(x, y, dy):
    """Return dx: each window's gradient goes to its first maximum in row-major order."""
    dx = empty(x.shape, x.dtype)
    launch(maxpool_gradient_kernel, y.size // LANES, x, y, dy, dx)
    return dx


def avgpool_forward(x):
    """Return the mean of every 2x2 window; an odd last row or column is dropped."""
    y = empty((*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2, LANES), x.dtype)
    launch(avgpool_kernel, y.size // LANES, x, y)
    return y


def avgpool_backward(x, dy):
    """Return dx: each pixel of a window gets a quarter of its gradient."""
    dx = empty(x.shape, x.dtype)
    launch(avgpool_gradient_kernel, dx.size // LANES, dy, dx)
    return dx


def globalmax_forward(x):
    """Return the maximum of every channel's map."""
    y = empty((*x.shape[:2], LANES), x.dtype)
    launch(globalmax_kernel, y.size // LANES, by_channel(x), y)
    return y


def globalmax_backward(x, y, dy):
    """Return dx: the gradient goes to the first maximum in row-major order."""
    dx = empty(x.shape, x.dtype)
    launch(globalmax_gradient_kernel, y.size // LANES, by_channel(x), y, dy, by_channel(dx))
    return dx


def globalmean_forward(x):
    """Return the mean of every channel's map."""
    y = empty((*x.shape[:2], LANES), x.dtype)
    launch(globalmean_kernel, y.size // LANES, by_channel(x), y)
    return y


def globalmean_backward(x, dy):
    """Return dx: every pixel gets the same share of the gradient."""
    dx = empty(x.shape, x.dtype)
    launch(globalmean_gradient_kernel, dx.size // LANES, dy, by_channel(dx))
    return dx


def flatten_forward(x):
    """Return (n_blocks, C, H, W, LANES) as (n_blocks, C * H * W, LANES)."""
    return by_row(x)


def flatten_backward(x, dy):
    """Return dy in the shape of x."""
    return dy.reshape(x.shape)


def cross_entropy(logits, labels):
    """Return -log softmax(logits)[label] of every image."""
    losses = empty(len(labels), logits.dtype)
    launch(cross_entropy_kernel, len(logits), logits, to_device(labels), losses)
    return to_host(losses)


@cuda.jit
def cross_entropy_kernel(logits, labels, losses):
    # logits (n_blocks, n_classes, LANES), labels (N,), losses (N,)
    lane, first = cuda.grid(2)
    for b in range(first, logits.shape[0], cuda.gridsize(2)[1]):
        n = b * LANES + lane
        if n < labels.size:
            largest, total = softmax_sums(logits, b, lane)
            losses[n] = image_loss(logits[b, labels[n], lane], largest, total)


@cuda.jit(device=True)
def softmax_sums(logits, b, lane):
    # logits (n_blocks, n_classes, LANES) -> an image's largest, and the sum of its exp(logit - largest)
    largest = logits[b, 0, lane]
    for k in range(1, logits.shape[1]):
        largest = maximum(largest, logits[b, k, lane])
    total = ZERO
    for k in range(logits.shape[1]):
        total += exp_difference(logits[b, k, lane], largest)
    return largest, total


def mean_loss(logits, labels):
    """Return the mean cross-entropy: summed block by block, then over the blocks, in float64."""
    sums = empty(len(logits), np.float64)
    launch_blocks(loss_sums_kernel, len(logits), logits, to_device(labels), sums)
    return float(to_host(sums).sum()) / len(labels)


@cuda.jit
def loss_sums_kernel(logits, labels, sums):
    # logits (n_blocks, n_classes, LANES), labels (N,), sums (n_blocks,) float64
    # A CUDA block adds up LANES images; only its first row has something to do. There may be several times as
    # many logits as labels: candidates for the same images, one after the other.
    lane, row = cuda.threadIdx.x, cuda.threadIdx.y
    n_blocks = (labels.size + LANES - 1) // LANES
    parts = cuda.shared.array(THREADS, np.float64)
    for b in range(cuda.blockIdx.y, logits.shape[0], cuda.gridDim.y):
        n = b % n_blocks * LANES + lane
        loss = np.float64(ZERO)
        if row == 0 and n < labels.size:
            largest, total = softmax_sums(logits, b, lane)
            loss = np.float64(image_loss(logits[b, labels[n], lane], largest, total))
        total_loss = block_sum(parts, loss)
        if row == 0 and lane == 0:
            sums[b] = total_loss


def cross_entropy_backward(logits, labels):
    """Return the gradient of the mean cross-entropy: (softmax - one-hot) / N, 0 in lanes without image."""
    dlogits = empty(logits.shape, logits.dtype)
    launch(cross_entropy_gradient_kernel, len(logits), logits, to_device(labels), dlogits)
    return dlogits


@cuda.jit
def cross_entropy_gradient_kernel(logits, labels, dlogits):
    # logits, dlogits (n_blocks, n_classes, LANES), labels (N,)
    lane, first = cuda.grid(2)
    for b in range(first, logits.shape[0], cuda.gridsize(2)[1]):
        n = b * LANES + lane
        largest, total = softmax_sums(logits, b, lane)
        for k in range(logits.shape[1]):
            gradient = ZERO
            if n < labels.size:
                target = ONE if k == labels[n] else ZERO
                gradient = image_loss_gradient(
                    logits[b, k, lane], largest, total, target, np.float32(labels.size))
            dlogits[b, k, lane] = gradient
