"""BatchNorm: statistics of a batch, and its gradient.

Sums over images leave out the lanes that hold none, and end in float64, block by block.
"""

import numpy as np
from numba import prange

from ..compiling import allocating_kernel, formula, kernel, parallel_kernel
from .activations import computed
from .fusion import MaskedGradient
from .lanes import (
    LANES,
    add,
    broadcast,
    first_lanes,
    load,
    multiply,
    multiply_add,
    relu_gradient,
    store,
    sum_lanes,
)
from .layout import add_rows, by_channel
from .memory import empty


def batchnorm_statistics(x, n_images):
    """Return mean and (biased) variance of each channel over images and pixels."""
    x = computed(x)
    return mean_and_variance(all_statistics(x, n_images), n_images, x)


def all_statistics(x, n_images):
    """Return sums and sums of squares around the mean, (2, n_blocks, C) float64."""
    statistics = np.empty((2, *x.shape[:2]))
    statistics_blocks(by_channel(x), n_images, statistics)
    return statistics


def mean_and_variance(statistics, n_images, x):
    """Return mean and variance of each channel of x from the statistics of its blocks."""
    moments = np.empty((2, statistics.shape[2]), x.dtype)
    add_statistics(statistics, n_images, x[0, 0].size // LANES, moments)
    return moments[0], moments[1]


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


@kernel
def deviations(x, b, c, center, squared):
    # x[b, c] (n_pixels, LANES) -> sum of x - center or its square: 32 pixels in its own type, then in float64
    result = 0.0
    for first in range(0, x.shape[2], 32):
        total = broadcast(x.dtype.type(0))
        for p in range(first, min(first + 32, x.shape[2])):
            deviation = add(load(x, (b, c, p)), broadcast(-center))
            total = multiply_add(deviation, deviation, total) if squared else add(deviation, total)
        result += sum_lanes(total)
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


@formula
def count_pixels(sums, t, c, is_first, counts, values):
    """Count two pixels of channel c of a block in sums[t] (C, 3, LANES); `counts` are 1 or 0 for each.

    sums holds minus the center, and the sums of value - center and of its square. The center is the mean of
    the first two pixels: as good as the mean, unless they differ from it by many standard deviations.
    """
    if is_first:
        center, total, squares = first_sums(counts, values)
        store(sums, (t, c, 0), center)
    else:
        center, total, squares = load(sums, (t, c, 0)), load(sums, (t, c, 1)), load(sums, (t, c, 2))
    total, squares = plus_pixels(counts, values, center, total, squares)
    store(sums, (t, c, 1), total)
    store(sums, (t, c, 2), squares)


@formula
def first_sums(counts, values):
    """Return minus the center, which two pixels say, and sums of nothing yet."""
    total = multiply_add(counts[0], values[0], multiply(counts[1], values[1]))
    none = multiply(0, counts[0])
    return broadcast(-sum_lanes(total) / sum_lanes(add(counts[0], counts[1]))), none, none


@formula
def plus_pixels(counts, values, center, total, squares):
    """Return the sums of value - center and of its square, and two pixels."""
    v0, v1 = multiply(counts[0], add(values[0], center)), multiply(counts[1], add(values[1], center))
    return add(add(v0, v1), total), multiply_add(v0, v0, multiply_add(v1, v1, squares))


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


@allocating_kernel
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


def batchnorm_backward(x, dy, mean, variance, gamma, epsilon, n_images):
    """Return the gradients (dx, dgamma, dbeta) of BatchNorm with the statistics of this batch."""
    x, scale, shift = computed(x), np.zeros_like(mean), np.ones_like(mean)  # 0 x + 1 is positive
    if isinstance(dy, MaskedGradient) and dy.y.z is x:  # behind a ReLU, which is done in the same pass
        dy, (_, (scale, shift, _, _)) = dy
    dy = computed(dy)
    dx = empty(x.shape, x.dtype)
    sums = np.empty((2, *x.shape[:2]))
    inverse_std = (1 / np.sqrt(variance + x.dtype.type(epsilon))).astype(x.dtype)
    moments = mean, inverse_std, scale, shift
    gradient_sum_blocks(by_channel(x), by_channel(dy), *moments, sums)
    dbeta, dgamma = sums.sum(axis=1)
    count = n_images * (x[0, 0].size // LANES)
    means = (dbeta / count).astype(x.dtype), (dgamma / count).astype(x.dtype)
    batchnorm_gradient_blocks(by_channel(x), by_channel(dy), *moments, gamma, *means, n_images,
                              by_channel(dx))
    return dx, dgamma.astype(x.dtype), dbeta.astype(x.dtype)


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
    zero, total, product = broadcast(x.dtype.type(0)), 0.0, 0.0
    for first in range(0, x.shape[2], 32):
        part = part_product = zero
        for p in range(first, min(first + 32, x.shape[2])):
            value = load(x, (b, c, p))
            gradient = relu_gradient(multiply_add(scale, value, broadcast(shift)), load(dy, (b, c, p)))
            part = add(gradient, part)
            part_product = multiply_add(add(value, broadcast(-mean)), gradient, part_product)
        total += sum_lanes(part)
        product += sum_lanes(part_product)
    return total, product


@parallel_kernel
def batchnorm_gradient_blocks(x, dy, mean, inverse_std, scale, shift, gamma, mean_dy, mean_dy_normalized,
                              n_images, dx):
    # x, dy, dx (n_blocks, C, n_pixels, LANES), the others (C,); of scale and shift see above
    # `formulas.batchnorm_gradient` with Lanes, where dy is 0 behind a ReLU that was 0
    for b in prange(x.shape[0]):
        is_real = first_lanes(n_images - b * LANES, x.dtype.type(1))
        for c in range(x.shape[1]):
            factor = gamma[c] * inverse_std[c]
            slope = -mean_dy_normalized[c] * inverse_std[c]
            for p in range(x.shape[2]):
                value = load(x, (b, c, p))
                y = multiply_add(scale[c], value, broadcast(shift[c]))
                gradient = add(relu_gradient(y, load(dy, (b, c, p))), broadcast(-mean_dy[c]))
                gradient = multiply_add(slope, add(value, broadcast(-mean[c])), gradient)
                store(dx, (b, c, p), multiply(is_real, multiply(factor, gradient)))
