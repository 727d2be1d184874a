"""Softmax and cross-entropy, on packed logits, (n_blocks, n_classes, LANES)."""

import numpy as np
from numba import prange

from .. import formulas
from ..compiling import allocating_kernel, formula, kernel, parallel_kernel
from .activations import computed
from .lanes import LANES
from .memory import empty

ZERO = np.float32(0)
ONE = np.float32(1)
maximum = formula(formulas.maximum)
exp_difference = formula(formulas.exp_difference)
image_loss = formula(formulas.cross_entropy)
image_loss_gradient = formula(formulas.cross_entropy_gradient)


def cross_entropy(logits, labels):
    """Return -log softmax(logits)[label] of every image."""
    logits = computed(logits)
    losses = np.empty(len(labels), logits.dtype)
    cross_entropy_blocks(logits, labels, losses)
    return losses


@parallel_kernel
def cross_entropy_blocks(logits, labels, losses):
    # logits (n_blocks, n_classes, LANES), labels (N,), losses (N,)
    for b in prange(logits.shape[0]):
        for lane in range(min(LANES, len(labels) - b * LANES)):
            n = b * LANES + lane
            largest, total = softmax_sums(logits[b], lane)
            losses[n] = image_loss(logits[b, labels[n], lane], largest, total)


@formula
def softmax_sums(logits, lane):
    """Return the largest logit of a lane, and the sum of exp(logit - largest)."""
    # logits (n_classes, LANES)
    largest = logits[0, lane]
    for k in range(1, logits.shape[0]):
        largest = maximum(largest, logits[k, lane])
    total = logits.dtype.type(0)
    for k in range(logits.shape[0]):
        total += exp_difference(logits[k, lane], largest)
    return largest, total


def mean_loss(logits, labels):
    """Return the mean cross-entropy: summed block by block, then over the blocks, in float64."""
    return float(loss_sums(logits, labels).sum()) / len(labels)


def loss_sums(logits, labels):
    """Return the sum of the losses of each block, (n_blocks,) float64."""
    logits = computed(logits)
    sums = np.empty(len(logits))
    loss_blocks(logits, labels, sums)
    return sums


@parallel_kernel
def loss_blocks(logits, labels, sums):
    # logits (n_blocks, n_classes, LANES), labels (N,), sums (n_blocks,) of the losses of a block
    for b in prange(logits.shape[0]):
        sums[b] = block_loss(logits[b], labels[b * LANES : (b + 1) * LANES])


@allocating_kernel
def block_loss(logits, labels):
    # logits (n_classes, LANES), labels (up to LANES,): as cross_entropy_blocks, but exp of all lanes at once
    largest, total, result = np.empty(LANES, logits.dtype), np.zeros(LANES, logits.dtype), 0.0
    for lane in range(LANES):
        largest[lane] = logits[0, lane]
    for k in range(1, logits.shape[0]):
        for lane in range(LANES):
            largest[lane] = maximum(largest[lane], logits[k, lane])
    for k in range(logits.shape[0]):
        for lane in range(LANES):
            total[lane] += fast_exp(np.float32(logits[k, lane] - largest[lane]))
    for lane in range(len(labels)):
        result += image_loss(logits[labels[lane], lane], largest[lane], total[lane])
    return result


@kernel
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


def cross_entropy_backward(logits, labels):
    """Return the gradient of the mean cross-entropy: (softmax - one-hot) / N, 0 in lanes without image."""
    logits = computed(logits)
    dlogits = empty(logits.shape, logits.dtype)
    cross_entropy_gradient_blocks(logits, labels, dlogits)
    return dlogits


@parallel_kernel
def cross_entropy_gradient_blocks(logits, labels, dlogits):
    # logits, dlogits (n_blocks, n_classes, LANES), labels (N,)
    for b in prange(logits.shape[0]):
        for lane in range(LANES):
            n = b * LANES + lane
            largest, total = softmax_sums(logits[b], lane)
            for k in range(logits.shape[1]):
                target = np.float32(n < len(labels) and k == labels[n])
                gradient = image_loss_gradient(
                    logits[b, k, lane], largest, total, target, np.float32(len(labels)))
                dlogits[b, k, lane] = gradient if n < len(labels) else ZERO
