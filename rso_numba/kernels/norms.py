"""The kernels of BatchNorm, on packed images, (n_blocks, ..., LANES), as drawn in `cpu.py`.

Sums over images leave out the lanes that hold none, and end in float64, block by block.
"""

import numpy as np
from numba import prange

from .compiling import formula, kernel, parallel_kernel
from .lanes import (
    LANES,
    add,
    add_up,
    fill,
    first_lanes,
    load,
    multiply,
    multiply_add,
    relu_gradient,
    store,
)


@parallel_kernel
def statistics_blocks(x, n_images, statistics):
    # x (n_blocks, C, n_pixels, LANES), statistics (2, n_blocks, C)
    for b in prange(x.shape[0]):
        for c in range(x.shape[1]):
            statistics[0, b, c], statistics[1, b, c] = block_statistics(x, b, c, n_images - b * LANES)


@kernel
def block_statistics(x, b, c, n_lanes):
    # channel c of block b of x -> sum, and sum of squares around the mean, over the first n_lanes lanes
    zero = x.dtype.type(0)
    if n_lanes >= LANES:
        total = deviations(x, b, c, zero, False)
        return total, deviations(x, b, c, x.dtype.type(total / (x.shape[2] * LANES)), True)
    total = moment(x, b, c, zero, 1, n_lanes)
    return total, moment(x, b, c, x.dtype.type(total / (x.shape[2] * n_lanes)), 2, n_lanes)


@formula
def count_pixels(sums, t, c, is_first, counts, values):
    """Count two pixels of channel c of a block in sums[t] (C, 3, LANES); `counts` are 1 or 0 for each.

    sums holds minus the center, and the sums of value - center and of its square. The center is the mean of
    the first two pixels: as good as the mean, unless they differ from it by many standard deviations.
    """
    if is_first:
        total = multiply_add(counts[0], values[0], multiply(counts[1], values[1]))
        none = fill(sums.dtype.type(0))
        store(sums, (t, c, 0), fill(-add_up(total) / add_up(add(counts[0], counts[1]))))
        store(sums, (t, c, 1), none)
        store(sums, (t, c, 2), none)
    center, total, squares = load(sums, (t, c, 0)), load(sums, (t, c, 1)), load(sums, (t, c, 2))
    v0, v1 = multiply(counts[0], add(values[0], center)), multiply(counts[1], add(values[1], center))
    store(sums, (t, c, 1), add(add(v0, v1), total))
    store(sums, (t, c, 2), multiply_add(v0, v0, multiply_add(v1, v1, squares)))


@kernel
def around_means(sums, t, count, statistics, b):
    # sums[t] (C, 3, LANES) of `count` numbers in each channel, as above
    # -> statistics[:, b] (2, C_out): sum, and sum of squares around the mean
    for c in range(statistics.shape[2]):
        total, squares = 0.0, 0.0
        for lane in range(LANES):
            total += sums[t, c, 1, lane]
            squares += sums[t, c, 2, lane]
        statistics[0, b, c] = total - count * np.float64(sums[t, c, 0, 0])
        statistics[1, b, c] = max(squares - total * total / count, 0.0)


@kernel
def add_statistics(statistics, n_images, n_pixels, moments):
    # statistics (2, n_blocks, C) of the blocks -> mean and variance, moments (2, C)
    # The squares are taken around the mean of their block; moving them to the common mean cancels nothing.
    n_blocks, n_channels = statistics.shape[1:]
    mean, squares, n = np.zeros(n_channels), np.zeros(n_channels), n_images * n_pixels
    add_rows(statistics[0], mean)
    mean /= n
    for b in range(n_blocks):
        count = min(n_images - b * LANES, LANES) * n_pixels
        for c in range(n_channels):
            squares[c] += statistics[1, b, c] + count * (statistics[0, b, c] / count - mean[c]) ** 2
    moments[0], moments[1] = mean, squares / n


@kernel
def add_rows(rows, totals):
    # rows (n, m), totals (m,) of zeros in float64: their sum, row by row
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            totals[j] += rows[i, j]


@kernel
def deviations(x, b, c, center, squared):
    # x[b, c] (n_pixels, LANES) -> sum of x - center or its square: 32 pixels in its own type, then in float64
    result = 0.0
    for first in range(0, x.shape[2], 32):
        total = fill(x.dtype.type(0))
        for p in range(first, min(first + 32, x.shape[2])):
            deviation = add(load(x, (b, c, p)), fill(-center))
            total = multiply_add(deviation, deviation, total) if squared else add(deviation, total)
        result += add_up(total)
    return result


@kernel
def moment(x, b, c, center, power, n_lanes):
    # x[b, c] (n_pixels, LANES) -> sum of (x - center) ** power over the first n_lanes lanes, power 1 or 2
    total = 0.0
    for p in range(x.shape[2]):
        for lane in range(LANES):
            difference = np.float64(x[b, c, p, lane] - center) if lane < n_lanes else 0.0
            total += difference if power == 1 else difference * difference
    return total


@kernel
def moment_block(z, b, k, u, k_u, mean, n_lanes):
    # block b of channel k of z and k_u of u, (n_blocks, C, H, W, LANES) -> sums of u, (z - mean) u and u u
    # over the first n_lanes lanes (or all): row by row in the type of u, then in float64
    zero, is_real = u.dtype.type(0), first_lanes(n_lanes, u.dtype.type(1))
    total_u = total_zu = total_uu = 0.0
    for h in range(u.shape[2]):
        row_u = row_zu = row_uu = fill(zero)
        for w in range(u.shape[3]):
            value = multiply(is_real, load(u, (b, k_u, h, w)))
            row_u = add(value, row_u)
            row_zu = multiply_add(add(load(z, (b, k, h, w)), fill(-mean)), value, row_zu)
            row_uu = multiply_add(value, value, row_uu)
        total_u += add_up(row_u)
        total_zu += add_up(row_zu)
        total_uu += add_up(row_uu)
    return total_u, total_zu, total_uu


@parallel_kernel
def gradient_sum_blocks(x, dy, mean, inverse_std, scale, shift, sums):
    # x, dy (n_blocks, C, n_pixels, LANES), the others (C,); dy is 0 in lanes without image
    # sums (2, n_blocks, C): of dy, and of dy * normalized x; dy counts where scale * x + shift is positive
    for b in prange(x.shape[0]):
        for c in range(x.shape[1]):
            total, product = gradient_sums(x, dy, b, c, mean[c], scale[c], shift[c])
            sums[0, b, c], sums[1, b, c] = total, product * inverse_std[c]


@kernel
def gradient_sums(x, dy, b, c, mean, scale, shift):
    # channel c of block b -> sums of dy and (x - mean) dy: 32 pixels in the type of x, then in float64
    zero, total, product = fill(x.dtype.type(0)), 0.0, 0.0
    for first in range(0, x.shape[2], 32):
        part = part_product = zero
        for p in range(first, min(first + 32, x.shape[2])):
            value = load(x, (b, c, p))
            gradient = relu_gradient(multiply_add(scale, value, fill(shift)), load(dy, (b, c, p)))
            part = add(gradient, part)
            part_product = multiply_add(add(value, fill(-mean)), gradient, part_product)
        total += add_up(part)
        product += add_up(part_product)
    return total, product


@parallel_kernel
def batchnorm_gradient_blocks(x, dy, mean, inverse_std, scale, shift, gamma, mean_dy, mean_dy_normalized,
                              n_images, dx):
    # x, dy, dx (n_blocks, C, n_pixels, LANES), the others (C,); of scale and shift see above
    # `formulas.batchnorm_gradient`, of Lanes
    for b in prange(x.shape[0]):
        is_real = first_lanes(n_images - b * LANES, x.dtype.type(1))
        for c in range(x.shape[1]):
            factor = gamma[c] * inverse_std[c]
            slope = -mean_dy_normalized[c] * inverse_std[c]
            for p in range(x.shape[2]):
                value = load(x, (b, c, p))
                gradient = relu_gradient(multiply_add(scale[c], value, fill(shift[c])), load(dy, (b, c, p)))
                gradient = multiply_add(slope, add(value, fill(-mean[c])), add(gradient, fill(-mean_dy[c])))
                store(dx, (b, c, p), multiply(is_real, multiply(factor, gradient)))
