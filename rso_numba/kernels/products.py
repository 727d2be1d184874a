"""The kernels that multiply, convolution and dense layer: nearly all the time of a network is spent here.

They work on packed images, (n_blocks, ..., LANES), as drawn in `cpu.py`. What makes them fast is a *tile*:
a few outputs whose sums stay in registers until they are complete, so that each number fetched from memory
serves several multiplications. A tile that hangs over the edge computes its last channel or pixel repeatedly.
"""

import numpy as np
from numba import get_num_threads, get_thread_id, prange

from .compiling import formula, kernel, parallel_kernel
from .lanes import LANES, add_up, fill, load, multiply_add, store
from .memory import empty
from .norms import block_statistics
from .tails import enter

STRIP = 2**17  # bytes of padded input that one thread works on at once: a part of its cache


def padded_scratch(shape, size, stride, dtype, strips=True):
    """Return room in each thread for padded maps (C, H, W), or for as many of their rows as fit its cache.

    `size` and `stride` are those of the filters. The number of columns is odd: with a power of two between
    them, the same pixels of many rows would compete for the same places of the cache.
    """
    n_channels, height, width = shape
    width = (width + size - 1) | 1
    n_outputs = height // stride
    if strips:
        n_rows = STRIP // (n_channels * width * LANES * np.dtype(dtype).itemsize)
        n_strips = -(-n_outputs // max(1, (n_rows - size) // stride + 1))
        n_outputs = -(-n_outputs // n_strips)
    n_rows = (n_outputs - 1) * stride + size
    return empty((get_num_threads(), n_channels, n_rows, width, LANES), dtype)


@parallel_kernel
def conv2d_blocks(z, tail, weight, bias, start, started, stride, n_images, y, statistics, padded):
    # z (n_blocks, C_in, H, W, LANES), which the tail makes (n_blocks, C_in, h, w, LANES) of
    # weight (C_out, C_in, k, k), bias (C_out,), padded (n_threads, C_in, rows, columns, LANES)
    # y, start (n_blocks, C_out, h / stride, w / stride, LANES): `started` says to begin with start, not bias
    # statistics (2, n_blocks, C_out), or of no blocks if nobody asks: see `norms.py`
    for b in prange(z.shape[0]):
        conv2d_block(z[b], tail, weight, bias, start[b], started, stride, y[b], padded[get_thread_id()])
        if statistics.shape[1] > 0:
            for o in range(y.shape[1]):
                statistics[0, b, o], statistics[1, b, o] = block_statistics(y[b, o], n_images - b * LANES)


@kernel
def conv2d_block(z, tail, weight, bias, start, started, stride, y, padded):
    # z (C_in, H, W, LANES), weight (C_out, C_in, k, k), bias (C_out,), padded (C_in, rows, columns, LANES)
    # y, start (C_out, h / stride, w / stride, LANES), strip by strip
    size = weight.shape[2]
    margin = (size - 1) // 2  # also of 4x4 filters, which an average pool was merged into
    n_rows = (padded.shape[1] - size) // stride + 1
    for first in range(0, y.shape[1], n_rows):
        enter(z, tail, stride * first - margin, margin, padded)
        n_pixels = min(n_rows, y.shape[1] - first) * y.shape[2]
        flat, columns = padded.reshape(padded.shape[0], -1, LANES), padded.shape[2]
        for o in range(0, y.shape[0], 4):
            for p in range(0, n_pixels, 4):
                conv2d_tile(flat, columns, weight, bias, start, started, y, o, first, p, n_pixels, stride)


@kernel
def conv2d_tile(padded, columns, weight, bias, start, started, y, o, first, p, n_pixels, stride):
    # padded (C_in, rows * columns, LANES), weight (C_out, C_in, k, k)
    # y, start (C_out, h / stride, w / stride, LANES)
    # Output channels o to o + 3 of pixels p to p + 3 from row `first` on: 16 sums, so that 4 pixels and 4
    # weights fetched from memory serve 16 multiplications.
    o1, o2, o3 = min(o + 1, y.shape[0] - 1), min(o + 2, y.shape[0] - 1), min(o + 3, y.shape[0] - 1)
    width = y.shape[2]
    h0, w0 = divmod(p, width)
    h1, w1 = divmod(min(p + 1, n_pixels - 1), width)
    h2, w2 = divmod(min(p + 2, n_pixels - 1), width)
    h3, w3 = divmod(min(p + 3, n_pixels - 1), width)
    at = (first + h0, w0), (first + h1, w1), (first + h2, w2), (first + h3, w3)
    a0 = a1 = a2 = a3 = fill(bias[o])
    b0 = b1 = b2 = b3 = fill(bias[o1])
    c0 = c1 = c2 = c3 = fill(bias[o2])
    d0 = d1 = d2 = d3 = fill(bias[o3])
    if started:
        a0, a1, a2, a3 = load_pixels(start, o, at)
        b0, b1, b2, b3 = load_pixels(start, o1, at)
        c0, c1, c2, c3 = load_pixels(start, o2, at)
        d0, d1, d2, d3 = load_pixels(start, o3, at)
    q0, q1 = stride * (h0 * columns + w0), stride * (h1 * columns + w1)
    q2, q3 = stride * (h2 * columns + w2), stride * (h3 * columns + w3)
    for i in range(weight.shape[1]):
        for kh in range(weight.shape[2]):
            for kw in range(weight.shape[3]):
                tap = kh * columns + kw
                x0, x1 = load(padded, (i, q0 + tap)), load(padded, (i, q1 + tap))
                x2, x3 = load(padded, (i, q2 + tap)), load(padded, (i, q3 + tap))
                u = weight[o, i, kh, kw]
                a0, a1 = multiply_add(u, x0, a0), multiply_add(u, x1, a1)
                a2, a3 = multiply_add(u, x2, a2), multiply_add(u, x3, a3)
                u = weight[o1, i, kh, kw]
                b0, b1 = multiply_add(u, x0, b0), multiply_add(u, x1, b1)
                b2, b3 = multiply_add(u, x2, b2), multiply_add(u, x3, b3)
                u = weight[o2, i, kh, kw]
                c0, c1 = multiply_add(u, x0, c0), multiply_add(u, x1, c1)
                c2, c3 = multiply_add(u, x2, c2), multiply_add(u, x3, c3)
                u = weight[o3, i, kh, kw]
                d0, d1 = multiply_add(u, x0, d0), multiply_add(u, x1, d1)
                d2, d3 = multiply_add(u, x2, d2), multiply_add(u, x3, d3)
    store_pixels(y, o, at, a0, a1, a2, a3)
    store_pixels(y, o1, at, b0, b1, b2, b3)
    store_pixels(y, o2, at, c0, c1, c2, c3)
    store_pixels(y, o3, at, d0, d1, d2, d3)


@formula
def load_pixels(y, o, at):
    """Return four pixels of channel o; `at` are their rows and columns."""
    return load(y, (o, *at[0])), load(y, (o, *at[1])), load(y, (o, *at[2])), load(y, (o, *at[3]))


@formula
def store_pixels(y, o, at, v0, v1, v2, v3):
    """Store four pixels of channel o."""
    store(y, (o, *at[0]), v0)
    store(y, (o, *at[1]), v1)
    store(y, (o, *at[2]), v2)
    store(y, (o, *at[3]), v3)


@parallel_kernel
def conv2d_weight_blocks(x, tail, dy, dweight, padded):
    # x (n_blocks, C_in, H, W, LANES), dy (n_blocks, C_out, H, W, LANES); the tail changes nothing
    # dweight (n_blocks, C_out, C_in, k, k), padded (n_threads, C_in, rows, columns, LANES)
    for b in prange(x.shape[0]):
        conv2d_weight_block(x[b], tail, dy[b], dweight[b], padded[get_thread_id()])


@kernel
def conv2d_weight_block(x, tail, dy, dweight, padded):
    # x (C_in, H, W, LANES), dy (C_out, H, W, LANES), dweight (C_out, C_in, k, k)
    margin = (dweight.shape[2] - 1) // 2
    enter(x, tail, -margin, margin, padded)
    for o in range(0, dweight.shape[0], 4):
        for i in range(0, dweight.shape[1], 2):
            for kh in range(dweight.shape[2]):
                for kw in range(dweight.shape[3]):
                    conv2d_weight_tile(padded, dy, dweight, o, i, kh, kw)


@kernel
def conv2d_weight_tile(padded, dy, dweight, o, i, kh, kw):
    # padded (C_in, rows, columns, LANES), dy (C_out, H, W, LANES), dweight (C_out, C_in, k, k)
    # One tap of 4 output and 2 input channels: 8 sums.
    o1, o2, o3 = min(o + 1, dy.shape[0] - 1), min(o + 2, dy.shape[0] - 1), min(o + 3, dy.shape[0] - 1)
    i1 = min(i + 1, padded.shape[0] - 1)
    a0 = a1 = b0 = b1 = c0 = c1 = d0 = d1 = fill(padded.dtype.type(0))
    for h in range(dy.shape[1]):
        for w in range(dy.shape[2]):
            x0, x1 = load(padded, (i, h + kh, w + kw)), load(padded, (i1, h + kh, w + kw))
            g = load(dy, (o, h, w))
            a0, a1 = multiply_add(g, x0, a0), multiply_add(g, x1, a1)
            g = load(dy, (o1, h, w))
            b0, b1 = multiply_add(g, x0, b0), multiply_add(g, x1, b1)
            g = load(dy, (o2, h, w))
            c0, c1 = multiply_add(g, x0, c0), multiply_add(g, x1, c1)
            g = load(dy, (o3, h, w))
            d0, d1 = multiply_add(g, x0, d0), multiply_add(g, x1, d1)
    dweight[o, i, kh, kw], dweight[o, i1, kh, kw] = add_up(a0), add_up(a1)
    dweight[o1, i, kh, kw], dweight[o1, i1, kh, kw] = add_up(b0), add_up(b1)
    dweight[o2, i, kh, kw], dweight[o2, i1, kh, kw] = add_up(c0), add_up(c1)
    dweight[o3, i, kh, kw], dweight[o3, i1, kh, kw] = add_up(d0), add_up(d1)


@parallel_kernel
def dense_blocks(z, tail, weight, bias, start, started, y, scratch):
    # z (n_blocks, C, H, W, LANES), which the tail makes n_in = C * h * w features of
    # weight (n_out, n_in), bias (n_out,), scratch (n_threads, C, h, w, LANES)
    # y, start (n_blocks, n_out, LANES): `started` says to begin with `start`, not the bias
    for b in prange(z.shape[0]):
        x = scratch[get_thread_id()]
        enter(z[b], tail, 0, 0, x)
        for o in range(0, weight.shape[0], 4):
            dense_tile(x.reshape(-1, LANES), weight, bias, start[b], started, y[b], o)


@kernel
def dense_tile(x, weight, bias, start, started, y, o):
    # x (n_in, LANES), weight (n_out, n_in), bias (n_out,), y, start (n_out, LANES): outputs o to o + 3
    o1, o2, o3 = min(o + 1, y.shape[0] - 1), min(o + 2, y.shape[0] - 1), min(o + 3, y.shape[0] - 1)
    a, b, c, d = fill(bias[o]), fill(bias[o1]), fill(bias[o2]), fill(bias[o3])
    if started:
        a, b, c, d = load(start, (o,)), load(start, (o1,)), load(start, (o2,)), load(start, (o3,))
    for i in range(weight.shape[1]):
        x0 = load(x, (i,))
        a, b = multiply_add(weight[o, i], x0, a), multiply_add(weight[o1, i], x0, b)
        c, d = multiply_add(weight[o2, i], x0, c), multiply_add(weight[o3, i], x0, d)
    store(y, (o,), a)
    store(y, (o1,), b)
    store(y, (o2,), c)
    store(y, (o3,), d)


@parallel_kernel
def dense_weight_blocks(rows, dy, dweight):
    # rows (n_blocks, LANES, n_in), dy (n_blocks, n_out, LANES), dweight (n_blocks, n_out, n_in)
    # Unpacked, the features of an image lie side by side, and the inner loop runs over them.
    for b in prange(rows.shape[0]):
        for o in range(dy.shape[1]):
            for i in range(rows.shape[2]):
                dweight[b, o, i] = dy[b, o, 0] * rows[b, 0, i]
            for lane in range(1, LANES):
                for i in range(rows.shape[2]):
                    dweight[b, o, i] += dy[b, o, lane] * rows[b, lane, i]
