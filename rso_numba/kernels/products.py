"""The kernels that multiply, convolution and dense layer: nearly all the time of a network is spent here.

They work on packed images, (n_blocks, ..., LANES), as drawn in `cpu.py`. What makes them fast is a *tile*:
a few outputs whose sums stay in registers until they are complete, so that each number fetched from memory
serves several multiplications. A tile that hangs over the edge computes its last channel or pixel repeatedly.
While a thread computes a block it asks for the next one, which is in the cache by the time it is needed.
"""

from collections import namedtuple

import numpy as np
from numba import prange

from .compiling import formula, kernel, parallel_kernel
from .lanes import LANES, add_up, fetch, fill, first_lanes, load, multiply_add, settle, store, stream
from .memory import share_of, slab_of, slabs, threads_of
from .norms import around_means, count_pixels, deviations
from .tails import enter

CHANNELS, PIXELS = 8, 2  # of a tile of the convolution
STRIP = 450_000  # bytes of padded input that one thread works on at once: a part of its second-level cache

Filters = namedtuple("Filters", "weight bias")
Flat = namedtuple("Flat", "z x start y")  # views of a convolution's arrays, with pixels as one axis


def padded_scratch(shape, size, stride, dtype, strips=True):
    """Return room in each thread for padded maps (C, H, W), or for as many of their rows as fit its cache.

    `size` and `stride` are those of the filters. The number of columns is odd: with a power of two between
    them, the same pixels of many rows would compete for the same places of the cache.
    """
    n_channels, height, width = shape
    width = (width - stride + size) | 1
    n_outputs = height // stride
    if strips:
        n_rows = STRIP // (n_channels * width * LANES * np.dtype(dtype).itemsize)
        n_strips = -(-n_outputs // max(1, (n_rows - size) // stride + 1))
        n_outputs = -(-n_outputs // n_strips)
    n_rows = (n_outputs - 1) * stride + size
    return slabs("padded", (n_channels, n_rows, width, LANES), dtype)


def side_by_side(weight, bias):
    """Return weight (C_out, C_in, k, k) and bias (C_out,) as Filters, (C_in, k, k, C) and (C,).

    The output channels that a tile needs are neighbours; copies of the last one make the last tile whole.
    """
    if len(weight) % CHANNELS:
        channels = np.minimum(np.arange(len(weight) + -len(weight) % CHANNELS), len(weight) - 1)
        weight, bias = weight[channels], bias[channels]
    return Filters(np.ascontiguousarray(weight.transpose(1, 2, 3, 0)), np.ascontiguousarray(bias))


@parallel_kernel
def conv2d_blocks(z, tail, filters, start, started, stride, streamed, n_images, y, statistics, padded, sums):
    # z (n_blocks, C_in, H, W, LANES), which the tail makes (n_blocks, C_in, h, w, LANES) of
    # filters: weight (C_in, k, k, C), bias (C,), with C_out rounded up to C
    # y, start (n_blocks, C_out, h / stride, w / stride, LANES): `started` says to begin with start, not bias,
    # `streamed` to write y past the caches
    # statistics (2, n_blocks, C_out), or of no blocks if nobody asks: see `norms.py`
    # padded (n_slabs, C_in, rows, columns, LANES), sums (n_slabs, C, 3, LANES)
    # Views are made here, and each thread gets all its blocks in one call: views and calls are counted as
    # users of an array, all threads count in the same place, and wait for each other there.
    flat = Flat(z.reshape(len(z), -1, LANES),
                padded.reshape(len(padded), padded.shape[1], -1, LANES),
                start.reshape(len(start), start.shape[1], -1, LANES),
                y.reshape(len(y), y.shape[1], -1, LANES))
    for thread in prange(threads_of(padded)):
        conv2d_share(slab_of(thread), z, tail, filters, started, stride, streamed, n_images, y.shape[2:4],
                     statistics, padded, flat, sums)


@kernel
def conv2d_share(t, z, tail, filters, started, stride, streamed, n_images, shape, statistics, padded, flat,
                 sums):
    # the blocks of the thread with slab t; shape is (h, w) of y
    size, (height, width), columns = filters.weight.shape[1], shape, padded.shape[3]
    margin = (size - 1) // 2  # also of 4x4 filters, which an average pool was merged into
    n_rows = (padded.shape[2] - size) // stride + 1
    n_tiles, is_counted = sums.shape[1] // CHANNELS, statistics.shape[1] > 0
    begin, stop = share_of(t, len(padded), len(z))
    for b in range(begin, stop):
        n_lanes = min(n_images - b * LANES, LANES) if is_counted else 0
        is_real, nothing = first_lanes(n_lanes, sums.dtype.type(1)), fill(sums.dtype.type(0))
        ahead, part = min(b + 1, stop - 1), 0
        share = fetched_share(flat.z, n_tiles * max(1, height * width // PIXELS), b + 1 < stop)
        for first in range(0, height, n_rows):  # strip by strip
            enter(z, b, 0, z.shape[1], tail, 0, stride * first - margin, margin, padded, t)
            end = min(first + n_rows, height) * width
            for p in range(first * width, end, PIXELS):
                pixels, counts = (p, min(p + 1, end - 1)), (is_real, is_real if p + 1 < end else nothing)
                at = (inside(pixels[0], first, width, stride, columns),
                      inside(pixels[1], first, width, stride, columns))
                for tile in range(n_tiles):
                    fetch_part(flat.z, ahead, part, share)
                    part += 1
                    conv2d_tile(flat, b, t, ahead, at, columns, filters, started, CHANNELS * tile, pixels,
                                streamed, is_counted, counts, sums)
        if is_counted:
            around_means(sums, t, height * width * n_lanes, statistics, b)
    settle()


@formula
def inside(p, first, width, stride, columns):
    """Return where the filter for output pixel p begins in the strip from row `first` on, flat."""
    h, w = divmod(p, width)
    return stride * ((h - first) * columns + w)


@formula
def fetched_share(pixels, n_parts, is_next):
    """Return how many pixels of the next block to ask for in each of n_parts, none if there is no next."""
    return pixels.shape[1] // n_parts + 1 if is_next else 0


@formula
def fetch_part(pixels, b, part, size):
    """Ask for one of the parts of block b of pixels (n_blocks, n, LANES), each of `size` pixels."""
    for i in range(part * size, min(part * size + size, pixels.shape[1])):
        fetch(pixels, (b, i))


@formula
def conv2d_tile(flat, b, t, ahead, at, columns, filters, started, o, pixels, streamed, is_counted, counts,
                sums):
    """Compute output channels o to o + 7 of two pixels.

    These are 16 sums, so that 2 pixels and 8 weights fetched from memory serve 16 multiplications.
    """
    # flat.x (n_slabs, C_in, rows * columns, LANES), flat.start, flat.y (n_blocks, C_out, n_pixels, LANES)
    # sums (n_slabs, C, 3, LANES)
    weight, bias = filters.weight, filters.bias
    y = eight_pairs(bias[o], bias[o + 1], bias[o + 2], bias[o + 3],
                    bias[o + 4], bias[o + 5], bias[o + 6], bias[o + 7])
    if started:
        y = load_tile(flat.start, b, o, pixels)
        fetch_tile(flat.start, ahead, o, pixels)
    for i in range(weight.shape[0]):
        for kh in range(weight.shape[1]):
            for kw in range(weight.shape[2]):
                tap = kh * columns + kw
                x = load_pair(flat.x, t, i, (at[0] + tap, at[1] + tap))
                y = plus_products(weight, (i, kh, kw), o, x, y)
    store_tile(flat.y, b, o, pixels, streamed, y)
    if is_counted:
        count_pixels(sums, t, o, pixels[0] == 0, counts, y[0])
        count_pixels(sums, t, o + 1, pixels[0] == 0, counts, y[1])
        count_pixels(sums, t, o + 2, pixels[0] == 0, counts, y[2])
        count_pixels(sums, t, o + 3, pixels[0] == 0, counts, y[3])
        count_pixels(sums, t, o + 4, pixels[0] == 0, counts, y[4])
        count_pixels(sums, t, o + 5, pixels[0] == 0, counts, y[5])
        count_pixels(sums, t, o + 6, pixels[0] == 0, counts, y[6])
        count_pixels(sums, t, o + 7, pixels[0] == 0, counts, y[7])


@formula
def plus_products(weight, at, o, x, y):
    """Return y + weight[at] (C,), from o on, times x: a tile of pairs, of x a pair."""
    return (plus(weight[(*at, o)], x, y[0]), plus(weight[(*at, o + 1)], x, y[1]),
            plus(weight[(*at, o + 2)], x, y[2]), plus(weight[(*at, o + 3)], x, y[3]),
            plus(weight[(*at, o + 4)], x, y[4]), plus(weight[(*at, o + 5)], x, y[5]),
            plus(weight[(*at, o + 6)], x, y[6]), plus(weight[(*at, o + 7)], x, y[7]))


@formula
def plus(weight, x, totals):
    """Return totals + weight * x, of which both are pairs."""
    return multiply_add(weight, x[0], totals[0]), multiply_add(weight, x[1], totals[1])


@formula
def eight_pairs(n0, n1, n2, n3, n4, n5, n6, n7):
    """Return a tile, each number twice."""
    return (twice(fill(n0)), twice(fill(n1)), twice(fill(n2)), twice(fill(n3)),
            twice(fill(n4)), twice(fill(n5)), twice(fill(n6)), twice(fill(n7)))


@formula
def twice(value):
    """Return a pair of the same."""
    return value, value


@formula
def load_tile(x, n, o, pixels):
    """Return two pixels of channels o to o + 7 of x[n], the last one again if there are too few."""
    last = x.shape[1] - 1
    return (load_pair(x, n, o, pixels), load_pair(x, n, min(o + 1, last), pixels),
            load_pair(x, n, min(o + 2, last), pixels), load_pair(x, n, min(o + 3, last), pixels),
            load_pair(x, n, min(o + 4, last), pixels), load_pair(x, n, min(o + 5, last), pixels),
            load_pair(x, n, min(o + 6, last), pixels), load_pair(x, n, min(o + 7, last), pixels))


@formula
def load_pair(x, n, c, pixels):
    """Return two pixels of channel c of x[n]."""
    return load(x, (n, c, pixels[0])), load(x, (n, c, pixels[1]))


@formula
def fetch_tile(x, n, o, pixels):
    """Ask for what `load_tile` will load."""
    for c in range(o, min(o + CHANNELS, x.shape[1])):
        fetch(x, (n, c, pixels[0]))
        fetch(x, (n, c, pixels[1]))


@formula
def store_tile(y, n, o, pixels, streamed, values):
    """Store two pixels of channels o to o + 7 in y[n], of those that it has."""
    n_channels = y.shape[1] - o
    store_pair(y, n, o, pixels, streamed, values[0])
    if n_channels > 1:
        store_pair(y, n, o + 1, pixels, streamed, values[1])
    if n_channels > 2:
        store_pair(y, n, o + 2, pixels, streamed, values[2])
    if n_channels > 3:
        store_pair(y, n, o + 3, pixels, streamed, values[3])
    if n_channels > 4:
        store_pair(y, n, o + 4, pixels, streamed, values[4])
    if n_channels > 5:
        store_pair(y, n, o + 5, pixels, streamed, values[5])
    if n_channels > 6:
        store_pair(y, n, o + 6, pixels, streamed, values[6])
    if n_channels > 7:
        store_pair(y, n, o + 7, pixels, streamed, values[7])


@formula
def store_pair(y, n, c, pixels, streamed, values):
    """Store two pixels of channel c in y[n]."""
    if streamed:
        stream(y, (n, c, pixels[0]), values[0])
        stream(y, (n, c, pixels[1]), values[1])
    else:
        store(y, (n, c, pixels[0]), values[0])
        store(y, (n, c, pixels[1]), values[1])


@parallel_kernel
def conv2d_weight_blocks(x, tail, dy, dweight, dbias, padded):
    # x, which the tail makes (n_blocks, C_in, H, W, LANES) of; dy (n_blocks, C_out, H, W, LANES)
    # dweight (n_blocks, C_out, C_in, k, k), dbias (n_blocks, C_out)
    # padded (n_slabs, C_in, rows, columns, LANES) as for 3x3
    dy_flat = dy.reshape(len(dy), dy.shape[1], -1, LANES)
    for thread in prange(threads_of(padded)):
        conv2d_weight_share(slab_of(thread), x, tail, dy, dy_flat, dweight, dbias, padded)


@kernel
def conv2d_weight_share(t, x, tail, dy, dy_flat, dweight, dbias, padded):
    # the blocks of the thread with slab t
    margin, (start, stop) = (dweight.shape[3] - 1) // 2, share_of(t, len(padded), len(x))
    for b in range(start, stop):
        enter(x, b, 0, x.shape[1], tail, 0, -margin, margin, padded, t)
        for o in range(0, dweight.shape[1], 4):
            for i in range(0, dweight.shape[2], 2):
                for kh in range(dweight.shape[3]):
                    conv2d_weight_tile(padded, t, dy, dweight, b, o, i, kh)
        for o in range(dbias.shape[1]):
            dbias[b, o] = deviations(dy_flat, b, o, dy.dtype.type(0), False)


@kernel
def conv2d_weight_tile(padded, t, dy, dweight, b, o, i, kh):
    # padded (n_slabs, C_in, rows, columns, LANES), dy (n_blocks, C_out, H, W, LANES)
    # dweight (n_blocks, C_out, C_in, k, k)
    # Row kh of the filters of 4 output and 2 input channels, 24 sums, from three neighbours of both input
    # channels, u and v. (Of 1x1 filters only the first of three is wanted.)
    o1, o2, o3 = min(o + 1, dy.shape[1] - 1), min(o + 2, dy.shape[1] - 1), min(o + 3, dy.shape[1] - 1)
    i1, zero = min(i + 1, padded.shape[1] - 1), fill(padded.dtype.type(0))
    u0 = u1 = u2 = u3 = v0 = v1 = v2 = v3 = zero, zero, zero
    for h in range(dy.shape[2]):
        u = zero, load(padded, (t, i, h + kh, 0)), load(padded, (t, i, h + kh, 1))
        v = zero, load(padded, (t, i1, h + kh, 0)), load(padded, (t, i1, h + kh, 1))
        for w in range(dy.shape[3]):
            u = u[1], u[2], load(padded, (t, i, h + kh, w + 2))
            v = v[1], v[2], load(padded, (t, i1, h + kh, w + 2))
            g = load(dy, (b, o, h, w))
            u0, v0 = plus_three(g, u, u0), plus_three(g, v, v0)
            g = load(dy, (b, o1, h, w))
            u1, v1 = plus_three(g, u, u1), plus_three(g, v, v1)
            g = load(dy, (b, o2, h, w))
            u2, v2 = plus_three(g, u, u2), plus_three(g, v, v2)
            g = load(dy, (b, o3, h, w))
            u3, v3 = plus_three(g, u, u3), plus_three(g, v, v3)
    store_row(dweight, b, o, i, kh, u0)
    store_row(dweight, b, o, i1, kh, v0)
    store_row(dweight, b, o1, i, kh, u1)
    store_row(dweight, b, o1, i1, kh, v1)
    store_row(dweight, b, o2, i, kh, u2)
    store_row(dweight, b, o2, i1, kh, v2)
    store_row(dweight, b, o3, i, kh, u3)
    store_row(dweight, b, o3, i1, kh, v3)


@formula
def plus_three(gradient, x, totals):
    """Return totals + gradient * x, three Lanes each."""
    return (multiply_add(gradient, x[0], totals[0]), multiply_add(gradient, x[1], totals[1]),
            multiply_add(gradient, x[2], totals[2]))


@kernel
def store_row(dweight, b, o, i, kh, totals):
    # row kh of a filter of dweight (n_blocks, C_out, C_in, k, k), each weight the sum of what is in a Lanes
    dweight[b, o, i, kh, 0] = add_up(totals[0])
    if dweight.shape[4] == 3:
        dweight[b, o, i, kh, 1], dweight[b, o, i, kh, 2] = add_up(totals[1]), add_up(totals[2])


@parallel_kernel
def dense_blocks(z, tail, weight, bias, start, started, y, room):
    # z (n_blocks, C, H, W, LANES), which the tail makes n_in = C * h * w features of
    # weight (n_out, n_in), bias (n_out,), room (n_slabs, C, h, w, LANES)
    # y, start (n_blocks, n_out, LANES): `started` says to begin with `start`, not the bias
    flat = room.reshape(len(room), -1, LANES)
    for thread in prange(threads_of(room)):
        dense_share(slab_of(thread), z, tail, weight, bias, start, started, y, room, flat)


@kernel
def dense_share(t, z, tail, weight, bias, start, started, y, room, flat):
    # the blocks of the thread with slab t
    begin, stop = share_of(t, len(room), len(z))
    for b in range(begin, stop):
        enter(z, b, 0, z.shape[1], tail, 0, 0, 0, room, t)
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
