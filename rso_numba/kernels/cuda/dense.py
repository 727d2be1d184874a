"""The dense layer."""

import numpy as np
from numba import cuda

from .device import LANES, ROWS, THREADS, empty, launch_blocks, to_device, to_host
from .layout import add_blocks
from .norms import channel_totals

ZERO = np.float32(0)


def dense_forward(x, weight, bias):
    """Return x @ weight.T + bias."""
    y = empty((len(x), len(weight), LANES), x.dtype)
    launch_blocks(dense_kernel, len(x) * len(weight),
                  x, to_device(weight), to_device(bias), y, (0, 0, 0, x.shape[1]), y)
    return y


@cuda.jit
def dense_kernel(x, weight, bias, start, part, y):
    # x (n_blocks, n_in, LANES), weight (n_out, n_in), bias (n_out,); start, y (n_blocks, n_out, LANES)
    # A CUDA block computes one output of LANES images; its rows share the inputs.
    lane, row = cuda.threadIdx.x, cuda.threadIdx.y
    n_out = weight.shape[0]
    n_start, x_first, first, n_in = part
    parts = cuda.shared.array((ROWS, LANES), x.dtype)
    for task in range(cuda.blockIdx.y, y.shape[0] * n_out, cuda.gridDim.y):
        o, b = task % n_out, task // n_out
        b_x, c_x = b % x.shape[0], x_first + b // x.shape[0] * n_in
        total = ZERO
        for i in range(row, n_in, ROWS):
            total += weight[o, first + i] * x[b_x, c_x + i, lane]
        parts[row, lane] = total
        cuda.syncthreads()
        if row == 0:
            total = start[b % n_start, o, lane] if n_start > 0 else bias[o]
            for r in range(ROWS):
                total += parts[r, lane]
            y[b, o, lane] = total
        cuda.syncthreads()  # before the next task overwrites the parts


def dense_backward(x, weight, dy):
    """Return the gradients (dx, dweight, dbias) of dense_forward."""
    dx = dense_forward(dy, weight.T, np.zeros(weight.shape[1], x.dtype))
    dweight = empty((len(x), *weight.shape), x.dtype)
    launch_blocks(dense_weight_kernel, -(-dweight.size // THREADS), x, dy, dweight)
    return dx, add_blocks(to_host(dweight), x.dtype), channel_totals(dy)


@cuda.jit
def dense_weight_kernel(x, dy, dweight):
    # x (n_blocks, n_in, LANES), dy (n_blocks, n_out, LANES), dweight (n_blocks, n_out, n_in)
    # Here a thread is a weight, not an image: it adds up the images of a block by itself.
    lane, row = cuda.grid(2)
    n_out, n_in = dweight.shape[1], dweight.shape[2]
    first, step = row * LANES + lane, cuda.gridsize(2)[1] * LANES
    for task in range(first, dweight.size, step):
        i, o, b = task % n_in, task // n_in % n_out, task // (n_in * n_out)
        total = ZERO
        for image in range(LANES):
            total += dy[b, o, image] * x[b, i, image]
        dweight[b, o, i] = total
