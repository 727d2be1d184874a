"""The convolution with 3x3 filters from a quarter of its multiplications: Winograd's algorithm.

A row of 4 outputs of a filter of 3 weights takes 12 multiplications of 6 inputs, and 6 are enough. The idea:
the coefficients of a product of two polynomials, one of 4 and one of 3 coefficients, are sums of 12 products,
but such a polynomial is known from its values at 6 points, and a value of a product is one multiplication.
Read from back to front (transposed), the same holds for the filter. In two dimensions, for a tile of 4x4 outputs
that 6x6 inputs d make with a filter g, 36 multiplications take the place of 144:

    outputs = A^T [(G g G^T) * (B^T d B)] A         (* number by number; Lavin and Gray, arXiv 1509.09308)

    inputs (C_in, 6, 6)  -- B -->  (36 points, C_in)
                                          | times filters (C_in, C_out) at each of the 36 points
    outputs (C_out, 4, 4) <-- A -- (36 points, C_out)

B and A only cost additions and a few multiplications for each channel, which all the others share. The points
are 0, 2/3, -2/3, 3/2, -3/2 and infinity: with them float32 loses little (an error of 5e-7 of the outputs'
standard deviation, of which the direct way has 2e-7), and ones where others have to multiply.

Images are packed as drawn in `cpu.py`. Two tiles are computed at once, as two pixels are in `products.py`.
"""

import numpy as np
from numba import get_num_threads, get_thread_id, prange

from .compiling import formula, kernel, parallel_kernel
from .lanes import LANES, add, fill, first_lanes, load, multiply, multiply_add, settle, store, stream
from .memory import empty
from .norms import around_mean, count_pixels
from .products import CHANNELS, PIXELS, eight_pairs, fetch_part, load_pair, padded_scratch, plus_products, store_tile
from .tails import enter

SIDE, POINTS = 4, 36  # outputs of a tile are SIDE x SIDE
P, Q = 2 / 3, 3 / 2  # the points that are neither 0 nor infinite, and not negative
P2, P3, Q2, Q3, PQ = P**2, P**3, Q**2, Q**3, P**2 + Q**2


def filter_points():
    """Return G (6, 3): row by row the point's powers 1, x, x**2, over the product of its distances to the others."""
    rows = [[1, 0, 0]]
    for x, other in (P, Q), (-P, Q), (Q, P), (-Q, P):
        rows.append(x ** np.arange(3) / (2 * x * x * (x**2 - other**2)))
    return np.array([*rows, [0, 0, 1]], np.float32)


G = filter_points()


def pays(weight, shape):
    """Return whether 3x3 filters (C_out, C_in, 3, 3) take less time this way on maps (C, H, W)."""
    n_tiles = -(-shape[1] // SIDE) * -(-shape[2] // SIDE)
    n_points = POINTS * (n_tiles + -n_tiles % PIXELS)
    return weight.shape[2] == 3 and min(weight.shape[:2]) >= 8 and 2 * n_points <= 9 * shape[1] * shape[2]


def winograd_scratch(shape, filters, dtype):
    """Return the arrays filters_at, padded, points, products of `winograd_blocks` for maps (C, H, W)."""
    n_threads, (n_in, _, _, n_out) = get_num_threads(), filters.weight.shape
    whole_tiles = n_in, *(SIDE * -(-n // SIDE) for n in shape[1:])
    # the number of channels is odd, for what lies apart by a power of two competes for places in the cache
    return (np.empty((POINTS, n_in, n_out), dtype),
            padded_scratch(whole_tiles, SIDE + 2, SIDE, dtype),
            empty((n_threads * POINTS, n_in | 1, PIXELS, LANES), dtype),
            empty((n_threads * POINTS, n_out | 1, PIXELS, LANES), dtype))


@parallel_kernel
def winograd_blocks(z, tail, filters, streamed, n_images, y, statistics, filters_at, padded, points, products,
                    sums):
    # z, tail, filters, streamed, y (n_blocks, C_out, h, w, LANES), statistics, sums as in `conv2d_blocks`
    # filters_at (36, C_in, C), padded (n_threads, C_in, rows, columns, LANES)
    # points (n_threads * 36, C_in or more, 2, LANES), products (n_threads * 36, C or more, 2, LANES)
    filters_at_points(filters.weight, G, filters_at)
    z_flat = z.reshape(len(z), -1, LANES)  # see `conv2d_blocks`
    for b in prange(z.shape[0]):
        t, is_counted = get_thread_id(), statistics.shape[1] > 0
        n_lanes = min(n_images - b * LANES, LANES) if is_counted else 0
        winograd_block(b, t, z, z_flat, tail, filters_at, filters.bias, streamed, n_lanes, y, padded, points,
                       products, sums)
        if is_counted:
            count = y.shape[2] * y.shape[3] * n_lanes
            for o in range(y.shape[1]):
                statistics[0, b, o], statistics[1, b, o] = around_mean(sums, t, o, count)


@kernel
def filters_at_points(weight, g, filters_at):
    # weight (C_in, 3, 3, C), g (6, 3), filters_at (36, C_in, C): g @ weight @ g.T, filter by filter
    for i in range(len(g)):
        for j in range(len(g)):
            for c in range(weight.shape[0]):
                for o in range(weight.shape[3]):
                    total = weight.dtype.type(0)
                    for kh in range(3):
                        for kw in range(3):
                            total += g[i, kh] * g[j, kw] * weight[c, kh, kw, o]
                    filters_at[len(g) * i + j, c, o] = total


@kernel
def winograd_block(b, t, z, z_flat, tail, filters_at, bias, streamed, n_lanes, y, padded, points, products, sums):
    # block b of the arrays above, in thread t; n_lanes hold images, 0 if nothing is counted
    n_rows, all_rows = (padded.shape[2] - 2) // SIDE, -(-y.shape[2] // SIDE)  # of tiles, in a strip and in all
    n_columns = -(-y.shape[3] // SIDE)
    part, share = 0, z_flat.shape[1] * PIXELS // (POINTS * all_rows * n_columns) + 1
    for first in range(0, all_rows, n_rows):  # strip by strip
        enter(z, b, 0, z.shape[1], tail, SIDE * first - 1, 1, padded, t)
        n_tiles = min(n_rows, all_rows - first) * n_columns
        for tile in range(0, n_tiles, PIXELS):
            inputs_to_points(padded, t, tile, n_tiles, n_columns, points)
            products_at_points(points, filters_at, t, z_flat, min(b + 1, len(z) - 1), part, share, products)
            points_to_outputs(products, t, y.shape[1])
            put_in_place(products, t, tile, n_tiles, n_columns, SIDE * first, bias, streamed, y, b, n_lanes, sums)
            part += POINTS
    settle()


@formula
def values_at_points(d):
    """Return B^T d: six inputs, as coefficients, to six points."""
    even_q, odd_q = multiply_add(-Q2, d[2], d[4]), multiply_add(-Q2, d[1], d[3])
    even_p, odd_p = multiply_add(-P2, d[2], d[4]), multiply_add(-P2, d[1], d[3])
    return (add(d[0], multiply_add(-PQ, d[2], d[4])),
            multiply_add(P, odd_q, even_q), multiply_add(-P, odd_q, even_q),
            multiply_add(Q, odd_p, even_p), multiply_add(-Q, odd_p, even_p),
            add(d[1], multiply_add(-PQ, d[3], d[5])))


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
def inputs_to_points(padded, t, tile, n_tiles, n_columns, points):
    # padded (n_threads, C_in, rows, columns, LANES), points (n_threads * 36, C_in, 2, LANES)
    # Of n_tiles tiles those from number `tile` on, row by row; the last one again if there are too few.
    for j in range(PIXELS):
        row, column = divmod(min(tile + j, n_tiles - 1), n_columns)
        h, w = SIDE * row, SIDE * column
        for c in range(padded.shape[1]):
            v0 = values_at_points(six_rows(padded, t, c, h, w))
            v1 = values_at_points(six_rows(padded, t, c, h, w + 1))
            v2 = values_at_points(six_rows(padded, t, c, h, w + 2))
            v3 = values_at_points(six_rows(padded, t, c, h, w + 3))
            v4 = values_at_points(six_rows(padded, t, c, h, w + 4))
            v5 = values_at_points(six_rows(padded, t, c, h, w + 5))
            store_six(points, POINTS * t, c, j, values_at_points((v0[0], v1[0], v2[0], v3[0], v4[0], v5[0])))
            store_six(points, POINTS * t + 6, c, j, values_at_points((v0[1], v1[1], v2[1], v3[1], v4[1], v5[1])))
            store_six(points, POINTS * t + 12, c, j, values_at_points((v0[2], v1[2], v2[2], v3[2], v4[2], v5[2])))
            store_six(points, POINTS * t + 18, c, j, values_at_points((v0[3], v1[3], v2[3], v3[3], v4[3], v5[3])))
            store_six(points, POINTS * t + 24, c, j, values_at_points((v0[4], v1[4], v2[4], v3[4], v4[4], v5[4])))
            store_six(points, POINTS * t + 30, c, j, values_at_points((v0[5], v1[5], v2[5], v3[5], v4[5], v5[5])))


@formula
def six_rows(padded, t, c, h, w):
    """Return six pixels of a column."""
    return (load(padded, (t, c, h, w)), load(padded, (t, c, h + 1, w)), load(padded, (t, c, h + 2, w)),
            load(padded, (t, c, h + 3, w)), load(padded, (t, c, h + 4, w)), load(padded, (t, c, h + 5, w)))


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
def products_at_points(points, filters_at, t, z_flat, ahead, part, share, products):
    # points (n_threads * 36, C_in, 2, LANES), filters_at (36, C_in, C), products (n_threads * 36, C, 2, LANES)
    # A matrix product at each point, by tiles as in `conv2d_tile`, of 8 output channels and two tiles of outputs.
    zero = filters_at.dtype.type(0)
    for p in range(POINTS):
        fetch_part(z_flat, ahead, part + p, share)
        for o in range(0, filters_at.shape[2], CHANNELS):
            y = eight_pairs(zero, zero, zero, zero, zero, zero, zero, zero)
            for i in range(filters_at.shape[1]):
                y = plus_products(filters_at, (p, i), o, load_pair(points, POINTS * t + p, i, (0, 1)), y)
            store_tile(products, POINTS * t + p, o, (0, 1), False, y)


@kernel
def points_to_outputs(products, t, n_channels):
    # products (n_threads * 36, C, 2, LANES): the first 16 of the 36 become the outputs of a tile, row by row
    for c in range(n_channels):
        for j in range(PIXELS):
            v0 = outputs_from_points(six_points(products, POINTS * t, c, j))
            v1 = outputs_from_points(six_points(products, POINTS * t + 1, c, j))
            v2 = outputs_from_points(six_points(products, POINTS * t + 2, c, j))
            v3 = outputs_from_points(six_points(products, POINTS * t + 3, c, j))
            v4 = outputs_from_points(six_points(products, POINTS * t + 4, c, j))
            v5 = outputs_from_points(six_points(products, POINTS * t + 5, c, j))
            store_row(products, POINTS * t, c, j, outputs_from_points((v0[0], v1[0], v2[0], v3[0], v4[0], v5[0])))
            store_row(products, POINTS * t + 4, c, j, outputs_from_points((v0[1], v1[1], v2[1], v3[1], v4[1], v5[1])))
            store_row(products, POINTS * t + 8, c, j, outputs_from_points((v0[2], v1[2], v2[2], v3[2], v4[2], v5[2])))
            store_row(products, POINTS * t + 12, c, j, outputs_from_points((v0[3], v1[3], v2[3], v3[3], v4[3], v5[3])))


@formula
def six_points(products, p, c, j):
    """Return the values at points p, p + 6, ..., p + 30."""
    return (load(products, (p, c, j)), load(products, (p + 6, c, j)), load(products, (p + 12, c, j)),
            load(products, (p + 18, c, j)), load(products, (p + 24, c, j)), load(products, (p + 30, c, j)))


@formula
def store_row(products, p, c, j, outputs):
    """Store four outputs in the places of points p to p + 3."""
    store(products, (p, c, j), outputs[0])
    store(products, (p + 1, c, j), outputs[1])
    store(products, (p + 2, c, j), outputs[2])
    store(products, (p + 3, c, j), outputs[3])


@kernel
def put_in_place(products, t, tile, n_tiles, n_columns, first, bias, streamed, y, b, n_lanes, sums):
    # products (n_threads * 36, C, 2, LANES), of which 16 are outputs -> y[b] (C_out, h, w, LANES), from row `first` on
    # sums (n_threads, C, 3, LANES); n_lanes hold images, 0 if nothing is counted
    is_real, none = first_lanes(n_lanes, y.dtype.type(1)), fill(y.dtype.type(0))
    for j in range(min(PIXELS, n_tiles - tile)):
        row, column = divmod(tile + j, n_columns)
        h, w = first + SIDE * row, SIDE * column
        height, width = min(SIDE, y.shape[2] - h), min(SIDE, y.shape[3] - w)
        counts = is_real, is_real if width > 1 else none
        counts_right = is_real if width > 2 else none, is_real if width > 3 else none
        for o in range(y.shape[1]):
            shift = fill(bias[o])
            for i in range(height):
                p = POINTS * t + SIDE * i
                for k in range(width):
                    value = add(load(products, (p + k, o, j)), shift)
                    store(products, (p + k, o, j), value)
                    if streamed:
                        stream(y, (b, o, h + i, w + k), value)
                    else:
                        store(y, (b, o, h + i, w + k), value)
                if n_lanes > 0:
                    is_first = h + w + i == 0
                    pair = load(products, (p, o, j)), load(products, (p + 1, o, j))
                    count_pixels(sums, t, o, is_first, counts, pair)
                    pair = load(products, (p + 2, o, j)), load(products, (p + 3, o, j))
                    count_pixels(sums, t, o, False, counts_right, pair)
