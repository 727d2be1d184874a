"""The convolution: nearly all the time of a network is spent here.

A thread computes a *tile* of outputs of its image, several channels x several neighbours in a row, as sums
in registers: then every pixel and every weight that it reads serves several multiplications. All threads of
a CUDA block work on the same channels, whose filters they share. The loops over a tile have constant bounds:
the compiler unrolls them, and only then can the sums live in registers.

The forward kernels of convolution and dense layer can add up a part of the input channels only, on top of
what others contributed before. `part` = (n_start, x_first, first, n) says which: n channels, from x_first on
in x and from `first` on in the weights; the sums begin at start[b % n_start], or at the bias if n_start is 0.
y may have several times as many blocks as x: then x holds that many candidates for these channels, and they
follow each other.
"""

import numpy as np
from numba import cuda

from .device import LANES, ROWS, THREADS, block_sum, empty, launch_blocks, to_device, to_host, unsigned
from .layout import add_blocks, by_line
from .norms import channel_totals

ZERO = np.float32(0)
SHARED = 32  # input channels whose filters are in shared memory at a time


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
    kernel, n = conv2d_launch(weight.shape[2], stride, y)
    launch_blocks(kernel, n, by_line(x), to_device(weight), to_device(bias), by_line(y),
                  (0, 0, 0, x.shape[1]), by_line(y))
    return y


def conv2d_launch(size, stride, y):
    """Return the kernel that computes y (n_blocks, C, h, w, LANES), and its number of CUDA blocks."""
    n_blocks, n_channels, height, width, _ = y.shape

    def cost(tile):  # outputs that are computed, at the margins in vain; of two alike, the larger tile
        channels, pixels = tile
        return -(-n_channels // channels) * -(-width // pixels) * channels * pixels, -channels * pixels

    channels, pixels = min(TILES[stride], key=cost)
    n_tiles = n_blocks * height * -(-width // pixels)
    return CONV2D_KERNELS[size, stride, channels, pixels], -(-n_tiles // ROWS) * -(-n_channels // channels)


@cuda.jit(device=True)
def load_filters(filters, weight, o, first, n_shared, size, channels):
    # filters (n_taps, channels) in shared memory, weight (C_out, C_in, size, size): output channels from o,
    # n_shared input channels from `first`
    for tap in range(cuda.threadIdx.y * LANES + cuda.threadIdx.x, n_shared * size * size, THREADS):
        i, kh, kw = first + tap // (size * size), tap % (size * size) // size, tap % size
        for j in range(channels):
            filters[tap, j] = weight[min(o + j, weight.shape[0] - 1), i, kh, kw]


def _conv2d_kernel(size, stride, channels, pixels):
    margin = (size - 1) // 2  # zeros around x
    window = stride * (pixels - 1) + size  # columns of x under a tile
    area, n_taps = size * size, SHARED * size * size

    @cuda.jit
    def conv2d_kernel(x, weight, bias, start, part, y):
        # x (n_blocks, C_in, H, W * LANES), weight (C_out, C_in, size, size), bias (C_out,)
        # start, y (n_blocks, C_out, H // stride, W // stride * LANES); y may be the start
        # A CUDA block takes one tile of channels, and each of its rows one tile of pixels of LANES images.
        lane, row = cuda.threadIdx.x, cuda.threadIdx.y
        n_channels, height_out, width_out = y.shape[1], y.shape[2], y.shape[3] // LANES
        n_over, n_beside = (n_channels + channels - 1) // channels, (width_out + pixels - 1) // pixels
        n_tiles = y.shape[0] * height_out * n_beside
        sums, line = cuda.local.array((channels, pixels), x.dtype), cuda.local.array(window, x.dtype)
        filters = cuda.shared.array((n_taps, channels), x.dtype)
        n_start, x_first, weight_first, n_in = part
        for task in range(cuda.blockIdx.y, (n_tiles + ROWS - 1) // ROWS * n_over, cuda.gridDim.y):
            o, tile = task % n_over * channels, task // n_over * ROWS + row
            w, rest = tile % n_beside * pixels, tile // n_beside
            h, b = rest % height_out, rest // height_out
            b_x, c_x = b % x.shape[0], x_first + b // x.shape[0] * n_in
            if tile < n_tiles:
                b_start = b % n_start if n_start > 0 else 0
                for j in range(channels):
                    k = min(o + j, n_channels - 1)
                    start_line = start[b_start, k, h]
                    for p in range(pixels):
                        is_start = n_start > 0 and w + p < width_out
                        sums[j, p] = start_line[unsigned((w + p) * LANES + lane)] if is_start else bias[k]
            for first in range(0, n_in, SHARED):
                n_shared = min(SHARED, n_in - first)
                cuda.syncthreads()  # nobody reads the former filters any more
                load_filters(filters, weight, o, weight_first + first, n_shared, size, channels)
                cuda.syncthreads()
                if tile >= n_tiles:
                    continue
                for i in range(n_shared):
                    for kh in range(size):
                        row_x = stride * h + kh - margin
                        if 0 <= row_x < x.shape[2]:
                            x_line = x[unsigned(b_x), unsigned(c_x + first + i), unsigned(row_x)]
                            for q in range(window):
                                # a column outside the map is a place outside the line
                                place = (stride * w - margin + q) * LANES + lane
                                line[q] = x_line[unsigned(place)] if 0 <= place < x.shape[3] else ZERO
                            tap = unsigned(i * area + kh * size)
                            for j in range(channels):
                                for kw in range(size):
                                    factor = filters[tap + unsigned(kw), j]
                                    for p in range(pixels):
                                        sums[j, p] += factor * line[stride * p + kw]
            if tile < n_tiles:
                for j in range(channels):
                    y_line = y[b, min(o + j, n_channels - 1), h]
                    for p in range(pixels):
                        if o + j < n_channels and w + p < width_out:
                            y_line[unsigned((w + p) * LANES + lane)] = sums[j, p]

    return conv2d_kernel


# channels x pixels, by stride; with larger ones, fewer threads have room for their sums
TILES = {1: ((4, 7), (4, 8), (8, 7), (8, 8)), 2: ((4, 7), (4, 8), (8, 7))}
# by filter size, stride and tile; with stride 2, a 3x3 or 1x1 filter merged with the 2x2 average pool behind
CONV2D_KERNELS = {(size, stride, *tile): _conv2d_kernel(size, stride, *tile)
                  for size, stride in ((3, 1), (1, 1), (4, 2), (2, 2)) for tile in TILES[stride]}


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
