"""The kernels of delta evaluation: what one weight changes, on packed images, as drawn in `cpu.py`.

A weight of a convolution multiplies one input channel, shifted by the position of the weight in its
filter. That shifted channel is called u: if the weight changes by `amount`, one channel of the
output changes by amount * u, and nothing else does. See `evaluators/delta.md`.
"""

import math

import numpy as np
from numba import prange

from .compiling import formula, kernel, parallel_kernel
from .lanes import LANES, fetch, fill, load, multiply_add, store
from .memory import empty, share_of, slab_of, slabs, threads_of
from .norms import moment_block
from .products import padded_scratch
from .softmax import fast_exp
from .tails import enter, pooled_shape, tailed

ZERO = np.float32(0)
ONE = np.float32(1)
CHUNK = 16 * LANES  # images that one thread takes care of in the last layer


def merged_with_avgpool(weight):
    """Return filters (C_out, C_in, k + 1, k + 1) whose outputs, at stride 2, are means of those of weight."""
    merged = np.zeros((*weight.shape[:2], weight.shape[2] + 1, weight.shape[3] + 1), weight.dtype)
    add_quarters(weight, merged)
    return merged


@kernel
def add_quarters(weight, merged):
    # weight (C_out, C_in, k, k), merged (C_out, C_in, k + 1, k + 1) of zeros
    for o in range(weight.shape[0]):
        for c in range(weight.shape[1]):
            for h in range(weight.shape[2]):
                for w in range(weight.shape[3]):
                    quarter = weight[o, c, h, w] / 4
                    merged[o, c, h, w] += quarter
                    merged[o, c, h, w + 1] += quarter
                    merged[o, c, h + 1, w] += quarter
                    merged[o, c, h + 1, w + 1] += quarter


def change_of_channel(x, taps, amounts, size, step, z=None, k=0, mean=None, n_images=0, u=None, k_u=0):
    """Return u, by which changes of weights change channel k of z, and its moments if z has a `mean` there.

    Parameters
    ----------
    x : ndarray or Pending (n_blocks, C_in, step * h, step * w, LANES)
        Input of the convolution; step is 2 with a merged average pool.
    taps, amounts : ndarray (n, 3) int, (n,)
        Input channel (negative: the bias), row and column of each weight, and what is added to it.
    size : int
        Rows and columns of a filter, before the pool was merged into it.
    z : ndarray (n_blocks, C_out, h, w, LANES)
        Output of the convolution, only read for the moments.
    mean : float or None
    n_images : int
    u : ndarray (n_blocks, C, h, w, LANES) or None
        Its channel k_u is written to, if it is given.

    Returns
    -------
    u : ndarray (n_blocks, 1, h, w, LANES), or what was given
    moments : (float, float, float) or None
        mean(u), covariance(z, u), variance(u).
    """
    (x, tail), (_, n_channels, height, width, _) = tailed(x), x.shape
    if u is None:
        u = empty((len(x), 1, height // step, width // step, LANES), x.dtype)
    sums = np.empty((3, 0 if mean is None else len(x)))
    filters = np.zeros((n_channels, size + step - 1, size + step - 1), x.dtype)
    width = u.shape[3] + -u.shape[3] % 8
    padded = padded_scratch((1, height, step * width), filters.shape[1], step, x.dtype, strips=False)
    room = slabs("room", (u.shape[2], width, LANES), x.dtype)
    filter_blocks(x, taps, amounts, step, tail, filters, u, k_u, u if z is None else z, k,
                  np.float32(mean or 0), n_images, sums, padded, room)
    if mean is None:
        return u, None
    mean_u, mean_zu, mean_uu = sums.sum(axis=1) / (n_images * u.shape[2] * u.shape[3])
    return u, (mean_u, mean_zu, mean_uu - mean_u**2)


@parallel_kernel
def filter_blocks(x, taps, amounts, step, tail, filters, u, k_u, z, k, mean, n_images, sums, padded, room):
    # x, which the tail makes (n_blocks, C_in, step * h, step * w, LANES) of; taps (n, 3), amounts (n,)
    # filters (C_in, size, size) of zeros: gets the amounts
    # u (n_blocks, C, h, w, LANES), z (n_blocks, C_out, h, w, LANES)
    # sums (3, n_blocks) of u, (z - mean) u and u u, or of no blocks if nobody asks
    # padded (n_slabs, 1, rows, columns, LANES), room (n_slabs, h, w rounded up to tiles, LANES)
    bias, is_used = add_taps(taps, amounts, step, filters)
    for thread in prange(threads_of(padded)):
        filter_share(slab_of(thread), x, tail, bias, filters, is_used, step, u, k_u, z, k, mean, n_images,
                     sums, padded, room)


@kernel
def filter_share(t, x, tail, bias, filters, is_used, step, u, k_u, z, k, mean, n_images, sums, padded,
                 room):
    # the blocks of the thread with slab t
    start, stop = share_of(t, len(padded), len(x))
    for b in range(start, stop):
        filter_block(x, b, min(b + 1, stop - 1), tail, bias, filters, is_used, step, padded, room, t)
        for h in range(u.shape[2]):
            for w in range(u.shape[3]):
                store(u, (b, k_u, h, w), load(room, (t, h, w)))
        if sums.shape[1] > 0:
            sums[0, b], sums[1, b], sums[2, b] = moment_block(z, b, k, u, k_u, mean, n_images - b * LANES)


@kernel
def filter_block(x, b, ahead, tail, bias, filters, is_used, step, padded, u, t):
    # u[t] (h, w, LANES) = bias + the correlation of x[b] (C_in, H, W, LANES) with filters (C_in, size, size)
    # padded[t] (1, rows, columns, LANES) gets one channel of x after the other; `ahead` is the next block
    size = filters.shape[1]
    for h in range(u.shape[1]):
        for w in range(u.shape[2]):
            store(u, (t, h, w), fill(bias))
    for c in range(x.shape[1]):
        if is_used[c]:
            enter(x, b, c, 1, tail, c, -((size - 1) // 2), (size - 1) // 2, padded, t)
            for h in range(u.shape[1]):
                for row in range(step * h, step * h + step):
                    for w in range(x.shape[3]):
                        fetch(x, (ahead, c, row, w))
                for w in range(0, u.shape[2], 8):
                    if size == 3 and step == 1:  # constants, for loops that can be unrolled
                        filter_tile(padded, t, filters, c, u, h, w, 3, 1)
                    elif size == 4 and step == 2:
                        filter_tile(padded, t, filters, c, u, h, w, 4, 2)
                    else:
                        filter_tile(padded, t, filters, c, u, h, w, size, step)


@kernel
def add_taps(taps, amounts, step, filters):
    # filters (C_in, size, size) += amounts, each a 2x2 square of quarters if a pool is merged (step 2)
    # -> what is added to the bias, and which filters are used
    bias, is_used = ZERO, np.zeros(len(filters), np.bool_)
    for t in range(len(amounts)):
        c, row, column = taps[t]
        if c < 0:
            bias += amounts[t]
        else:
            is_used[c] = True
            filters[c, row : row + step, column : column + step] += amounts[t] / np.float32(step * step)
    return bias, is_used


@formula
def filter_tile(x, t, filters, c, u, h, w, size, step):
    """Add the correlation of x[t], padded, with filter c to eight pixels of a row, as many sums."""
    a0, a1, a2 = load(u, (t, h, w)), load(u, (t, h, w + 1)), load(u, (t, h, w + 2))
    a3, a4, a5 = load(u, (t, h, w + 3)), load(u, (t, h, w + 4)), load(u, (t, h, w + 5))
    a6, a7 = load(u, (t, h, w + 6)), load(u, (t, h, w + 7))
    for i in range(size):
        for j in range(size):
            amount, row, column = filters[c, i, j], step * h + i, step * w + j
            a0 = multiply_add(amount, load(x, (t, 0, row, column)), a0)
            a1 = multiply_add(amount, load(x, (t, 0, row, column + step)), a1)
            a2 = multiply_add(amount, load(x, (t, 0, row, column + 2 * step)), a2)
            a3 = multiply_add(amount, load(x, (t, 0, row, column + 3 * step)), a3)
            a4 = multiply_add(amount, load(x, (t, 0, row, column + 4 * step)), a4)
            a5 = multiply_add(amount, load(x, (t, 0, row, column + 5 * step)), a5)
            a6 = multiply_add(amount, load(x, (t, 0, row, column + 6 * step)), a6)
            a7 = multiply_add(amount, load(x, (t, 0, row, column + 7 * step)), a7)
    store(u, (t, h, w), a0)
    store(u, (t, h, w + 1), a1)
    store(u, (t, h, w + 2), a2)
    store(u, (t, h, w + 3), a3)
    store(u, (t, h, w + 4), a4)
    store(u, (t, h, w + 5), a5)
    store(u, (t, h, w + 6), a6)
    store(u, (t, h, w + 7), a7)


def channel_sum(z, k, u, amount):
    """Return channel k of z plus amount * u, (n_blocks, 1, h, w, LANES)."""
    y = empty(u.shape, u.dtype)
    sum_blocks(z, k, u, amount, y, 0)
    return y


def add_to_channel(z, k, u, amount):
    """Add amount * u to channel k of z, in place."""
    sum_blocks(z, k, u, amount, z, k)


@parallel_kernel
def sum_blocks(z, k, u, amount, y, k_y):
    # z (n_blocks, C_out, h, w, LANES), u (n_blocks, 1, h, w, LANES), y (n_blocks, C, h, w, LANES)
    for b in prange(z.shape[0]):
        sum_block(z, b, k, u, amount, y, b, k_y)


@kernel
def sum_block(z, b, k, u, amount, y, t, k_y):
    # channel k of z[b] (C_out, h, w, LANES) and amount * u[b] (1, h, w, LANES) -> channel k_y of y[t]
    for h in range(u.shape[2]):
        for w in range(u.shape[3]):
            store(y, (t, k_y, h, w), multiply_add(amount, load(u, (b, 0, h, w)), load(z, (b, k, h, w))))


def tail_change(z, k, u, amount, before, after):
    """Return what the tail `after` makes of channel k of z plus amount * u, less what `before` makes of it.

    The tails have one channel; the result is (n_blocks, 1, h', w', LANES).
    """
    change = empty((len(z), *pooled_shape((1, *z.shape[2:4]), after.pool), LANES), z.dtype)
    changed, old = (slabs(name, (1, *z.shape[2:]), z.dtype) for name in ("changed", "old"))
    change_blocks(z, k, u, amount, before, after, changed, old, change)
    return change


@parallel_kernel
def change_blocks(z, k, u, amount, before, after, changed, old, change):
    # z (n_blocks, C_out, h, w, LANES), u (n_blocks, 1, h, w, LANES); changed, old (n_slabs, 1, h, w, LANES)
    for thread in prange(threads_of(old)):
        change_share(slab_of(thread), z, k, u, amount, before, after, changed, old, change)


@kernel
def change_share(t, z, k, u, amount, before, after, changed, old, change):
    # the blocks of the thread with slab t
    start, stop = share_of(t, len(old), len(z))
    for b in range(start, stop):
        sum_block(z, b, k, u, amount, changed, t, 0)
        enter(changed, t, 0, 1, after, 0, 0, 0, change, b)
        enter(z, b, k, 1, before, 0, 0, 0, old, t)
        for h in range(change.shape[2]):
            for w in range(change.shape[3]):
                difference = multiply_add(-ONE, load(old, (t, 0, h, w)), load(change, (b, 0, h, w)))
                store(change, (b, 0, h, w), difference)


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
