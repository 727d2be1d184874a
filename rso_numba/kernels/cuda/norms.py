"""BatchNorm: statistics of a batch, and its gradient.

A CUDA block sums up a channel of LANES images: each thread its share of the pixels of one image, in the type
of x, then all threads together in float64. Lanes that hold no image are left out.
"""

import numpy as np
from numba import cuda

from .. import formulas
from .device import LANES, ROWS, THREADS, block_sum, empty, launch, launch_blocks, to_device, to_host
from .layout import add_blocks, by_channel

ZERO = np.float32(0)

batchnorm_gradient = cuda.jit(device=True)(formulas.batchnorm_gradient)


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


@cuda.jit
def statistics_kernel(x, n_images, sums):
    # x (n_blocks, C, n_pixels, LANES), sums (2, n_blocks, C) float64
    # sums: of x, and of the squares of x - mean, where mean is that of this channel of these LANES images
    # There may be several times as many blocks as n_images need: candidates, one after the other.
    lane, row = cuda.threadIdx.x, cuda.threadIdx.y
    n_blocks = (n_images + LANES - 1) // LANES
    parts = cuda.shared.array(THREADS, np.float64)
    for task in range(cuda.blockIdx.y, x.shape[0] * x.shape[1], cuda.gridDim.y):
        b, c = task // x.shape[1], task % x.shape[1]
        n_lanes = min(LANES, n_images - b % n_blocks * LANES)
        last = x.shape[2] if lane < n_lanes else 0
        part = ZERO
        for p in range(row, last, ROWS):
            part += x[b, c, p, lane]
        total = block_sum(parts, np.float64(part))
        mean = x.dtype.type(total / (n_lanes * x.shape[2]))
        part = ZERO
        for p in range(row, last, ROWS):
            deviation = x[b, c, p, lane] - mean
            part += deviation * deviation
        square = block_sum(parts, np.float64(part))
        if lane == 0 and row == 0:
            sums[0, b, c] = total
            sums[1, b, c] = square


def channel_totals(x):
    """Return the sums (C,) of each channel over all lanes and pixels."""
    sums, _ = block_statistics(by_channel(x), len(x) * LANES)
    return add_blocks(sums, x.dtype)


def batchnorm_backward(x, dy, mean, variance, gamma, epsilon, n_images):
    """Return the gradients (dx, dgamma, dbeta) of BatchNorm with the statistics of this batch."""
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


@cuda.jit
def product_kernel(x, dy, mean, inverse_std, n_images, sums):
    # x, dy (n_blocks, C, n_pixels, LANES), mean and inverse_std (C,)
    # sums (2, n_blocks, C) float64: of dy, and of dy * normalized x
    lane, row = cuda.threadIdx.x, cuda.threadIdx.y
    parts = cuda.shared.array(THREADS, np.float64)
    for task in range(cuda.blockIdx.y, x.shape[0] * x.shape[1], cuda.gridDim.y):
        b, c = task // x.shape[1], task % x.shape[1]
        last = x.shape[2] if b * LANES + lane < n_images else 0
        part_dy = part_product = ZERO
        for p in range(row, last, ROWS):
            part_dy += dy[b, c, p, lane]
            part_product += (x[b, c, p, lane] - mean[c]) * inverse_std[c] * dy[b, c, p, lane]
        total_dy = block_sum(parts, np.float64(part_dy))
        total_product = block_sum(parts, np.float64(part_product))
        if lane == 0 and row == 0:
            sums[0, b, c] = total_dy
            sums[1, b, c] = total_product


@cuda.jit
def batchnorm_gradient_kernel(x, dy, mean, inverse_std, gamma, mean_dy, mean_dy_normalized, n_images, dx):
    # x, dy, dx (n_blocks, C, n_pixels, LANES), the others (C,)
    lane, first = cuda.grid(2)
    for task in range(first, x.shape[0] * x.shape[1] * x.shape[2], cuda.gridsize(2)[1]):
        p, rest = task % x.shape[2], task // x.shape[2]
        b, c = rest // x.shape[1], rest % x.shape[1]
        gradient = batchnorm_gradient(
            x[b, c, p, lane], dy[b, c, p, lane],
            mean[c], inverse_std[c], gamma[c], mean_dy[c], mean_dy_normalized[c],
        )
        dx[b, c, p, lane] = gradient if b * LANES + lane < n_images else ZERO
