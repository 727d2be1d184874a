"""The convolution with 3x3 filters from a quarter of its multiplications: Winograd's algorithm.

A row of 4 outputs of a filter of 3 weights takes 12 multiplications of 6 inputs, and 6 are enough. The idea:
the coefficients of a product of two polynomials, one of 4 and one of 3 coefficients, are sums of 12 products,
but such a polynomial is known from its values at 6 points, and a value of a product is one multiplication.
Read from back to front (transposed), the same holds for the filter. In two dimensions, for a tile of 4x4
outputs that 6x6 inputs d make with a filter g, 36 multiplications take the place of 144:

    outputs = A^T [(G g G^T) * (B^T d B)] A         (* number by number; Lavin and Gray, arXiv 1509.09308)

    inputs (C_in, 6, 6)  -- B -->  (36 points, C_in)
                                          | times filters (C_in, C_out) at each of the 36 points
    outputs (C_out, 4, 4) <-- A -- (36 points, C_out)

B and A only cost additions and a few multiplications for each channel, which all the others share. The points
are 0, 2/3, -2/3, 3/2, -3/2 and infinity: with them float32 loses little (an error of 4e-7 of the outputs'
standard deviation, of which the direct way has 2e-7). But a filter that sees only zeros gives a number that
is not exactly zero, if the rest of its tile is not zero.

Images are packed as drawn in `__init__.py`. Two tiles are computed at once, as two pixels are in
`convolution.py`.
"""

from collections import namedtuple

import numpy as np
from numba import prange

from ..compiling import formula, kernel, parallel_kernel
from .fusion import load_padded
from .lanes import (
    LANES,
    add,
    broadcast,
    first_lanes,
    load,
    multiply,
    multiply_add,
    prefetch,
    store,
    store_fence,
    store_nontemporal,
)
from .memory import block_range, n_threads_of, workspace_of, workspaces
from .norms import around_means, count_pixels
from .tiles import (
    CHANNELS,
    PIXELS,
    bias_tile,
    load_pair,
    padded_workspace,
    plus_products,
    prefetch_part,
    prefetch_size,
    store_tile,
)

# what `winograd_blocks` writes, and what it begins with if it is started
Output = namedtuple("Output", "y start started nontemporal")
# of all threads, see `winograd_blocks`
Workspace = namedtuple("Workspace", "filters_at padded points products sums")

SIDE, POINTS = 4, 36  # outputs of a tile are SIDE x SIDE
AT_ONCE = 8  # output channels that are made of the values at the points
P, Q = 2 / 3, 3 / 2  # points, with P Q = 1; the others are -P, -Q, 0 and infinity
P2, P3, Q2, Q3, PQ = P**2, P**3, Q**2, Q**3, P**2 + Q**2


def filter_points():
    """Return G (6, 3): of each point 1, x, x**2, over the product of its distances to the others."""
    rows = [[1, 0, 0]]
    for x, other in (P, Q), (-P, Q), (Q, P), (-Q, P):
        rows.append(x ** np.arange(3) / (2 * x * x * (x**2 - other**2)))
    return np.array([*rows, [0, 0, 1]])


G = filter_points()


def pays(weight, shape):
    """Return whether filters (C_out, C_in, k, k) take less time this way on maps (C, H, W).

    They need to be 3x3, and the multiplications to become half as many, to pay for B and A.
    """
    n_tiles = -(-shape[1] // SIDE) * -(-shape[2] // SIDE)
    n_points = POINTS * (n_tiles + -n_tiles % PIXELS)
    return weight.shape[2] == 3 and min(weight.shape[:2]) >= 8 and 2 * n_points <= 9 * shape[1] * shape[2]


def winograd_workspace(shape, filters, sums):
    """Return the Workspace of `winograd_blocks` for maps (C, H, W) and filters side by side."""
    n_in, _, _, n_out = filters.weight.shape
    whole_tiles = n_in, *(SIDE * -(-n // SIDE) for n in shape[1:])
    # the number of channels is odd, for what lies apart by a power of two competes for places in the cache
    arrays = (workspaces("filters", (POINTS, n_in, n_out), sums.dtype),
              workspaces("points", (POINTS, n_in | 1, PIXELS, LANES), sums.dtype),
              workspaces("products", (POINTS, AT_ONCE + 1, PIXELS, LANES), sums.dtype))
    filters_at, points, products = (array.reshape(-1, *array.shape[2:]) for array in arrays)
    padded = padded_workspace(whole_tiles, SIDE + 2, SIDE, sums.dtype)
    return Workspace(filters_at, padded, points, products, sums)


@parallel_kernel
def winograd_blocks(z, epilogue, filters, n_images, output, statistics, workspace):
    # z, epilogue, filters, output (with y and start), statistics as in `conv2d_blocks`
    # workspace: filters_at (n_workspaces * 36, C_in, C), padded (n_workspaces, C_in, rows, columns, LANES)
    # points (n_workspaces * 36, at least C_in, 2, LANES), products (n_workspaces * 36, at least 8, 2, LANES)
    # sums (n_workspaces, C, 3, LANES)
    z_flat = z.reshape(len(z), -1, LANES)  # see `conv2d_blocks`
    for thread in prange(n_threads_of(workspace.padded)):
        winograd_share(workspace_of(thread), z, z_flat, epilogue, filters, n_images, output, statistics,
                       workspace)


@kernel
def winograd_share(t, z, z_flat, epilogue, filters, n_images, output, statistics, workspace):
    # the blocks of the thread with workspace t: arguments as in `winograd_blocks`
    # z_flat is z (n_blocks, n, LANES)
    filters_at, padded, points, products, sums = workspace
    y = output.y
    filters_at_points(filters.weight, G, t, filters_at)  # each thread for itself: they are soon made
    height, width = -(-y.shape[2] // SIDE), -(-y.shape[3] // SIDE)  # in tiles
    n_rows, n_channels = (padded.shape[2] - 2) // SIDE, filters_at.shape[2]
    n_parts = POINTS * max(1, height * width // PIXELS) * n_channels // AT_ONCE
    start, stop = block_range(t, len(padded), len(z))
    for b in range(start, stop):
        n_lanes = min(n_images - b * LANES, LANES) if statistics.shape[1] > 0 else 0  # 0: nobody counts
        ahead, part, part_size = b + 1, 0, prefetch_size(z_flat, n_parts, b + 1 < stop)
        for first in range(0, height, n_rows):  # strip by strip
            load_padded(z, b, 0, z.shape[1], epilogue, 0, SIDE * first - 1, 1, padded, t,
                        n_rows >= height and b > start, False)
            n_tiles = min(n_rows, height - first) * width
            for tile in range(0, n_tiles, PIXELS):
                here, other = divmod(tile, width), divmod(min(tile + 1, n_tiles - 1), width)
                inputs_to_points(padded, t, here, other, points)
                for o in range(0, n_channels, AT_ONCE):
                    products_at_points(points, filters_at, o, t, products, z_flat, ahead, part, part_size)
                    part += POINTS
                    points_to_outputs(products, t)
                    put_in_place(products, t, 0, o, here, first, filters.bias, n_lanes, output, b, sums)
                    if tile + 1 < n_tiles:
                        put_in_place(products, t, 1, o, other, first, filters.bias, n_lanes, output, b, sums)
        if n_lanes > 0:
            around_means(sums, t, y.shape[2] * y.shape[3] * n_lanes, statistics, b)
    store_fence()


@kernel
def filters_at_points(weight, g, t, filters_at):
    # weight (C_in, 3, 3, C), g (6, 3)
    # filters_at (n_workspaces * 36, C_in, C) = g @ weight @ g.T, filter by filter
    for i in range(len(g)):
        for j in range(len(g)):
            for c in range(weight.shape[0]):
                for o in range(weight.shape[3]):
                    total = 0.0
                    for kh in range(3):
                        for kw in range(3):
                            total += g[i, kh] * g[j, kw] * weight[c, kh, kw, o]
                    filters_at[POINTS * t + len(g) * i + j, c, o] = total


@formula
def values_at_points(d):
    """Return B^T d: six inputs, as coefficients, to six points."""
    p, minus_p = values_at_pair(P, d[1], d[2], d[3], d[4])
    q, minus_q = values_at_pair(Q, d[1], d[2], d[3], d[4])
    return value_at_end(d[0], d[2], d[4]), p, minus_p, q, minus_q, value_at_end(d[1], d[3], d[5])


@formula
def value_at_end(d0, d2, d4):
    """Return what six inputs, every second of them, are at the point 0, or at infinity."""
    return add(d0, multiply_add(-PQ, d2, d4))


@formula
def values_at_pair(x, d1, d2, d3, d4):
    """Return what six inputs, the inner four of them, are at the points x and -x."""
    even, odd = multiply_add(-1 / x**2, d2, d4), multiply_add(-1 / x**2, d1, d3)
    return multiply_add(x, odd, even), multiply_add(-x, odd, even)


@formula
def outputs_from_points(m):
    """Return A^T m: six points to four outputs."""
    sum_p, difference_p = add(m[1], m[2]), multiply_add(-1, m[2], m[1])
    sum_q, difference_q = add(m[3], m[4]), multiply_add(-1, m[4], m[3])
    return (add(m[0], add(sum_p, sum_q)),
            multiply_add(P, difference_p, multiply(Q, difference_q)),
            multiply_add(P2, sum_p, multiply(Q2, sum_q)),
            multiply_add(P3, difference_p, multiply_add(Q3, difference_q, m[5])))


@kernel
def inputs_to_points(padded, t, here, other, points):
    # padded (n_workspaces, C_in, rows, columns, LANES), points (n_workspaces * 36, C_in, 2, LANES)
    # of the inputs of two tiles; here and other are their row and column among the tiles of the strip
    # First down each column, for one or two points at a time: there are not as many registers as 36 values.
    p = POINTS * t
    for j in range(PIXELS):
        row, column = here if j == 0 else other
        h, w = SIDE * row, SIDE * column
        for c in range(padded.shape[1]):
            store_six(points, p, c, j, values_at_points(columns_at_end(padded, t, c, h, w)))
            v, minus_v = columns_at_pair(P, padded, t, c, h, w)
            store_six(points, p + 6, c, j, values_at_points(v))
            store_six(points, p + 12, c, j, values_at_points(minus_v))
            v, minus_v = columns_at_pair(Q, padded, t, c, h, w)
            store_six(points, p + 18, c, j, values_at_points(v))
            store_six(points, p + 24, c, j, values_at_points(minus_v))
            store_six(points, p + 30, c, j, values_at_points(columns_at_end(padded, t, c, h + 1, w)))


@formula
def columns_at_end(x, t, c, h, w):
    """Return what six columns are at the point 0; with h one greater, at infinity."""
    return (column_at_end(x, t, c, h, w), column_at_end(x, t, c, h, w + 1),
            column_at_end(x, t, c, h, w + 2), column_at_end(x, t, c, h, w + 3),
            column_at_end(x, t, c, h, w + 4), column_at_end(x, t, c, h, w + 5))


@formula
def column_at_end(x, t, c, h, w):
    """Return the same of one column."""
    return value_at_end(load(x, (t, c, h, w)), load(x, (t, c, h + 2, w)), load(x, (t, c, h + 4, w)))


@formula
def columns_at_pair(point, x, t, c, h, w):
    """Return what six columns are at a point, and at minus that point."""
    a0, b0 = column_at_pair(point, x, t, c, h, w)
    a1, b1 = column_at_pair(point, x, t, c, h, w + 1)
    a2, b2 = column_at_pair(point, x, t, c, h, w + 2)
    a3, b3 = column_at_pair(point, x, t, c, h, w + 3)
    a4, b4 = column_at_pair(point, x, t, c, h, w + 4)
    a5, b5 = column_at_pair(point, x, t, c, h, w + 5)
    return (a0, a1, a2, a3, a4, a5), (b0, b1, b2, b3, b4, b5)


@formula
def column_at_pair(point, x, t, c, h, w):
    """Return the same of one column."""
    return values_at_pair(point, load(x, (t, c, h + 1, w)), load(x, (t, c, h + 2, w)),
                          load(x, (t, c, h + 3, w)), load(x, (t, c, h + 4, w)))


@formula
def store_six(points, p, c, j, values):
    """Store the values at points p to p + 5."""
    store(points, (p, c, j), values[0])
    store(points, (p + 1, c, j), values[1])
    store(points, (p + 2, c, j), values[2])
    store(points, (p + 3, c, j), values[3])
    store(points, (p + 4, c, j), values[4])
    store(points, (p + 5, c, j), values[5])


@kernel
def products_at_points(points, filters_at, o, t, products, z_flat, ahead, part, part_size):
    # points (n_workspaces * 36, C_in, 2, LANES), filters_at (n_workspaces * 36, C_in, C)
    # products (n_workspaces * 36, 8, 2, LANES)
    # A matrix product at each point, by tiles as in `conv2d_tile`: of output channels o to o + 7
    zero = filters_at.dtype.type(0)
    zeros = zero, zero, zero, zero, zero, zero, zero, zero
    for p in range(POINTS * t, POINTS * t + POINTS):
        prefetch_part(z_flat, ahead, part, part_size)
        part += 1
        for c in range(0, AT_ONCE, CHANNELS):
            y = bias_tile(zeros, 0)
            for i in range(filters_at.shape[1]):
                y = plus_products(filters_at, (p, i), o + c, load_pair(points, p, i, (0, 1)), y)
            store_tile(products, p, c, (0, 1), False, y)


@kernel
def points_to_outputs(products, t):
    # products (n_workspaces * 36, 8, 2, LANES)
    # The first 16 of the 36 become the outputs of a tile, row by row.
    p = POINTS * t
    for c in range(AT_ONCE):
        for j in range(PIXELS):
            v0 = outputs_from_points(six_points(products, p, c, j))
            v1 = outputs_from_points(six_points(products, p + 1, c, j))
            v2 = outputs_from_points(six_points(products, p + 2, c, j))
            v3 = outputs_from_points(six_points(products, p + 3, c, j))
            v4 = outputs_from_points(six_points(products, p + 4, c, j))
            v5 = outputs_from_points(six_points(products, p + 5, c, j))
            put_four(products, p, c, j, outputs_from_points((v0[0], v1[0], v2[0], v3[0], v4[0], v5[0])))
            put_four(products, p + 4, c, j, outputs_from_points((v0[1], v1[1], v2[1], v3[1], v4[1], v5[1])))
            put_four(products, p + 8, c, j, outputs_from_points((v0[2], v1[2], v2[2], v3[2], v4[2], v5[2])))
            put_four(products, p + 12, c, j, outputs_from_points((v0[3], v1[3], v2[3], v3[3], v4[3], v5[3])))


@formula
def six_points(products, p, c, j):
    """Return the values at points p, p + 6, ..., p + 30."""
    return (load(products, (p, c, j)), load(products, (p + 6, c, j)), load(products, (p + 12, c, j)),
            load(products, (p + 18, c, j)), load(products, (p + 24, c, j)), load(products, (p + 30, c, j)))


@formula
def put_four(products, p, c, j, outputs):
    """Store four outputs in the places of points p to p + 3."""
    store(products, (p, c, j), outputs[0])
    store(products, (p + 1, c, j), outputs[1])
    store(products, (p + 2, c, j), outputs[2])
    store(products, (p + 3, c, j), outputs[3])


@kernel
def put_in_place(products, t, j, first_channel, tile, first, bias, n_lanes, output, b, sums):
    # products (n_workspaces * 36, 8, 2, LANES): 16 are the outputs of tile j, from channel `first_channel` on
    # -> output.y[b] (C_out, h, w, LANES) at a row and column of tiles, rows counted from `first` on
    # sums (n_workspaces, C, 3, LANES); n_lanes hold images, 0 if nothing is counted
    y, start, started, nontemporal = output
    ahead = min(b + 1, len(y) - 1)
    h, w = SIDE * (first + tile[0]), SIDE * tile[1]
    height, width = min(SIDE, y.shape[2] - h), min(SIDE, y.shape[3] - w)
    is_real, none = first_lanes(n_lanes, y.dtype.type(1)), broadcast(y.dtype.type(0))
    left = is_real, is_real if width > 1 else none
    right = is_real if width > 2 else none, is_real if width > 3 else none
    for i in range(height):
        p = POINTS * t + SIDE * i
        for o in range(first_channel, min(first_channel + AT_ONCE, y.shape[1])):
            c = o - first_channel
            for k in range(width):
                begin = broadcast(bias[o])
                if started:
                    begin = load(start, (b, o, h + i, w + k))
                    prefetch(start, (ahead, o, h + i, w + k))
                value = add(load(products, (p + k, c, j)), begin)
                store(products, (p + k, c, j), value)
                if nontemporal:
                    store_nontemporal(y, (b, o, h + i, w + k), value)
                else:
                    store(y, (b, o, h + i, w + k), value)
            if n_lanes > 0:
                pair = load(products, (p, c, j)), load(products, (p + 1, c, j))
                count_pixels(sums, t, o, h + w + i == 0, left, pair)
                pair = load(products, (p + 2, c, j)), load(products, (p + 3, c, j))
                count_pixels(sums, t, o, False, right, pair)
