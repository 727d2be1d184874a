"""The kernels that multiply, convolution and dense layer: nearly all the time of a network is spent here.

They work on packed images, (n_blocks, ..., LANES), as drawn in `cpu.py`. What makes them fast is a *tile*:
a few outputs whose sums stay in registers until they are complete, so that each number fetched from memory
serves several multiplications. A tile that hangs over the edge computes its last channel or pixel repeatedly.
While a thread computes a block it asks for the next one, which is in the cache by the time it is needed.
"""

from collections import namedtuple

import numpy as np
from numba import get_num_threads, get_thread_id, prange

from .compiling import formula, kernel, parallel_kernel
from .lanes import LANES, add_up, fetch, fill, load, multiply_add, settle, store, stream
from .memory import empty
from .norms import around_mean, count_pixels, real_lanes
from .tails import enter

TILE = 4  # output channels, and pixels, of a tile of the convolution
STRIP = 300_000  # bytes of padded input that one thread works on at once: a part of its second-level cache

Filters = namedtuple("Filters", "weight bias")


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


def side_by_side(weight, bias):
    """Return weight (C_out, C_in, k, k) and bias (C_out,) as Filters, (C_in, k, k, C) and (C,).

    The output channels that a tile needs are neighbours; copies of the last one make the last tile whole.
    """
    channels = np.minimum(np.arange(len(weight) + -len(weight) % TILE), len(weight) - 1)
    return Filters(np.ascontiguousarray(weight[channels].transpose(1, 2, 3, 0)), bias[channels])


@parallel_kernel
def conv2d_blocks(z, tail, filters, start, started, stride, streamed, n_images, y, statistics, padded, sums):
    # z (n_blocks, C_in, H, W, LANES), which the tail makes (n_blocks, C_in, h, w, LANES) of
    # filters: weight (C_in, k, k, C), bias (C,), with C_out rounded up to C
    # y, start (n_blocks, C_out, h / stride, w / stride, LANES): `started` says to begin with start, not bias,
    # `streamed` to write y past the caches
    # statistics (2, n_blocks, C_out), or of no blocks if nobody asks: see `norms.py`
    # padded (n_threads, C_in, rows, columns, LANES), sums (n_threads, C, 3, LANES)
    for b in prange(z.shape[0]):
        t, is_counted = get_thread_id(), statistics.shape[1] > 0
        n_lanes = min(n_images - b * LANES, LANES) if is_counted else 0
        conv2d_block(b, t, z, tail, filters, start, started, stride, streamed, n_lanes, y, padded, sums)
        if is_counted:
            count = y.shape[2] * y.shape[3] * n_lanes
            for o in range(y.shape[1]):
                statistics[0, b, o], statistics[1, b, o] = around_mean(sums, t, o, count)


@kernel
def conv2d_block(b, t, z, tail, filters, start, started, stride, streamed, n_lanes, y, padded, sums):
    # block b of the arrays above, in thread t; n_lanes hold images, 0 if nothing is counted
    size, width, columns = filters.weight.shape[1], y.shape[3], padded.shape[3]
    margin = (size - 1) // 2  # also of 4x4 filters, which an average pool was merged into
    n_rows = (padded.shape[2] - size) // stride + 1
    is_real, nothing, n_tiles = real_lanes(y, n_lanes), fill(y.dtype.type(0)), sums.shape[1] // TILE
    # all as flat pixels, and once for a block, because it takes time to make a view
    ahead = min(b + 1, z.shape[0] - 1)
    z_ahead, start_ahead = z[ahead].reshape(-1, LANES), start[ahead].reshape(-1, LANES)
    x, begin = padded[t].reshape(padded.shape[1], -1, LANES), start[b].reshape(y.shape[1], -1, LANES)
    out, sums = y[b].reshape(y.shape[1], -1, LANES), sums[t]
    part, share = 0, len(z_ahead) // (n_tiles * max(1, out.shape[1] // TILE)) + 1
    for first in range(0, y.shape[2], n_rows):  # strip by strip
        enter(z, b, tail, stride * first - margin, margin, padded, t)
        end = min(first + n_rows, y.shape[2]) * width
        for p in range(first * width, end, TILE):
            pixels = p, min(p + 1, end - 1), min(p + 2, end - 1), min(p + 3, end - 1)
            at = (inside(pixels[0], first, width, stride, columns),
                  inside(pixels[1], first, width, stride, columns),
                  inside(pixels[2], first, width, stride, columns),
                  inside(pixels[3], first, width, stride, columns))
            counts = (is_real, is_real if p + 1 < end else nothing, is_real if p + 2 < end else nothing,
                      is_real if p + 3 < end else nothing)
            for tile in range(n_tiles):
                fetch_part(z_ahead, part, share)
                if started:
                    fetch_part(start_ahead, part, TILE * TILE)
                part += 1
                conv2d_tile(x, at, columns, filters, begin, started, TILE * tile, pixels, streamed,
                            out, n_lanes > 0, counts, sums)
    settle()


@formula
def inside(p, first, width, stride, columns):
    """Return where the filter for output pixel p begins in the strip from row `first` on, flat."""
    h, w = divmod(p, width)
    return stride * ((h - first) * columns + w)


@formula
def fetch_part(pixels, part, size):
    """Ask for one of the parts of pixels (n, LANES), each of `size` pixels."""
    for i in range(part * size, min(part * size + size, len(pixels))):
        fetch(pixels, (i,))


@formula
def conv2d_tile(x, at, columns, filters, start, started, o, pixels, streamed, y, is_counted, counts, sums):
    """Compute output channels o to o + 3 of four pixels.

    These are 16 sums, so that 4 pixels and 4 weights fetched from memory serve 16 multiplications.
    """
    # x (C_in, rows * columns, LANES), start, y (C_out, n_pixels, LANES), sums (C, 3, LANES)
    weight, bias, last = filters.weight, filters.bias, y.shape[0] - 1
    o1, o2, o3 = min(o + 1, last), min(o + 2, last), min(o + 3, last)
    a0 = a1 = a2 = a3 = fill(bias[o])
    b0 = b1 = b2 = b3 = fill(bias[o + 1])
    c0 = c1 = c2 = c3 = fill(bias[o + 2])
    d0 = d1 = d2 = d3 = fill(bias[o + 3])
    if started:
        a0, a1, a2, a3 = load_pixels(start, o, pixels)
        b0, b1, b2, b3 = load_pixels(start, o1, pixels)
        c0, c1, c2, c3 = load_pixels(start, o2, pixels)
        d0, d1, d2, d3 = load_pixels(start, o3, pixels)
    for i in range(weight.shape[0]):
        for kh in range(weight.shape[1]):
            for kw in range(weight.shape[2]):
                tap = kh * columns + kw
                x0, x1 = load(x, (i, at[0] + tap)), load(x, (i, at[1] + tap))
                x2, x3 = load(x, (i, at[2] + tap)), load(x, (i, at[3] + tap))
                u = weight[i, kh, kw, o]
                a0, a1 = multiply_add(u, x0, a0), multiply_add(u, x1, a1)
                a2, a3 = multiply_add(u, x2, a2), multiply_add(u, x3, a3)
                u = weight[i, kh, kw, o + 1]
                b0, b1 = multiply_add(u, x0, b0), multiply_add(u, x1, b1)
                b2, b3 = multiply_add(u, x2, b2), multiply_add(u, x3, b3)
                u = weight[i, kh, kw, o + 2]
                c0, c1 = multiply_add(u, x0, c0), multiply_add(u, x1, c1)
                c2, c3 = multiply_add(u, x2, c2), multiply_add(u, x3, c3)
                u = weight[i, kh, kw, o + 3]
                d0, d1 = multiply_add(u, x0, d0), multiply_add(u, x1, d1)
                d2, d3 = multiply_add(u, x2, d2), multiply_add(u, x3, d3)
    store_pixels(y, o, pixels, streamed, a0, a1, a2, a3)
    store_pixels(y, o1, pixels, streamed, b0, b1, b2, b3)
    store_pixels(y, o2, pixels, streamed, c0, c1, c2, c3)
    store_pixels(y, o3, pixels, streamed, d0, d1, d2, d3)
    if is_counted:
        count_pixels(sums, o, pixels[0] == 0, counts, a0, a1, a2, a3)
        count_pixels(sums, o + 1, pixels[0] == 0, counts, b0, b1, b2, b3)
        count_pixels(sums, o + 2, pixels[0] == 0, counts, c0, c1, c2, c3)
        count_pixels(sums, o + 3, pixels[0] == 0, counts, d0, d1, d2, d3)


@formula
def load_pixels(y, o, pixels):
    """Return four pixels of channel o."""
    return load(y, (o, pixels[0])), load(y, (o, pixels[1])), load(y, (o, pixels[2])), load(y, (o, pixels[3]))


@formula
def store_pixels(y, o, pixels, streamed, v0, v1, v2, v3):
    """Store four pixels of channel o."""
    if streamed:
        stream(y, (o, pixels[0]), v0)
        stream(y, (o, pixels[1]), v1)
        stream(y, (o, pixels[2]), v2)
        stream(y, (o, pixels[3]), v3)
    else:
        store(y, (o, pixels[0]), v0)
        store(y, (o, pixels[1]), v1)
        store(y, (o, pixels[2]), v2)
        store(y, (o, pixels[3]), v3)


@parallel_kernel
def conv2d_weight_blocks(x, tail, dy, dweight, padded):
    # x (n_blocks, C_in, H, W, LANES), dy (n_blocks, C_out, H, W, LANES); the tail changes nothing
    # dweight (n_blocks, C_out, C_in, k, k), padded (n_threads, C_in, rows, columns, LANES) as for 3x3
    for b in prange(x.shape[0]):
        t, margin = get_thread_id(), (dweight.shape[3] - 1) // 2
        enter(x, b, tail, -margin, margin, padded, t)
        conv2d_weight_block(padded[t], dy[b], dweight[b])


@kernel
def conv2d_weight_block(padded, dy, dweight):
    # padded (C_in, rows, columns, LANES), dy (C_out, H, W, LANES), dweight (C_out, C_in, k, k)
    for o in range(0, dweight.shape[0], 4):
        for i in range(0, dweight.shape[1], 2):
            for kh in range(dweight.shape[2]):
                conv2d_weight_tile(padded, dy, dweight, o, i, kh)


@kernel
def conv2d_weight_tile(padded, dy, dweight, o, i, kh):
    # padded (C_in, rows, columns, LANES), dy (C_out, H, W, LANES), dweight (C_out, C_in, k, k)
    # Row kh of the filters of 4 output and 2 input channels, 24 sums: x are three neighbours of one input
    # channel, z of the other. (Of 1x1 filters only the first of three is wanted.)
    o1, o2, o3 = min(o + 1, dy.shape[0] - 1), min(o + 2, dy.shape[0] - 1), min(o + 3, dy.shape[0] - 1)
    i1 = min(i + 1, padded.shape[0] - 1)
    a0 = a1 = a2 = a3 = a4 = a5 = b0 = b1 = b2 = b3 = b4 = b5 = fill(padded.dtype.type(0))
    c0 = c1 = c2 = c3 = c4 = c5 = d0 = d1 = d2 = d3 = d4 = d5 = fill(padded.dtype.type(0))
    for h in range(dy.shape[1]):
        x1, x2 = load(padded, (i, h + kh, 0)), load(padded, (i, h + kh, 1))
        z1, z2 = load(padded, (i1, h + kh, 0)), load(padded, (i1, h + kh, 1))
        for w in range(dy.shape[2]):
            x0, x1, x2 = x1, x2, load(padded, (i, h + kh, w + 2))
            z0, z1, z2 = z1, z2, load(padded, (i1, h + kh, w + 2))
            g = load(dy, (o, h, w))
            a0, a1, a2 = multiply_add(g, x0, a0), multiply_add(g, x1, a1), multiply_add(g, x2, a2)
            a3, a4, a5 = multiply_add(g, z0, a3), multiply_add(g, z1, a4), multiply_add(g, z2, a5)
            g = load(dy, (o1, h, w))
            b0, b1, b2 = multiply_add(g, x0, b0), multiply_add(g, x1, b1), multiply_add(g, x2, b2)
            b3, b4, b5 = multiply_add(g, z0, b3), multiply_add(g, z1, b4), multiply_add(g, z2, b5)
            g = load(dy, (o2, h, w))
            c0, c1, c2 = multiply_add(g, x0, c0), multiply_add(g, x1, c1), multiply_add(g, x2, c2)
            c3, c4, c5 = multiply_add(g, z0, c3), multiply_add(g, z1, c4), multiply_add(g, z2, c5)
            g = load(dy, (o3, h, w))
            d0, d1, d2 = multiply_add(g, x0, d0), multiply_add(g, x1, d1), multiply_add(g, x2, d2)
            d3, d4, d5 = multiply_add(g, z0, d3), multiply_add(g, z1, d4), multiply_add(g, z2, d5)
    store_row(dweight, o, i, kh, a0, a1, a2)
    store_row(dweight, o, i1, kh, a3, a4, a5)
    store_row(dweight, o1, i, kh, b0, b1, b2)
    store_row(dweight, o1, i1, kh, b3, b4, b5)
    store_row(dweight, o2, i, kh, c0, c1, c2)
    store_row(dweight, o2, i1, kh, c3, c4, c5)
    store_row(dweight, o3, i, kh, d0, d1, d2)
    store_row(dweight, o3, i1, kh, d3, d4, d5)


@kernel
def store_row(dweight, o, i, kh, v0, v1, v2):
    # row kh of a filter of dweight (C_out, C_in, k, k), each weight the sum of the numbers of a Lanes
    dweight[o, i, kh, 0] = add_up(v0)
    if dweight.shape[3] == 3:
        dweight[o, i, kh, 1], dweight[o, i, kh, 2] = add_up(v1), add_up(v2)


@parallel_kernel
def dense_blocks(z, tail, weight, bias, start, started, y, scratch):
    # z (n_blocks, C, H, W, LANES), which the tail makes n_in = C * h * w features of
    # weight (n_out, n_in), bias (n_out,), scratch (n_threads, C, h, w, LANES)
    # y, start (n_blocks, n_out, LANES): `started` says to begin with `start`, not the bias
    flat = scratch.reshape(scratch.shape[0], -1, LANES)
    for b in prange(z.shape[0]):
        t = get_thread_id()
        enter(z, b, tail, 0, 0, scratch, t)
        for o in range(0, weight.shape[0], 4):
            dense_tile(flat, t, weight, bias, start, started, y, b, o)


@kernel
def dense_tile(x, t, weight, bias, start, started, y, n, o):
    # x[t] (n_in, LANES), weight (n_out, n_in), bias (n_out,) -> outputs o to o + 3 of block n
    # y, start (n_blocks, n_out, LANES)
    last = y.shape[1] - 1
    o1, o2, o3 = min(o + 1, last), min(o + 2, last), min(o + 3, last)
    a, b, c, d = fill(bias[o]), fill(bias[o1]), fill(bias[o2]), fill(bias[o3])
    if started:
        a, b, c, d = load(start, (n, o)), load(start, (n, o1)), load(start, (n, o2)), load(start, (n, o3))
    for i in range(weight.shape[1]):
        x0 = load(x, (t, i))
        a, b = multiply_add(weight[o, i], x0, a), multiply_add(weight[o1, i], x0, b)
        c, d = multiply_add(weight[o2, i], x0, c), multiply_add(weight[o3, i], x0, d)
    store(y, (n, o), a)
    store(y, (n, o1), b)
    store(y, (n, o2), c)
    store(y, (n, o3), d)


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
