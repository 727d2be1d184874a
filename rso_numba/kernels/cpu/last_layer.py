"""The search in the last layer, where the loss has a closed form: one weight moves one logit."""

import math

import numpy as np
from numba import prange

from ..compiling import allocating_kernel, kernel, parallel_kernel
from .lanes import LANES
from .memory import empty
from .softmax import fast_exp

ZERO = np.float32(0)
ONE = np.float32(1)
CHUNK_IMAGES = 16 * LANES  # images that one thread takes care of in the last layer
LARGE = 8 * CHUNK_IMAGES  # images of a mini-batch that is worth more than one thread


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


def last_layer_losses(z, a, changes, amounts, k, j, steps, labels, is_large, chunk_images=CHUNK_IMAGES):
    """Bring logits up to date, then return their loss for every step of one weight.

    Parameters
    ----------
    z : ndarray (n_classes, n)
        Logits by feature, see `by_feature`. They are changed.
    a : ndarray (n_in + 1, n)
        Inputs of the last layer by feature; the last one is 1, for the bias.
    changes, amounts : ndarray (m, 2 or more) int, (m,)
        What z has missed: logit and input of each weight, and what was added to it.
    k, j : int
        Logit and input of the weight; j = -1 means the bias.
    steps : ndarray (n_steps,)
    labels : ndarray (n,) int
        -1 where there is no image.
    is_large : bool
        Whether the mini-batch is so large that all threads should share the work. (They wait for each other,
        on a busy machine for milliseconds: small work is done sooner by one.)
    chunk_images : int
        A multiple of LANES.

    Returns
    -------
    ndarray (n_chunks, n_steps), float64
        Sums of the losses of each `chunk_images` images.
    """
    sums = np.empty((-(-len(labels) // chunk_images), len(steps)))
    chunks = chunks_by_all_threads if is_large else chunks_by_one_thread
    chunks(z, a, changes, amounts, k, j, steps, labels, chunk_images, sums)
    return sums


def _chunks(z, a, changes, amounts, k, j, steps, labels, chunk_images, sums):
    # sums (n_chunks, n_steps), the others as above
    for chunk in prange(len(sums)):
        first, last = chunk * chunk_images, min((chunk + 1) * chunk_images, len(labels))
        replay(z, a, first, last, changes, amounts)
        chunk_losses(z, a[j, first:last], k, first, last, steps, labels[first:last], sums[chunk])


chunks_by_all_threads, chunks_by_one_thread = parallel_kernel(_chunks), allocating_kernel(_chunks)


@kernel
def replay(z, a, first, last, changes, amounts):
    # images first to last of z (n_classes, n) and a (n_in + 1, n)
    for i in range(len(amounts)):
        logits, inputs = z[changes[i, 0], first:last], a[changes[i, 1], first:last]
        amount = amounts[i]
        for n in range(len(logits)):
            logits[n] += amount * inputs[n]


@allocating_kernel
def chunk_losses(z, a, k, first, last, steps, labels, sums):
    # images first to last of z (n_classes, n); a and labels of these images; sums (n_steps,)
    # `formulas.changed_cross_entropy` of many images. Only logit k changes:
    # loss = log(others + exp(own - largest)) + largest - logit of the label, where `own` is logit k with the
    # step, and `others` sums exp(logit - largest) over the other classes.
    workspace = np.empty((3, len(labels)), np.float32)
    largest, others, total = workspace[0], workspace[1], workspace[2]
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
