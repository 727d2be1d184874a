"""The convolution: nearly all the time of a network is spent here.

A thread computes a *tile* of outputs of its image, CHANNELS x PIXELS sums in registers: then every pixel and
every weight that it reads serves several multiplications. All lanes of a warp need the same weight at the
same time, which is read once for all of them. The loops over a tile have constant bounds: the compiler
unrolls them, and only then can the sums live in registers.

The forward kernels of convolution and dense layer can add up a part of the input channels only, on top of
what others contributed before. `part` = (n_start, x_first, first, n) says which: n channels, from x_first on
in x and from `first` on in the weights; the sums begin at start[b % n_start], or at the bias if n_start is 0.
y may have several times as many blocks as x: then x holds that many candidates for these channels, and they
follow each other.
"""

import numpy as np
from numba import cuda

from .device import LANES, ROWS, THREADS, block_sum, empty, launch, launch_blocks, to_device, to_host
from .layout import add_blocks, by_line
from .norms import channel_totals

ZERO = np.float32(0)

CHANNELS, PIXELS = 4, 8  # of a tile: output channels, and neighbours in a row


def conv2d_forward(x, weight, bias):
    """Return the cross-correlation of x with 3x3 (padded by 1) or 1x1 filters, plus bias."""
    return conv2d_strided(x, weight, bias, stride=1)


def conv2d_strided(x, weight, bias, stride):
    """Return the same, or with stride 2 the correlation with 4x4 or 2x2 filters.

    These are 3x3 or 1x1 filters that the 2x2 average pool behind them was merged into.
    """
    # x (n_blocks, C_in, H, W, LANES), weight (C_out, C_in, k, k), bias (C_out,)
    # -> (n_blocks, C_out, H // stride, W // stride, LANES)
    n_blocks, _, height, width, _ = x.shape
    y = empty((n_blocks, len(weight), height // stride, width // stride, LANES), x.dtype)
    tiles = -(-len(weight) // CHANNELS) * y.shape[2] * -(-y.shape[3] // PIXELS)
    launch(CONV2D_KERNELS[weight.shape[2], stride], n_blocks * tiles,
           by_line(x), to_device(weight), to_device(bias), by_line(y), (0, 0, 0, x.shape[1]), by_line(y))
    return y


def _conv2d_kernel(size, stride):
    margin = (size - 1) // 2  # zeros around x
    window = stride * (PIXELS - 1) + size  # columns of x under a tile

    @cuda.jit
    def conv2d_kernel(x, weight, bias, start, part, y):
        # x (n_blocks, C_in, H, W * LANES), weight (C_out, C_in, size, size), bias (C_out,)
        # start, y (n_blocks, C_out, H // stride, W // stride * LANES); y may be the start
        # A task is a tile of LANES images; the tiles of neighbouring tasks need the same pixels.
        lane, first = cuda.grid(2)
        n_channels, height_out, width_out = y.shape[1], y.shape[2], y.shape[3] // LANES
        n_over = (n_channels + CHANNELS - 1) // CHANNELS
        n_beside = (width_out + PIXELS - 1) // PIXELS
        sums = cuda.local.array((CHANNELS, PIXELS), x.dtype)
        line = cuda.local.array(window, x.dtype)
        n_start, x_first, weight_first, n_in = part
        for task in range(first, y.shape[0] * height_out * n_beside * n_over, cuda.gridsize(2)[1]):
            o, rest = task % n_over * CHANNELS, task // n_over
            w, rest = rest % n_beside * PIXELS, rest // n_beside
            h, b = rest % height_out, rest // height_out
            b_x, c_x = b % x.shape[0], x_first + b // x.shape[0] * n_in
            for j in range(CHANNELS):
                k = min(o + j, n_channels - 1)
                for p in range(PIXELS):
                    if n_start > 0 and w + p < width_out:
                        sums[j, p] = start[b % n_start, k, h, (w + p) * LANES + lane]
                    else:
                        sums[j, p] = bias[k]
            for i in range(n_in):
                for kh in range(size):
                    row = stride * h + kh - margin
                    if 0 <= row < x.shape[2]:
                        for q in range(window):
                            # a column outside the map is a place outside the line
                            place = (stride * w - margin + q) * LANES + lane
                            line[q] = x[b_x, c_x + i, row, place] if 0 <= place < x.shape[3] else ZERO
                        for j in range(CHANNELS):
                            for kw in range(size):
                                factor = weight[min(o + j, n_channels - 1), weight_first + i, kh, kw]
                                for p in range(PIXELS):
                                    sums[j, p] += factor * line[stride * p + kw]
            for j in range(CHANNELS):
                for p in range(PIXELS):
                    if o + j < n_channels and w + p < width_out:
                        y[b, o + j, h, (w + p) * LANES + lane] = sums[j, p]

    return conv2d_kernel


# by filter size and stride; with stride 2, a 3x3 or 1x1 filter merged with the 2x2 average pool after it
CONV2D_KERNELS = {key: _conv2d_kernel(*key) for key in ((3, 1), (1, 1), (4, 2), (2, 2))}


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


def _conv2d_weight_kernel(size):
    margin = (size - 1) // 2

    @cuda.jit
    def conv2d_weight_kernel(x, dy, dweight):
        # x (n_blocks, C_in, H, W, LANES), dy (n_blocks, C_out, H, W, LANES)
        # dweight (n_blocks, C_out, C_in, size, size)
        # A CUDA block takes the filter of one pair of channels; its rows share the pixels.
        lane, row = cuda.threadIdx.x, cuda.threadIdx.y
        height, width, n_in, n_out = x.shape[2], x.shape[3], dweight.shape[2], dweight.shape[1]
        parts = cuda.shared.array(THREADS, x.dtype)
        sums = cuda.local.array((size, size), x.dtype)
        for task in range(cuda.blockIdx.y, x.shape[0] * n_out * n_in, cuda.gridDim.y):
            i, o, b = task % n_in, task // n_in % n_out, task // (n_in * n_out)
            for kh in range(size):
                for kw in range(size):
                    sums[kh, kw] = ZERO
            for pixel in range(row, height * width, ROWS):
                h, w = pixel // width, pixel % width
                gradient = dy[b, o, h, w, lane]
                for kh in range(size):
                    for kw in range(size):
                        r, c = h + kh - margin, w + kw - margin
                        if 0 <= r < height and 0 <= c < width:
                            sums[kh, kw] += gradient * x[b, i, r, c, lane]
            for kh in range(size):
                for kw in range(size):
                    total = block_sum(parts, sums[kh, kw])
                    if lane == 0 and row == 0:
                        dweight[b, o, i, kh, kw] = total

    return conv2d_weight_kernel


CONV2D_WEIGHT_KERNELS = {size: _conv2d_weight_kernel(size) for size in (3, 1)}
