"""Softmax and cross-entropy, on packed logits, (n_blocks, n_classes, LANES)."""

import numpy as np
from numba import cuda

from .. import formulas
from .device import LANES, THREADS, block_sum, empty, launch, launch_blocks, to_device, to_host

ZERO, ONE = np.float32(0), np.float32(1)

maximum = cuda.jit(device=True)(formulas.maximum)
exp_difference = cuda.jit(device=True)(formulas.exp_difference)
image_loss = cuda.jit(device=True)(formulas.cross_entropy)
image_loss_gradient = cuda.jit(device=True)(formulas.cross_entropy_gradient)


def cross_entropy(logits, labels):
    """Return -log softmax(logits)[label] of every image."""
    losses = empty(len(labels), logits.dtype)
    launch(cross_entropy_kernel, len(logits), logits, to_device(labels), losses)
    return to_host(losses)


@cuda.jit
def cross_entropy_kernel(logits, labels, losses):
    # logits (n_blocks, n_classes, LANES), labels (N,), losses (N,)
    lane, first = cuda.grid(2)
    for b in range(first, logits.shape[0], cuda.gridsize(2)[1]):
        n = b * LANES + lane
        if n < labels.size:
            largest, total = softmax_sums(logits, b, lane)
            losses[n] = image_loss(logits[b, labels[n], lane], largest, total)


@cuda.jit(device=True)
def softmax_sums(logits, b, lane):
    # logits (n_blocks, n_classes, LANES) -> an image's largest, and the sum of its exp(logit - largest)
    largest = logits[b, 0, lane]
    for k in range(1, logits.shape[1]):
        largest = maximum(largest, logits[b, k, lane])
    total = ZERO
    for k in range(logits.shape[1]):
        total += exp_difference(logits[b, k, lane], largest)
    return largest, total


def mean_loss(logits, labels):
    """Return the mean cross-entropy: summed block by block, then over the blocks, in float64."""
    sums = empty(len(logits), np.float64)
    launch_blocks(loss_sums_kernel, len(logits), logits, to_device(labels), sums)
    return float(to_host(sums).sum()) / len(labels)


@cuda.jit
def loss_sums_kernel(logits, labels, sums):
    # logits (n_blocks, n_classes, LANES), labels (N,), sums (n_blocks,) float64
    # A CUDA block adds up LANES images; only its first row has something to do. There may be several times as
    # many logits as labels: candidates for the same images, one after the other.
    lane, row = cuda.threadIdx.x, cuda.threadIdx.y
    n_blocks = (labels.size + LANES - 1) // LANES
    parts = cuda.shared.array(THREADS, np.float64)
    for b in range(cuda.blockIdx.y, logits.shape[0], cuda.gridDim.y):
        n = b % n_blocks * LANES + lane
        loss = np.float64(ZERO)
        if row == 0 and n < labels.size:
            largest, total = softmax_sums(logits, b, lane)
            loss = np.float64(image_loss(logits[b, labels[n], lane], largest, total))
        total_loss = block_sum(parts, loss)
        if row == 0 and lane == 0:
            sums[b] = total_loss


def cross_entropy_backward(logits, labels):
    """Return the gradient of the mean cross-entropy: (softmax - one-hot) / N, 0 in lanes without image."""
    dlogits = empty(logits.shape, logits.dtype)
    launch(cross_entropy_gradient_kernel, len(logits), logits, to_device(labels), dlogits)
    return dlogits


@cuda.jit
def cross_entropy_gradient_kernel(logits, labels, dlogits):
    # logits, dlogits (n_blocks, n_classes, LANES), labels (N,)
    lane, first = cuda.grid(2)
    for b in range(first, logits.shape[0], cuda.gridsize(2)[1]):
        n = b * LANES + lane
        largest, total = softmax_sums(logits, b, lane)
        for k in range(logits.shape[1]):
            gradient = ZERO
            if n < labels.size:
                target = ONE if k == labels[n] else ZERO
                gradient = image_loss_gradient(
                    logits[b, k, lane], largest, total, target, np.float32(labels.size))
            dlogits[b, k, lane] = gradient
