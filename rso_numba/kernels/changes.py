"""The kernels of delta evaluation: what one weight changes, on packed images, as drawn in `cpu.py`.

A weight of a convolution multiplies one input channel, shifted by the position of the weight in its
filter. That shifted channel is called u: if the weight changes by `amount`, one channel of the
output changes by amount * u, and nothing else does. See `evaluators/delta.md`.
"""

import math

import numpy as np
from numba import prange

from .compiling import formula, kernel, parallel_kernel
from .cpu import padded_scratch
from .lanes import LANES, fill, load, multiply_add, store
from .memory import empty
from .products import conv2d_blocks

ZERO = np.float32(0)
ONE = np.float32(1)
CHUNK = 16 * LANES  # images that one thread takes care of in the last layer


@formula
def fast_exp(x):
    """Return exp(x) within a relative 3e-7, for x in -87..88 (beyond: of the nearer of them).

    Without Intel's vector library, as pip installs Numba, `math.exp` is a call for every number; this
    is arithmetic that LLVM makes vector instructions of. exp(x) = 2^n exp(r), |r| < log(2) / 2.
    """
    x = min(max(x, np.float32(-87)), np.float32(88))
    n = np.int32(x * np.float32(1.44269504) + (np.float32(0.5) if x > ZERO else np.float32(-0.5)))
    # r = x - n log(2), with log(2) in two parts, the first of which has few bits
    r = x - np.float32(n) * np.float32(0.693359375) + np.float32(n) * np.float32(2.12194440e-4)
    p = np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = (p * r + ONE) * r + ONE
    return p * np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)  # the bits of 2^n


def shifted(x, channel, row, column, pooled):
    """Return u: a channel of x moved by (row, column), zeros where it leaves; `pooled`: its 2x2 means."""
    # x (n_blocks, C, H, W, LANES) -> (n_blocks, 1, H, W, LANES) or half of it
    step = 2 if pooled else 1
    u = empty((len(x), 1, x.shape[2] // step, x.shape[3] // step, LANES), x.dtype)
    shift_blocks(x, channel, row, column, step, u)
    return u


@parallel_kernel
def shift_blocks(x, channel, row, column, step, u):
    # u[h, w] = mean over i, j < step of x[step * h + i + row, step * w + j + column]
    share = ONE / np.float32(step * step)
    for b in prange(x.shape[0]):
        for h in range(u.shape[2]):
            for w in range(u.shape[3]):
                for lane in range(LANES):
                    u[b, 0, h, w, lane] = ZERO
                for i in range(step * h + row, step * h + row + step):
                    for j in range(step * w + column, step * w + column + step):
                        if 0 <= i < x.shape[2] and 0 <= j < x.shape[3]:
                            for lane in range(LANES):
                                u[b, 0, h, w, lane] += share * x[b, channel, i, j, lane]


def blend(z, channel, u, amount, scale, shift):
    """Return scale * (z[channel] + amount * u) + shift, a map of one channel."""
    y = empty(u.shape, u.dtype)
    blend_blocks(z, channel, u, amount, scale, shift, y)
    return y


@parallel_kernel
def blend_blocks(z, channel, u, amount, scale, shift, y):
    # z (n_blocks, C, H, W, LANES), u, y (n_blocks, 1, H, W, LANES)
    for b in prange(z.shape[0]):
        for h in range(y.shape[2]):
            for w in range(y.shape[3]):
                for lane in range(LANES):
                    changed = z[b, channel, h, w, lane] + amount * u[b, 0, h, w, lane]
                    y[b, 0, h, w, lane] = scale * changed + shift


def moments(z, channel, u, mean, n_images):
    """Return mean(u), covariance(z, u) and variance(u), where z is a channel with the given mean."""
    sums = np.empty((3, len(z)))
    moment_blocks(z, channel, u, mean, n_images, sums)
    mean_u, mean_zu, mean_uu = sums.sum(axis=1) / (n_images * u.shape[2] * u.shape[3])
    return mean_u, mean_zu, mean_uu - mean_u**2


@parallel_kernel
def moment_blocks(z, channel, u, mean, n_images, sums):
    # sums (3, n_blocks) of u, (z - mean) u and u u
    for b in prange(z.shape[0]):
        sums[0, b], sums[1, b], sums[2, b] = moment_block(z[b, channel], u[b, 0], mean, n_images - b * LANES)


@kernel
def moment_block(z, u, mean, n_lanes):
    # z, u (H, W, LANES) -> three sums over the real lanes, row by row in float32, then in float64
    total_u = total_zu = total_uu = 0.0
    for h in range(u.shape[0]):
        row_u = row_zu = row_uu = ZERO
        for w in range(u.shape[1]):
            for lane in range(LANES):
                value = u[h, w, lane] if lane < n_lanes else ZERO
                row_u += value
                row_zu += (z[h, w, lane] - mean) * value
                row_uu += value * value
        total_u += row_u
        total_zu += row_zu
        total_uu += row_uu
    return total_u, total_zu, total_uu


def difference(a, y, start):
    """Return y minus channels start, start + 1, ... of a."""
    # a (n_blocks, C, ..., LANES), y (n_blocks, c, ..., LANES)
    d = empty(y.shape, y.dtype)
    rows = (array.reshape(len(array), -1) for array in (a, y, d))
    difference_blocks(*rows, start * (y[0].size // y.shape[1]))
    return d


@parallel_kernel
def difference_blocks(a, y, d, first):
    # a (n_blocks, m), y, d (n_blocks, n); the channels are a[:, first : first + n]
    for b in prange(a.shape[0]):
        for i in range(y.shape[1]):
            d[b, i] = y[b, i] - a[b, first + i]


@parallel_kernel
def add_blocks_to(y, z):
    """Add z to y, in place; both (n_blocks, n)."""
    for b in prange(y.shape[0]):
        for i in range(y.shape[1]):
            y[b, i] += z[b, i]


def conv2d_avgpool_forward(x, weight, bias):
    """Return the 2x2 means of a convolution: one convolution of stride 2 with filters larger by one."""
    # x (n_blocks, C_in, H, W, LANES), weight (C_out, C_in, k, k) -> (n_blocks, C_out, H // 2, W // 2, LANES)
    size = weight.shape[2]
    merged = np.zeros((*weight.shape[:2], size + 1, size + 1), weight.dtype)
    for i in (0, 1):
        for j in (0, 1):
            merged[:, :, i : i + size, j : j + size] += weight / 4
    y = empty((len(x), len(weight), x.shape[2] // 2, x.shape[3] // 2, LANES), x.dtype)
    conv2d_blocks(x, merged, bias, y, padded_scratch(x, size - 1), 2)
    return y


@parallel_kernel
def replay_blocks(z, x, changes, amounts, step):
    """Bring the output z of a convolution up to date with the changes of its weights that it has missed.

    z (n_blocks, C_out, H, W, LANES), x (n_blocks, C_in, step * H, step * W, LANES), changes (n, 4): output
    channel, input channel (-1 for the bias), row and column; amounts (n,). Block by block, so that
    a map stays in the cache for all its changes.
    """
    for b in prange(z.shape[0]):
        for i in range(len(amounts)):
            k, c, row, column = changes[i, 0], changes[i, 1], changes[i, 2], changes[i, 3]
            replay_block(z[b, k], x[b], c, row, column, amounts[i], step)


@kernel
def replay_block(z, x, channel, row, column, amount, step):
    # z (H, W, LANES) += amount * u, see shift_blocks
    share = amount / np.float32(step * step)
    for h in range(z.shape[0]):
        for w in range(z.shape[1]):
            value = load(z, (h, w))
            if channel < 0:
                value = multiply_add(amount, fill(ONE), value)
            else:
                for i in range(max(step * h + row, 0), min(step * h + row + step, x.shape[1])):
                    for j in range(max(step * w + column, 0), min(step * w + column + step, x.shape[2])):
                        value = multiply_add(share, load(x, (channel, i, j)), value)
            store(z, (h, w), value)


def by_feature(x, n_ones=0):
    """Return features (n_blocks, n, LANES) as (n + n_ones, n_blocks * LANES), the last n_ones being 1.

    All images of a feature are side by side.
    """
    y = empty((x.shape[1] + n_ones, len(x), LANES), x.dtype)
    by_feature_blocks(x, y)
    y[x.shape[1] :] = 1
    return y.reshape(len(y), -1)


@parallel_kernel
def by_feature_blocks(x, y):
    # x (n_blocks, n, LANES), y (n or more, n_blocks, LANES)
    for i in prange(x.shape[1]):
        for b in range(x.shape[0]):
            for lane in range(LANES):
                y[i, b, lane] = x[b, i, lane]


def dense_trial(z, a, changes, amounts, k, j, steps, labels):
    """Bring logits up to date, then return the summed losses for every step of weight (k, j), float64.

    z (n_classes, n) are the logits and a (n_in + 1, n) the inputs of the last layer, by feature; the
    last input is 1 for the bias (so that j = -1 means it). changes and amounts are what z has missed, as
    above. labels (n,) are -1 where there is no image.
    """
    sums = np.empty((-(-len(labels) // CHUNK), len(steps)))
    # threads wait for each other, on a busy machine for milliseconds: small work is done sooner by one
    chunks = dense_chunks if len(sums) > 8 else dense_chunks_alone
    chunks(z, a, changes, amounts, k, j, steps, labels, sums)
    return sums.sum(axis=0)


def _dense_chunks(z, a, changes, amounts, k, j, steps, labels, sums):
    # sums (n_chunks, n_steps)
    for chunk in prange(len(sums)):
        first, last = chunk * CHUNK, min((chunk + 1) * CHUNK, len(labels))
        replay_dense(z, a, first, last, changes, amounts)
        dense_losses(z, a[j, first:last], k, first, last, steps, labels[first:last], sums[chunk])



@kernel
def replay_dense(z, a, first, last, changes, amounts):
    # images first to last of z (n_classes, n) and a (n_in + 1, n)
    for i in range(len(amounts)):
        logits, inputs = z[changes[i, 0], first:last], a[changes[i, 1], first:last]
        amount = amounts[i]
        for n in range(len(logits)):
            logits[n] += amount * inputs[n]


@kernel
def dense_losses(z, a, k, first, last, steps, labels, sums):
    # images first to last of z (n_classes, n); a and labels of these images; sums (n_steps,)
    # Only logit k changes: loss = log(others + exp(own - largest)) + largest - logit of the label, where
    # `own` is logit k with the step, and `others` sums exp(logit - largest) over the other classes.
    room = np.empty((3, len(labels)), np.float32)
    largest, others, total = room[0], room[1], room[2]
    softmax_parts(z, k, first, last, largest, others)
    constant = 0.0
    for n in range(len(labels)):
        if labels[n] >= 0:
            constant += largest[n] - (z[labels[n], first + n] if labels[n] != k else ZERO)
    logits = z[k, first:last]
    for s in range(len(steps)):
        labelled = ZERO
        for n in range(len(labels)):
            own = logits[n] + steps[s] * a[n]
            total[n] = others[n] + fast_exp(own - largest[n]) if labels[n] >= 0 else ONE
            labelled += own if labels[n] == k else ZERO
        sums[s] = log_product(total) + constant - labelled
        if not abs(sums[s]) < math.inf:
            sums[s] = careful_losses(z, a, k, first, steps[s], labels)


@kernel
def softmax_parts(z, k, first, last, largest, others):
    # the largest logit, and the sum of exp(logit - largest) over the classes but k
    logits = z[0, first:last]
    for n in range(len(largest)):
        largest[n], others[n] = logits[n], ZERO
    for c in range(1, z.shape[0]):
        logits = z[c, first:last]
        for n in range(len(largest)):
            largest[n] = max(largest[n], logits[n])
    for c in range(z.shape[0]):
        if c != k:
            logits = z[c, first:last]
            for n in range(len(largest)):
                others[n] += fast_exp(logits[n] - largest[n])


@kernel
def log_product(total):
    # The sum of log(total). A product of LANES numbers costs one logarithm, which is a call; NaN if a
    # number is so small or large that fast_exp or the product are not exact.
    result, smallest, greatest = 0.0, ONE, ONE
    for first in range(0, len(total), LANES):
        product = 1.0
        for n in range(first, first + LANES):
            product *= total[n]
            smallest, greatest = min(smallest, total[n]), max(greatest, total[n])
        result += math.log(product)
    return result if smallest > np.float32(1e-15) and greatest < np.float32(1e15) else math.nan


@kernel
def careful_losses(z, a, k, first, step, labels):
    # The same for logits of any size: the largest is found anew, and each logarithm is taken.
    result = 0.0
    for n in range(len(labels)):
        if labels[n] >= 0:
            logits = z[:, first + n]
            own = logits[k] + step * a[n]
            largest = own
            for c in range(len(logits)):
                if c != k and not logits[c] <= largest:
                    largest = logits[c]
            total = math.exp(own - largest)
            for c in range(len(logits)):
                if c != k:
                    total += math.exp(logits[c] - largest)
            result += math.log(total) + largest - (own if labels[n] == k else logits[labels[n]])
    return result


dense_chunks, dense_chunks_alone = parallel_kernel(_dense_chunks), kernel(_dense_chunks)
