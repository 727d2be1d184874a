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

Images are packed as drawn in `__init__.py`. Tiles are computed one by one: the values of one at its points
just fit into the first-level cache (16 channels: 37 KB).
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
from .norms import around_means, first_sums, plus_pixels
from .tiles import (
    TALL,
    padded_workspace,
    plus_short,
    plus_tall,
    prefetch_part,
    prefetch_size,
    short_of,
    store_short,
    store_tall,
    tall_of,
)

# what `winograd_blocks` writes, and what it begins with if it is started
Output = namedtuple("Output", "y start started nontemporal")
# of all threads, see `winograd_blocks`
Workspace = namedtuple("Workspace", "filters_at points products rows padded sums")

SIDE, SIX, POINTS = 4, 6, 36  # outputs of a tile are SIDE x SIDE, points SIX x SIX
AT_ONCE = 16  # output channels that go from products to outputs together, at the most
P, Q = 2 / 3, 3 / 2  # points, with P Q = 1; the others are -P, -Q, 0 and infinity
P2, P3, Q2, Q3, PQ = P**2, P**3, Q**2, Q**3, P**2 + Q**2


def filter_points():
    """Return G (6, 3): of each point 1, x, x**2, over the product of its distances to the others."""
    rows = [[1, 0, 0], [0, 0, 1]]
    for x, other in (P, Q), (-P, Q), (Q, P), (-Q, P):
        rows.append(x ** np.arange(3) / (2 * x * x * (x**2 - other**2)))
    return np.array(rows)


G = filter_points()


def pays(weight, shape):
    """Return whether filters (C_out, C_in, k, k) take less time this way on maps (C, H, W).

    They need to be 3x3. To pay for B and A, more than 9 of the 16 outputs of a tile have to be wanted, on
    average, which means less than 4/9 of the multiplications.
    """
    n_tiles = -(-shape[1] // SIDE) * -(-shape[2] // SIDE)
    return weight.shape[2] == 3 and min(weight.shape[:2]) >= 8 and 9 * n_tiles < shape[1] * shape[2]


def winograd_workspace(shape, filters, sums):
    """Return the Workspace of `winograd_blocks` for maps (C, H, W) and filters side by side."""
    n_in, _, _, n_out = filters.weight.shape
    whole_tiles = n_in, *(SIDE * -(-n // SIDE) for n in shape[1:])
    # the number of channels is odd, for what lies apart by a power of two competes for places in the cache
    arrays = (workspaces("filters", (POINTS, n_in, n_out), sums.dtype),
              workspaces("points", (POINTS, n_in | 1, LANES), sums.dtype),
              workspaces("products", (SIX, AT_ONCE | 1, LANES), sums.dtype),
              workspaces("rows", (SIX, AT_ONCE | 1, SIDE, LANES), sums.dtype))
    padded = padded_workspace(whole_tiles, SIDE + 2, SIDE, sums.dtype)
    return Workspace(*(array.reshape(-1, *array.shape[2:]) for array in arrays), padded, sums)


@parallel_kernel
def winograd_blocks(z, epilogue, filters, n_images, output, statistics, workspace):
    # z, epilogue, filters, output (with y and start), statistics as in `conv2d_blocks`
    # workspace: filters_at (n_workspaces * 36, C_in, C), points (n_workspaces * 36, at least C_in, LANES)
    # products (n_workspaces * 6, at least 16, LANES), rows (n_workspaces * 6, at least 16, 4, LANES)
    # padded (n_workspaces, C_in, rows, columns, LANES), sums (n_workspaces, C, 3, LANES)
    z_flat = z.reshape(len(z), -1, LANES)  # see `conv2d_blocks`
    for thread in prange(n_threads_of(workspace.padded)):
        winograd_share(workspace_of(thread), z, z_flat, epilogue, filters, n_images, output, statistics,
                       workspace)


@kernel
def winograd_share(t, z, z_flat, epilogue, filters, n_images, output, statistics, workspace):
    # the blocks of the thread with workspace t: arguments as in `winograd_blocks`
    # z_flat is z (n_blocks, n, LANES)
    filters_at, points, products, rows, padded, sums = workspace
    y = output.y
    filters_at_points(filters.weight, G, t, filters_at)  # each thread for itself: they are soon made
    height, width = -(-y.shape[2] // SIDE), -(-y.shape[3] // SIDE)  # in tiles
    n_rows, n_channels = (padded.shape[2] - 2) // SIDE, filters_at.shape[2]
    n_parts = POINTS * height * width * -(-n_channels // AT_ONCE)
    start, stop = block_range(t, len(padded), len(z))
    for b in range(start, stop):
        n_lanes = min(n_images - b * LANES, LANES) if statistics.shape[1] > 0 else 0  # 0: nobody counts
        ahead, part, part_size = b + 1, 0, prefetch_size(z_flat, n_parts, b + 1 < stop)
        for first in range(0, height, n_rows):  # strip by strip
            load_padded(z, b, 0, z.shape[1], epilogue, 0, SIDE * first - 1, 1, padded, t,
                        n_rows >= height and b > start, False)
            for h in range(first, min(first + n_rows, height)):
                for w in range(width):
                    inputs_to_points(padded, t, h - first, w, points)
                    for o in range(0, n_channels, AT_ONCE):
                        for row in range(SIX):
                            products_to_rows(points, filters_at, row, o, t, products, rows, z_flat, ahead,
                                             part, part_size)
                            part += SIX
                        rows_to_outputs(rows, t, h, w, o, filters.bias, n_lanes, output, b, sums)
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
    zero, infinity = values_at_ends(d[0], d[1], d[2], d[3], d[4], d[5])
    p, minus_p = values_at_pair(P, d[1], d[2], d[3], d[4])
    q, minus_q = values_at_pair(Q, d[1], d[2], d[3], d[4])
    return zero, infinity, p, minus_p, q, minus_q


@formula
def values_at_ends(d0, d1, d2, d3, d4, d5):
    """Return what six inputs are at the points 0 and infinity."""
    return add(d0, multiply_add(-PQ, d2, d4)), add(d1, multiply_add(-PQ, d3, d5))


@formula
def values_at_pair(x, d1, d2, d3, d4):
    """Return what six inputs, the inner four of them, are at the points x and -x."""
    even, odd = multiply_add(-1 / x**2, d2, d4), multiply_add(-1 / x**2, d1, d3)
    return multiply_add(x, odd, even), multiply_add(-x, odd, even)


@formula
def outputs_from_points(m):
    """Return A^T m: six points to four outputs."""
    sum_p, difference_p = add(m[2], m[3]), multiply_add(-1, m[3], m[2])
    sum_q, difference_q = add(m[4], m[5]), multiply_add(-1, m[5], m[4])
    return (add(m[0], add(sum_p, sum_q)),
            multiply_add(P, difference_p, multiply(Q, difference_q)),
            multiply_add(P2, sum_p, multiply(Q2, sum_q)),
            multiply_add(P3, difference_p, multiply_add(Q3, difference_q, m[1])))


@kernel
def inputs_to_points(padded, t, i, j, points):
    # padded (n_workspaces, C_in, rows, columns, LANES), points (n_workspaces * 36, C_in, LANES)
    # of the inputs of the tile in row i and column j of the strip
    # First down each column, to two points at a time: there are not as many registers as 36 values.
    p, h, w = POINTS * t, SIDE * i, SIDE * j
    for c in range(padded.shape[1]):
        store_two_rows(points, p, c, columns_at_ends(padded, t, c, h, w))
        store_two_rows(points, p + 2 * SIX, c, columns_at_pair(P, padded, t, c, h, w))
        store_two_rows(points, p + 4 * SIX, c, columns_at_pair(Q, padded, t, c, h, w))


@formula
def columns_at_ends(x, t, c, h, w):
    """Return what six columns are at the points 0 and infinity."""
    a0, b0 = column_at_ends(x, t, c, h, w)
    a1, b1 = column_at_ends(x, t, c, h, w + 1)
    a2, b2 = column_at_ends(x, t, c, h, w + 2)
    a3, b3 = column_at_ends(x, t, c, h, w + 3)
    a4, b4 = column_at_ends(x, t, c, h, w + 4)
    a5, b5 = column_at_ends(x, t, c, h, w + 5)
    return (a0, a1, a2, a3, a4, a5), (b0, b1, b2, b3, b4, b5)


@formula
def column_at_ends(x, t, c, h, w):
    """Return the same of one column."""
    return values_at_ends(load(x, (t, c, h, w)), load(x, (t, c, h + 1, w)), load(x, (t, c, h + 2, w)),
                          load(x, (t, c, h + 3, w)), load(x, (t, c, h + 4, w)), load(x, (t, c, h + 5, w)))


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
def store_two_rows(points, p, c, columns):
    """Store what two rows of six values are at the points."""
    store_six(points, p, c, values_at_points(columns[0]))
    store_six(points, p + SIX, c, values_at_points(columns[1]))


@formula
def store_six(points, p, c, values):
    """Store the values at points p to p + 5."""
    store(points, (p, c), values[0])
    store(points, (p + 1, c), values[1])
    store(points, (p + 2, c), values[2])
    store(points, (p + 3, c), values[3])
    store(points, (p + 4, c), values[4])
    store(points, (p + 5, c), values[5])


@kernel
def products_to_rows(points, filters_at, row, o, t, products, rows, z_flat, ahead, part, part_size):
    # points (n_workspaces * 36, C_in, LANES), filters_at (n_workspaces * 36, C_in, C)
    # products (n_workspaces * 6, 16, LANES), rows (n_workspaces * 6, 16, 4, LANES)
    # A matrix product at each point, of up to 16 output channels from o on -> four outputs of a row of points
    zero, n_channels = broadcast(filters_at.dtype.type(0)), min(AT_ONCE, filters_at.shape[2] - o)
    for j in range(SIX):
        prefetch_part(z_flat, ahead, part, part_size)
        part += 1
        point = POINTS * t + SIX * row + j
        for c in range(0, n_channels, TALL):
            if n_channels - c >= TALL:
                y = tall_of(zero)
                for k in range(filters_at.shape[1]):
                    y = plus_tall(filters_at, (point, k), o + c, load(points, (point, k)), y)
                store_tall(products, SIX * t + j, c, y)
            else:
                y = short_of(zero)
                for k in range(filters_at.shape[1]):
                    y = plus_short(filters_at, (point, k), o + c, load(points, (point, k)), y)
                store_short(products, SIX * t + j, c, y)
    for c in range(n_channels):
        store_four(rows, SIX * t + row, c, outputs_from_points(six_values(products, SIX * t, (c,))))


@formula
def six_values(x, p, at):
    """Return the values at six points, x[p : p + 6, *at]."""
    return (load(x, (p, *at)), load(x, (p + 1, *at)), load(x, (p + 2, *at)),
            load(x, (p + 3, *at)), load(x, (p + 4, *at)), load(x, (p + 5, *at)))


@formula
def store_four(rows, p, c, outputs):
    """Store four outputs of a row of points."""
    store(rows, (p, c, 0), outputs[0])
    store(rows, (p, c, 1), outputs[1])
    store(rows, (p, c, 2), outputs[2])
    store(rows, (p, c, 3), outputs[3])


@kernel
def rows_to_outputs(rows, t, i, j, first, bias, n_lanes, output, b, sums):
    # rows (n_workspaces * 6, 16, 4, LANES) of the tile in row i and column j
    # -> output.y[b] (C_out, h, w, LANES), 16 channels from `first` on
    # sums (n_workspaces, C, 3, LANES); n_lanes hold images, 0 if nothing is counted
    y, start, started, nontemporal = output
    h, w = SIDE * i, SIDE * j
    height, width = min(SIDE, y.shape[2] - h), min(SIDE, y.shape[3] - w)
    is_real, none = first_lanes(n_lanes, y.dtype.type(1)), broadcast(y.dtype.type(0))
    upper = is_real, is_real if height > 1 else none
    lower = is_real if height > 2 else none, is_real if height > 3 else none
    for o in range(first, min(first + AT_ONCE, y.shape[1])):
        center, total, squares = load(sums, (t, o, 0)), load(sums, (t, o, 1)), load(sums, (t, o, 2))
        for k in range(width):
            v0, v1, v2, v3 = outputs_from_points(six_values(rows, SIX * t, (o - first, k)))
            v0 = put_in_place(y, start, started, nontemporal, b, o, h, w + k, bias, v0)
            if height > 1:
                v1 = put_in_place(y, start, started, nontemporal, b, o, h + 1, w + k, bias, v1)
            if height > 2:
                v2 = put_in_place(y, start, started, nontemporal, b, o, h + 2, w + k, bias, v2)
            if height > 3:
                v3 = put_in_place(y, start, started, nontemporal, b, o, h + 3, w + k, bias, v3)
            if n_lanes > 0:
                if h + w + k == 0:
                    center, total, squares = first_sums(upper, (v0, v1))
                total, squares = plus_pixels(upper, (v0, v1), center, total, squares)
                total, squares = plus_pixels(lower, (v2, v3), center, total, squares)
        store(sums, (t, o, 0), center)
        store(sums, (t, o, 1), total)
        store(sums, (t, o, 2), squares)


@formula
def put_in_place(y, start, started, nontemporal, b, o, h, w, bias, value):
    """Write y[b, o, h, w], and return it."""
    if started:
        value = add(value, load(start, (b, o, h, w)))
        prefetch(start, (min(b + 1, len(y) - 1), o, h, w))
    else:
        value = add(value, broadcast(bias[o]))
    if nontemporal:
        store_nontemporal(y, (b, o, h, w), value)
    else:
        store(y, (b, o, h, w), value)
    return value
