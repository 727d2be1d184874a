"""The search in the last layer, where the loss has a closed form: a launch for many trials.

Each mini-batch has a *slot*, where all images of a feature, or of a logit, are side by side. A weight of the
last layer moves one logit by a multiple of one feature. Changes that were kept are written into a log, and
the logits of a slot catch up with it when their mini-batch comes back.
"""

import numpy as np
from numba import config, cuda

from .. import formulas
from .delta import AFTER, BEFORE, CHOICE, LOSSES, candidate, decision
from .device import LANES, block_sum
from .softmax import exp_difference, maximum

ZERO, ONE, INFINITY = np.float32(0), np.float32(1), np.float32(np.inf)

# All trials of a launch share one CUDA block, since each waits for the decision of the one before. Twice as
# many threads would leave each too few registers.
MANY_ROWS = 2 if config.ENABLE_CUDASIM else 16
MANY_THREADS = LANES * MANY_ROWS
AT_ONCE = 8

# columns of a trial in `where`: place in the vector of weights; logit and feature (or that of the bias);
# the mini-batch's slot and its number of images
POSITION, LOGIT, FEATURE, SLOT, IMAGES, WHERE = range(6)

changed_cross_entropy = cuda.jit(device=True)(formulas.changed_cross_entropy)


@cuda.jit
def slot_kernel(x, z, labels, slot, features, logits, slot_labels, log_length, applied):
    # x (n_blocks, n_in, LANES), z (n_blocks, n_classes, LANES), labels (N,)
    # features (n_slots, n_in + 1, n), the last of them 1; logits (n_slots, n_classes, n)
    # slot_labels (n_slots, n), -1 where there is no image; applied (n_slots,), the log so far
    lane, first = cuda.grid(2)
    n_in, n_classes = x.shape[1], z.shape[1]
    n_rows = n_in + 1 + n_classes + 1
    for task in range(first, slot_labels.shape[1] // LANES * n_rows, cuda.gridsize(2)[1]):
        i, b = task % n_rows, task // n_rows
        n = b * LANES + lane
        if b < x.shape[0] and i < n_in:
            features[slot, i, n] = x[b, i, lane]
        elif b < x.shape[0] and n_in < i < n_in + 1 + n_classes:
            logits[slot, i - n_in - 1, n] = z[b, i - n_in - 1, lane]
        elif i == n_in:
            features[slot, i, n] = ONE
        elif i == n_rows - 1:
            slot_labels[slot, n] = labels[n] if n < labels.size else -1
    if lane == 0 and first == 0:
        applied[slot] = log_length[0]


@cuda.jit(device=True)
def softmax_sums_but(logits, n, k):
    # logits (n_classes, N) -> the same as cuda.softmax_sums for image n, without class k
    # (-infinity and 0 if there is no other)
    largest = -INFINITY
    for c in range(logits.shape[0]):
        if c != k:
            largest = maximum(logits[c, n], largest)
    total = ZERO
    for c in range(logits.shape[0]):
        if c != k:
            total += exp_difference(logits[c, n], largest)
    return largest, total


@cuda.jit(device=True)
def replay(z, a, n, log, log_amounts, missed, length):
    # logits z (n_classes, N) and features a (n_in + 1, N) of image n, log (n, 2), log_amounts (n,)
    # Features come from far away: AT_ONCE of them are fetched before the first is needed.
    changes = cuda.local.array(AT_ONCE, np.float32)
    for first in range(missed, length, AT_ONCE):
        for i in range(AT_ONCE):
            entry = min(first + i, length - 1)
            changes[i] = log_amounts[entry] * a[log[entry, 1], n]
        for i in range(AT_ONCE):
            if first + i < length:
                z[log[first + i, 0], n] += changes[i]


@cuda.jit
def last_layer_kernel(where, deltas, rule, features, logits, slot_labels, applied, log, log_amounts,
                      log_length, weights, records):
    # where (n_trials, WHERE), deltas (n_trials,); features, logits, slot_labels, applied as above
    # rule: the factor of weight decay, and whether the vertex is chosen
    # log (n, 2) of logit and feature, log_amounts (n,); weights (n_weights,); records (n_trials, RECORD)
    # One CUDA block of MANY_THREADS, every thread with images of its own.
    thread = cuda.threadIdx.y * LANES + cuda.threadIdx.x
    parts = cuda.shared.array(MANY_THREADS, np.float64)
    decay, wants_vertex = rule
    for trial in range(where.shape[0]):
        position, k, j = where[trial, POSITION], where[trial, LOGIT], where[trial, FEATURE]
        slot, n_images = where[trial, SLOT], where[trial, IMAGES]
        a, z, labels = features[slot], logits[slot], slot_labels[slot]
        missed, length, before = applied[slot], log_length[0], weights[position]
        keep = candidate(0, before, decay, deltas[trial])
        plus = candidate(1, before, decay, deltas[trial])
        minus = candidate(2, before, decay, deltas[trial])
        loss_keep = loss_plus = loss_minus = np.float64(ZERO)
        for n in range(thread, n_images, MANY_THREADS):
            replay(z, a, n, log, log_amounts, missed, length)
            largest, others = softmax_sums_but(z, n, k)
            labelled, is_own = z[labels[n], n], labels[n] == k
            own = z[k, n] + (keep - before) * a[j, n]
            loss_keep += changed_cross_entropy(own, others, largest, own if is_own else labelled)
            own = z[k, n] + (plus - before) * a[j, n]
            loss_plus += changed_cross_entropy(own, others, largest, own if is_own else labelled)
            own = z[k, n] + (minus - before) * a[j, n]
            loss_minus += changed_cross_entropy(own, others, largest, own if is_own else labelled)
        loss_keep = block_sum(parts, loss_keep) / n_images
        loss_plus = block_sum(parts, loss_plus) / n_images
        loss_minus = block_sum(parts, loss_minus) / n_images
        if thread == 0:
            best, after = decision(loss_keep, loss_plus, loss_minus, wants_vertex, before, decay,
                                   deltas[trial])
            records[trial, LOSSES], records[trial, LOSSES + 1] = loss_keep, loss_plus
            records[trial, LOSSES + 2], records[trial, CHOICE] = loss_minus, best
            records[trial, BEFORE], records[trial, AFTER] = before, after
            applied[slot], weights[position] = length, after
            if after != before:
                log[length, 0], log[length, 1], log_amounts[length] = k, j, after - before
                log_length[0] = length + 1
        cuda.syncthreads()  # the next trial reads what was written
