"""What stands between two linear layers, the *epilogue* of the first: BatchNorm, ReLU, pool in one kernel."""

import numpy as np
from numba import cuda

from ..formulas import GLOBAL_MAX, MAX, MEAN, NO_POOL
from .activations import relu
from .device import unsigned
from .pools import maximum, mean_of_four

ZERO = np.float32(0)


@cuda.jit(device=True)
def scaled(z, scale, shift, is_relu):
    value = scale * z + shift
    return relu(value) if is_relu else value


@cuda.jit(device=True)
def epilogue_value(z, b, c, h, w, lane, scale, shift, is_relu, pool):
    # z (n_blocks, C, H, W, LANES) -> pixel h, w of channel c of pool(relu(scale * z + shift))
    if pool == NO_POOL:
        return scaled(z[unsigned(b), unsigned(c), unsigned(h), unsigned(w), lane], scale, shift, is_relu)
    if pool in (MAX, MEAN):
        v0 = scaled(z[b, c, 2 * h, 2 * w, lane], scale, shift, is_relu)
        v1 = scaled(z[b, c, 2 * h, 2 * w + 1, lane], scale, shift, is_relu)
        v2 = scaled(z[b, c, 2 * h + 1, 2 * w, lane], scale, shift, is_relu)
        v3 = scaled(z[b, c, 2 * h + 1, 2 * w + 1, lane], scale, shift, is_relu)
        if pool == MAX:
            return maximum(maximum(v0, v1), maximum(v2, v3))
        return mean_of_four(v0, v1, v2, v3)
    result = scaled(z[b, c, 0, 0, lane], scale, shift, is_relu)
    for h_in in range(z.shape[2]):
        for w_in in range(0 if h_in else 1, z.shape[3]):
            value = scaled(z[b, c, h_in, w_in, lane], scale, shift, is_relu)
            result = maximum(result, value) if pool == GLOBAL_MAX else result + value
    return result if pool == GLOBAL_MAX else result / np.float32(z.shape[2] * z.shape[3])


# A task of these kernels is a line: where a line is comes from divisions, which take longer than a pixel.


@cuda.jit
def epilogue_kernel(z, scale, shift, is_relu, pool, y):
    # z (n_blocks, C, H, W, LANES) -> y (n_blocks, C, h, w, LANES) = pool(relu(scale * z + shift))
    # scale, shift (n_candidates, C); y may be z if nothing is pooled. Twin of cpu's `epilogue_row`.
    lane, first = cuda.grid(2)
    n_blocks, height = z.shape[0] // scale.shape[0], y.shape[2]
    for line in range(first, y.shape[0] * y.shape[1] * height, cuda.gridsize(2)[1]):
        h, rest = line % height, line // height
        b, c = rest // y.shape[1], rest % y.shape[1]
        v = b // n_blocks
        factor, summand = scale[v, c], shift[v, c]
        for w in range(y.shape[3]):
            y[unsigned(b), unsigned(c), unsigned(h), unsigned(w), lane] = epilogue_value(
                z, b, c, h, w, lane, factor, summand, is_relu, pool)


@cuda.jit
def add_epilogue_kernel(z, scale, shift, is_relu, pool, but, start, n_start, y):
    # y (n_blocks, C, h, w, LANES) = start[b % n_start] + the same of z; without it in channel `but`
    # start (n_start, C, h, w, LANES), or 0 if n_start is 0; y may be the start
    lane, first = cuda.grid(2)
    n_blocks, height = z.shape[0] // scale.shape[0], y.shape[2]
    for line in range(first, y.shape[0] * y.shape[1] * height, cuda.gridsize(2)[1]):
        h, rest = line % height, line // height
        b, c = rest // y.shape[1], rest % y.shape[1]
        v, b_start = b // n_blocks, b % n_start if n_start > 0 else 0
        factor, summand = scale[v, c], shift[v, c]
        for w in range(y.shape[3]):
            total = start[b_start, c, h, w, lane] if n_start > 0 else ZERO
            if c != but:
                total += epilogue_value(z, b, c, h, w, lane, factor, summand, is_relu, pool)
            y[unsigned(b), unsigned(c), unsigned(h), unsigned(w), lane] = total


@cuda.jit
def add_to_channel_kernel(z, scale, shift, is_relu, pool, k, y):
    # z (n_blocks, 3, H, W, LANES), scale and shift (1, 3): candidates for channel k, as channels
    # y (3 * n_blocks, C, h, w, LANES), candidates as blocks: the same of z is added to channel k of each
    lane, first = cuda.grid(2)
    height = y.shape[2]
    for line in range(first, y.shape[0] * height, cuda.gridsize(2)[1]):
        h, b = line % height, line // height
        v, b_z = b // z.shape[0], b % z.shape[0]
        for w in range(y.shape[3]):
            y[b, k, h, w, lane] += epilogue_value(
                z, b_z, v, h, w, lane, scale[0, v], shift[0, v], is_relu, pool)
