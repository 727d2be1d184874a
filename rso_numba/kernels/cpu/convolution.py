"""The convolution: nearly all the time of a network is spent here.

The sums of a tile stay in registers (`tiles.py`). While a thread computes a block of images it asks for the
next one, which is in the cache by the time it is needed.
"""

from collections import namedtuple

import numpy as np
from numba import prange

from ..compiling import formula, kernel, parallel_kernel
from .activations import computed
from .fusion import deferred, load_padded, pooled_shape
from .lanes import (
    LANES,
    WIDE,
    broadcast,
    first_lanes,
    load,
    multiply_add,
    store_fence,
    sum_lanes,
)
from .layout import add_blocks
from .memory import ALIGNMENT, block_range, empty, n_threads_of, scratch, workspace_of, workspaces
from .norms import around_means, count_pixels, deviations
from .tiles import (
    CHANNELS,
    PIXELS,
    SHORT,
    bias_tile,
    load_pair,
    load_tile,
    padded_workspace,
    plus_products,
    prefetch_part,
    prefetch_size,
    prefetch_tile,
    side_by_side,
    store_tile,
)
from .winograd import Output, pays, winograd_blocks, winograd_workspace

NONTEMPORAL_BYTES = 2**23  # larger outputs are written past the caches, if they begin a cache line

Flat = namedtuple("Flat", "z x start y")  # views of a convolution's arrays, with pixels as one axis
Workspace = namedtuple("Workspace", "padded sums")  # of all threads, see `conv2d_blocks`


def conv2d_forward(x, weight, bias):
    """Return the cross-correlation of x with 3x3 (padded by 1) or 1x1 filters, plus bias.

    A sum of zeros is 0, for a ReLU that may be next: its gradient is 0 there, 1 just above.
    """
    y, _ = conv2d_fused(*deferred(x), weight, bias, n_images=None, exact_zeros=True)
    return y


def conv2d_before_norm(x, weight, bias):
    """Return the same where a BatchNorm is next: a sum of zeros may be 1e-7, and there is a faster way."""
    y, _ = conv2d_fused(*deferred(x), weight, bias, n_images=None)
    return y


def conv2d_fused(z, epilogue, weight, bias, n_images, start=None, stride=1, y=None, exact_zeros=False):
    """Return the convolution of what an `Epilogue` makes of z, and the statistics of its blocks.

    Parameters
    ----------
    z : ndarray (n_blocks, C_in, H, W, LANES)
    epilogue : Epilogue
        Makes x (n_blocks, C_in, h, w, LANES) of z. Only one thread's part of x exists at a time.
    weight : ndarray (C_out, C_in, k, k)
        k is 3 or 1.
    bias : ndarray (C_out,)
    n_images : int or None
        With None, no statistics are computed.
    start : ndarray (n_blocks, C_out, h // stride, w // stride, LANES) or None
        What the products are added to, instead of the bias.
    stride : {1, 2}
        2 is with the average pool behind it. The mean of four outputs is what the filter makes of means of
        four inputs: it passes over the means of all squares of 2x2, in steps of 2.
    y : ndarray like `start`, or None
        Where the result is written; it may be `start`.
    exact_zeros : bool
        See `conv2d_forward`. Winograd's algorithm, which is faster, cannot promise it.

    Returns
    -------
    y : ndarray (n_blocks, C_out, h // stride, w // stride, LANES)
    statistics : ndarray (2, n_blocks, C_out), float64
        Of the blocks of y, for `norms.mean_and_variance`; of no blocks if nobody asks.
    """
    shape, started = pooled_shape(z.shape[1:4], epilogue.pool), start is not None
    if y is None:
        y = empty((len(z), len(weight), shape[1] // stride, shape[2] // stride, LANES), z.dtype)
    statistics = np.empty((2, 0 if n_images is None else len(z), len(weight)))
    by_winograd = not (stride > 1 or exact_zeros) and pays(weight, shape)
    filters = side_by_side(weight, bias, SHORT if by_winograd else CHANNELS)
    sums = workspaces("sums", (len(filters.bias), 3, LANES), z.dtype)
    nontemporal = y.nbytes > NONTEMPORAL_BYTES and y.ctypes.data % ALIGNMENT == 0
    start = start if started else y
    if by_winograd:
        workspace = winograd_workspace(shape, filters, sums)
        output = Output(y, start, started, nontemporal)
        winograd_blocks(z, epilogue, filters, n_images or 0, output, statistics, workspace)
    else:
        workspace = Workspace(padded_workspace(shape, weight.shape[2] + stride - 1, stride, z.dtype), sums)
        conv2d_blocks(z, epilogue, filters, start, started, stride, nontemporal, n_images or 0, y, statistics,
                      workspace)
    return y, statistics


@parallel_kernel
def conv2d_blocks(z, epilogue, filters, start, started, stride, nontemporal, n_images, y, statistics,
                  workspace):
    # z (n_blocks, C_in, H, W, LANES), which the epilogue makes (n_blocks, C_in, h, w, LANES) of
    # filters: weight (C_in, k, k, C), bias (C,), with C_out rounded up to C
    # y, start (n_blocks, C_out, h / stride, w / stride, LANES)
    # started: begin with start, not with the bias; nontemporal: write y past the caches
    # statistics (2, n_blocks, C_out), or of no blocks if nobody asks: see `norms.py`
    # workspace: padded (n_workspaces, C_in, rows, columns, LANES), sums (n_workspaces, C, 3, LANES)
    # Every view of an array and every call with one adds to the array's count of users. There is one count,
    # and threads that change it wait for each other. So views are made here, not in the loop over blocks,
    # and each thread gets all its blocks in one call.
    padded = workspace.padded
    flat = Flat(z.reshape(len(z), -1, LANES),
                padded.reshape(len(padded), padded.shape[1], -1, LANES),
                start.reshape(len(start), start.shape[1], -1, LANES),
                y.reshape(len(y), y.shape[1], -1, LANES))
    for thread in prange(n_threads_of(padded)):
        conv2d_share(workspace_of(thread), z, flat, epilogue, filters, started, stride, nontemporal,
                     n_images, y.shape[2:4], statistics, workspace)


@kernel
def conv2d_share(t, z, flat, epilogue, filters, started, stride, nontemporal, n_images, shape, statistics,
                 workspace):
    # the blocks of the thread with workspace t: arguments as in `conv2d_blocks`
    # flat: views z (n_blocks, n, LANES), x (n_workspaces, C_in, rows * columns, LANES),
    # start, y (n_blocks, C_out, n_pixels, LANES); shape is (h, w) of y
    padded, sums = workspace.padded, workspace.sums
    size, (height, width), columns = filters.weight.shape[1], shape, padded.shape[3]
    margin, n_rows = (size - 1) // 2, (padded.shape[2] - size + 1) // stride
    n_tiles, is_counted = sums.shape[1] // CHANNELS, statistics.shape[1] > 0
    begin, stop = block_range(t, len(padded), len(z))
    for b in range(begin, stop):
        n_lanes = min(n_images - b * LANES, LANES) if is_counted else 0
        is_real, nothing = first_lanes(n_lanes, sums.dtype.type(1)), broadcast(sums.dtype.type(0))
        ahead, part = min(b + 1, stop - 1), 0
        part_size = prefetch_size(flat.z, n_tiles * max(1, height * width // PIXELS), b + 1 < stop)
        for first in range(0, height, n_rows):  # strip by strip
            load_padded(z, b, 0, z.shape[1], epilogue, 0, stride * first - margin, margin, padded, t,
                        stride == 1 and n_rows >= height and b > begin, stride == 2)
            end = min(first + n_rows, height) * width
            for p in range(first * width, end, PIXELS):
                pixels, counts = (p, min(p + 1, end - 1)), (is_real, is_real if p + 1 < end else nothing)
                at = (inside(pixels[0], first, width, stride, columns),
                      inside(pixels[1], first, width, stride, columns))
                for o in range(0, CHANNELS * n_tiles, CHANNELS):
                    prefetch_part(flat.z, ahead, part, part_size)
                    part += 1
                    tile = conv2d_tile(flat, b, t, ahead, at, columns, filters, started, o, pixels)
                    store_tile(flat.y, b, o, pixels, nontemporal, tile)
                    if is_counted:
                        count_tile(sums, t, o, p == 0, counts, tile)
        if is_counted:
            around_means(sums, t, height * width * n_lanes, statistics, b)
    store_fence()


@formula
def inside(p, first, width, stride, columns):
    """Return where the filter for output pixel p begins in the strip from row `first` on, flat."""
    h, w = divmod(p, width)
    return stride * ((h - first) * columns + w)


@formula
def conv2d_tile(flat, b, t, ahead, at, columns, filters, started, o, pixels):
    """Return the output channels from o on of two pixels, a tile.

    With 8 channels these are 16 sums: 2 pixels and 8 weights read from memory serve 16 multiplications.
    """
    # flat.x (n_workspaces, C_in, rows * columns, LANES), flat.start (n_blocks, C_out, n_pixels, LANES)
    weight, y = filters.weight, bias_tile(filters.bias, o)
    if started:
        y = load_tile(flat.start, b, o, pixels)
        prefetch_tile(flat.start, ahead, o, pixels)
    if weight.shape[1] == 3:  # a constant, for loops that can be unrolled
        return plus_taps(flat.x, t, at, columns, weight, o, 3, y)
    return plus_taps(flat.x, t, at, columns, weight, o, weight.shape[1], y)


@formula
def plus_taps(x, t, at, columns, weight, o, size, y):
    """Return a tile plus all weights times the pixels that they see."""
    # x (n_workspaces, C_in, rows * columns, LANES), weight (C_in, size, size, C)
    for i in range(weight.shape[0]):
        for kh in range(size):
            for kw in range(size):
                tap = kh * columns + kw
                pair = load_pair(x, t, i, (at[0] + tap, at[1] + tap))
                y = plus_products(weight, (i, kh, kw), o, pair, y)
    return y


@formula
def count_two(sums, t, o, is_first, counts, tile):
    """Add a tile to the sums of its channels: see `count_pixels`."""
    count_pixels(sums, t, o, is_first, counts, tile[0])
    count_pixels(sums, t, o + 1, is_first, counts, tile[1])


@formula
def count_eight(sums, t, o, is_first, counts, tile):
    """Add the same for a tile of 8 channels."""
    count_pixels(sums, t, o, is_first, counts, tile[0])
    count_pixels(sums, t, o + 1, is_first, counts, tile[1])
    count_pixels(sums, t, o + 2, is_first, counts, tile[2])
    count_pixels(sums, t, o + 3, is_first, counts, tile[3])
    count_pixels(sums, t, o + 4, is_first, counts, tile[4])
    count_pixels(sums, t, o + 5, is_first, counts, tile[5])
    count_pixels(sums, t, o + 6, is_first, counts, tile[6])
    count_pixels(sums, t, o + 7, is_first, counts, tile[7])


count_tile = count_eight if WIDE else count_two


def conv2d_backward(x, weight, dy, wants_dx=True):
    """Return the gradients (dx, dweight, dbias) of conv2d_forward; dx is None if nobody wants it."""
    # dx is a convolution of dy with the filters turned by 180 degrees; nobody asks for exact zeros in it
    dy = computed(dy)
    turned = np.ascontiguousarray(weight[:, :, ::-1, ::-1].swapaxes(0, 1))
    dx = conv2d_before_norm(dy, turned, np.zeros(len(turned), dy.dtype)) if wants_dx else None
    dweight = scratch("dweight", (len(dy), *weight.shape), dy.dtype)
    dbias = np.empty((len(dy), len(weight)))
    padded = padded_workspace(x.shape[1:4], 3, 1, dy.dtype, strips=False)
    conv2d_weight_blocks(*deferred(x), dy, dweight, dbias, padded)
    return dx, add_blocks(dweight, dy.dtype), add_blocks(dbias, dy.dtype)


@parallel_kernel
def conv2d_weight_blocks(x, epilogue, dy, dweight, dbias, padded):
    # x, which the epilogue makes (n_blocks, C_in, H, W, LANES) of; dy (n_blocks, C_out, H, W, LANES)
    # dweight (n_blocks, C_out, C_in, k, k), dbias (n_blocks, C_out)
    # padded (n_workspaces, C_in, rows, columns, LANES) as for 3x3
    dy_flat = dy.reshape(len(dy), dy.shape[1], -1, LANES)
    for thread in prange(n_threads_of(padded)):
        conv2d_weight_share(workspace_of(thread), x, epilogue, dy, dy_flat, dweight, dbias, padded)


@kernel
def conv2d_weight_share(t, x, epilogue, dy, dy_flat, dweight, dbias, padded):
    # the blocks of the thread with workspace t: arguments as in `conv2d_weight_blocks`
    margin, (start, stop) = (dweight.shape[3] - 1) // 2, block_range(t, len(padded), len(x))
    for b in range(start, stop):
        load_padded(x, b, 0, x.shape[1], epilogue, 0, -margin, margin, padded, t, b > start, False)
        for o in range(0, dweight.shape[1], 4):
            for i in range(0, dweight.shape[2], 2):
                for kh in range(dweight.shape[3]):
                    conv2d_weight_tile(padded, t, dy, dweight, b, o, i, kh)
        for o in range(dbias.shape[1]):
            dbias[b, o] = deviations(dy_flat, b, o, dy.dtype.type(0), False)


@kernel
def conv2d_weight_tile(padded, t, dy, dweight, b, o, i, kh):
    # padded (n_workspaces, C_in, rows, columns, LANES), dy (n_blocks, C_out, H, W, LANES)
    # dweight (n_blocks, C_out, C_in, k, k)
    # Row kh of the filters of 4 output and 2 input channels, 24 sums, from three neighbours of both input
    # channels, u and v. (Of 1x1 filters only the first of three is used.)
    o1, o2, o3 = min(o + 1, dy.shape[1] - 1), min(o + 2, dy.shape[1] - 1), min(o + 3, dy.shape[1] - 1)
    i1, zero = min(i + 1, padded.shape[1] - 1), broadcast(padded.dtype.type(0))
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
    dweight[b, o, i, kh, 0] = sum_lanes(totals[0])
    if dweight.shape[4] == 3:
        dweight[b, o, i, kh, 1], dweight[b, o, i, kh, 2] = sum_lanes(totals[1]), sum_lanes(totals[2])
