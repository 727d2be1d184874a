"""The kernels of the search on the GPU: candidates for a weight, what follows a change, and the decision.

Three candidates for a weight pass through the network side by side: first as three channels of one array,
(n_blocks, 3, h, w, LANES), because a weight changes one channel of its layer; then, where the next layer has
mixed the channels, as three times n_blocks blocks. See `evaluators/cuda.py`.
"""

import math

import numpy as np
from numba import cuda

from .. import formulas
from .device import LANES, THREADS, block_sum

ZERO = np.float32(0)
LOSSES, CHOICE, BEFORE, AFTER, RECORD = 0, 3, 4, 5, 6  # columns of a trial's record, and their number
N_CANDIDATES = 3

VERTEX = 3  # a choice beside the three candidates

smallest_of_three = cuda.jit(device=True)(formulas.smallest_of_three)
has_vertex = cuda.jit(device=True)(formulas.has_vertex)
vertex = cuda.jit(device=True)(formulas.vertex)


@cuda.jit(device=True)
def candidate(v, before, decay, delta):
    """Return candidate v for a weight: as it is after weight decay, plus or minus delta; as NumPy rounds."""
    # In float32, the GPU would round product and sum at once. The product in float64 is exact.
    w = np.float32(np.float64(before) * np.float64(decay))
    if v == 0:
        return w
    return w + delta if v == 1 else w - delta


@cuda.jit(device=True)
def decision(keep, plus, minus, wants_vertex, before, decay, delta):
    """Return what is chosen, as `rso.algorithm_1` does, and the weight after it."""
    if wants_vertex and has_vertex(keep, plus, minus):
        step = np.float32(vertex(keep, plus, minus))
        # the product in float64, as in `candidate`
        return VERTEX, candidate(0, before, decay, delta) + np.float32(np.float64(step) * np.float64(delta))
    best = smallest_of_three(keep, plus, minus)
    return best, candidate(best, before, decay, delta)


@cuda.jit
def candidates_kernel(trial, weights, position, k, delta, decay, filter_first, origins, filters, singles,
                      records):
    # weights (n_weights,); filters (3, n): the weights that make channel k, for every candidate; likewise
    # singles (n_others, 3): bias, gamma, beta, ..., where those of all channels begin at origins (n_others,)
    # in the weights (or nowhere: -1); records (n_trials, RECORD)
    lane, row = cuda.grid(2)
    thread, n_threads = row * LANES + lane, cuda.gridsize(2)[1] * LANES
    before, n = weights[position], filters.shape[1]
    for task in range(thread, N_CANDIDATES * (n + origins.size), n_threads):
        v, i = task // (n + origins.size), task % (n + origins.size)
        source = filter_first + k * n + i
        if i >= n:
            source = origins[i - n] + k if origins[i - n] >= 0 else -1
        value = weights[source] if source >= 0 else ZERO
        if source == position:
            value = candidate(v, before, decay, delta)
        if i < n:
            filters[v, i] = value
        else:
            singles[i - n, v] = value
    if thread == 0:
        records[trial, BEFORE] = before


@cuda.jit
def decide_kernel(trial, weights, position, delta, decay, wants_vertex, sums, n_images, records):
    # sums (3 * n_blocks,) of losses, float64; weights (n_weights,), records (n_trials, RECORD)
    # One CUDA block: the sums are added in a fixed order.
    thread = cuda.threadIdx.y * LANES + cuda.threadIdx.x
    parts = cuda.shared.array(THREADS, np.float64)
    n_blocks = sums.size // N_CANDIDATES
    for v in range(N_CANDIDATES):
        part = np.float64(ZERO)
        for b in range(thread, n_blocks, THREADS):
            part += sums[v * n_blocks + b]
        total = block_sum(parts, part)
        if thread == 0:
            records[trial, LOSSES + v] = total / n_images
    if thread == 0:
        best, after = decision(records[trial, 0], records[trial, 1], records[trial, 2], wants_vertex,
                               weights[position], decay, delta)
        weights[position] = after
        records[trial, CHOICE], records[trial, AFTER] = best, after


@cuda.jit
def merge_kernel(weight, merged):
    # weight (n, C_in, size, size) -> merged (n, C_in, size + 1, size + 1)
    lane, row = cuda.grid(2)
    size, n_in = weight.shape[2], weight.shape[1]
    for task in range(row * LANES + lane, merged.size, cuda.gridsize(2)[1] * LANES):
        j, rest = task % (size + 1), task // (size + 1)
        i, rest = rest % (size + 1), rest // (size + 1)
        c, o = rest % n_in, rest // n_in
        total = ZERO
        for row_of in range(max(i - 1, 0), min(i + 1, size)):
            for column in range(max(j - 1, 0), min(j + 1, size)):
                total += formulas.QUARTER * weight[o, c, row_of, column]
        merged[o, c, i, j] = total


@cuda.jit
def copy_channel_kernel(x, k, adds, y):
    # x (n_blocks, C, h, w * LANES) -> y (n_blocks, n, h, w * LANES): each of its channels is channel k of x,
    # or with `adds` has it added
    lane, first = cuda.grid(2)
    n_pixels = y.shape[3] // LANES
    for task in range(first, y.shape[0] * y.shape[1] * y.shape[2] * n_pixels, cuda.gridsize(2)[1]):
        i, rest = task % n_pixels * LANES + lane, task // n_pixels
        h, rest = rest % y.shape[2], rest // y.shape[2]
        b, v = rest // y.shape[1], rest % y.shape[1]
        y[b, v, h, i] = x[b, k, h, i] + (y[b, v, h, i] if adds else ZERO)


@cuda.jit
def replace_channel_kernel(x, k, candidates, y):
    # x (n_blocks, C, LANES), candidates (n_blocks, 3, LANES) -> y (3 * n_blocks, C, LANES): x with each of
    # the candidates as its channel k
    lane, first = cuda.grid(2)
    n_blocks = x.shape[0]
    for task in range(first, y.shape[0] * y.shape[1], cuda.gridsize(2)[1]):
        b, c = task // y.shape[1], task % y.shape[1]
        n = b % n_blocks
        y[b, c, lane] = candidates[n, b // n_blocks, lane] if c == k else x[n, c, lane]


@cuda.jit
def norm_kernel(sums, n_images, n_pixels, gamma, beta, epsilon, statistics, scale, shift):
    # sums (2, n_candidates * n_blocks, C) of statistics_kernel; gamma, beta (C,)
    # statistics (2, n_candidates, C): mean and variance; scale, shift (n_candidates, C): what BatchNorm does
    # A CUDA block takes a channel of a candidate.
    thread = cuda.threadIdx.y * LANES + cuda.threadIdx.x
    parts = cuda.shared.array(THREADS, np.float64)
    n_blocks = (n_images + LANES - 1) // LANES
    for task in range(cuda.blockIdx.y, scale.size, cuda.gridDim.y):
        v, c = task // scale.shape[1], task % scale.shape[1]
        part = np.float64(ZERO)
        for b in range(thread, n_blocks, THREADS):
            part += sums[0, v * n_blocks + b, c]
        mean = block_sum(parts, part) / (n_images * n_pixels)
        part = np.float64(ZERO)
        for b in range(thread, n_blocks, THREADS):
            # squares are taken around the mean of their block; moving them to the common mean cancels nothing
            count = min(LANES, n_images - b * LANES) * n_pixels
            deviation = sums[0, v * n_blocks + b, c] / count - mean
            part += sums[1, v * n_blocks + b, c] + count * deviation * deviation
        variance = block_sum(parts, part) / (n_images * n_pixels)
        if thread == 0:
            mean_32, variance_32 = np.float32(mean), np.float32(variance)
            factor = gamma[c] / math.sqrt(variance_32 + epsilon)
            statistics[0, v, c], statistics[1, v, c] = mean_32, variance_32
            scale[v, c], shift[v, c] = factor, beta[c] - mean_32 * factor


@cuda.jit
def follow_kernel(statistics, first, n, but, momentum, running):
    # statistics (2, n_candidates, n or more) of candidate 0: running (2, C) follows them in the n channels
    # from `first` on, without channel `but`
    lane, row = cuda.grid(2)
    for c in range(row * LANES + lane, n, cuda.gridsize(2)[1] * LANES):
        if first + c != but:
            for i in range(2):
                running[i, first + c] += momentum * (statistics[i, 0, c] - running[i, first + c])
