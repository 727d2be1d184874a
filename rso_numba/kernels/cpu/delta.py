"""Delta evaluation: what one weight changes.

A weight of a convolution multiplies one input channel, shifted by the position of the weight in its
filter. That shifted channel is the *direction* of the change: if the weight changes by `amount`, one channel
of the output changes by amount * direction, and nothing else does. See `evaluators/delta.md`.
"""

from collections import namedtuple

import numpy as np
from numba import prange

from ..compiling import allocating_kernel, formula, kernel, parallel_kernel
from .fusion import deferred, load_padded, pooled_shape
from .lanes import (
    LANES,
    WIDE,
    add,
    broadcast,
    first_lanes,
    load,
    multiply,
    multiply_add,
    prefetch,
    store,
    sum_lanes,
)
from .memory import block_range, empty, n_threads_of, workspace_of, workspaces
from .tiles import padded_workspace

ZERO = np.float32(0)
ONE = np.float32(1)
TILE = 8 if WIDE else 4  # pixels whose sums stay in registers, see `tiles.py`

Channel = namedtuple("Channel", "maps k")  # channel k of maps (n_blocks, C, h, w, LANES)
Filter = namedtuple("Filter", "weight bias is_used")  # of one output channel, see `filter_share`
Workspace = namedtuple("Workspace", "padded tiles")  # of all threads, see `filter_blocks`


def channel_direction(x, taps, amounts, size, step, z=None, k=0, mean=None, n_images=0, direction=None,
                      k_out=0):
    """Return by what changes of weights change channel k of z, and sums of it if z has a `mean` there.

    Parameters
    ----------
    x : ndarray or Deferred (n_blocks, C_in, step * h, step * w, LANES)
        Input of the convolution; step is 2 with a merged average pool.
    taps, amounts : ndarray (n, 3) int, (n,)
        Input channel (negative: the bias), row and column of each weight, and what is added to it.
    size : int
        Rows and columns of a filter, before the pool was merged into it.
    z : ndarray (n_blocks, C_out, h, w, LANES)
        Output of the convolution, only read for the sums.
    mean : float or None
    n_images : int
    direction : ndarray (n_blocks, C, h, w, LANES) or None
        Its channel k_out is written to, if it is given.

    Returns
    -------
    direction : ndarray (n_blocks, 1, h, w, LANES), or what was given
    sums : ndarray (3, n_blocks), float64
        Of direction, (z - mean) direction and direction ** 2, block by block; of no blocks without a mean.
    """
    (x, epilogue), (_, n_channels, height, width, _) = deferred(x), x.shape
    if direction is None:
        direction = empty((len(x), 1, height // step, width // step, LANES), x.dtype)
    sums = np.empty((3, 0 if mean is None else len(x)))
    weight = np.zeros((n_channels, size + step - 1, size + step - 1), x.dtype)
    width = direction.shape[3] + -direction.shape[3] % TILE
    padded = padded_workspace((1, height, step * width), weight.shape[1], step, x.dtype, strips=False)
    workspace = Workspace(padded, workspaces("tiles", (direction.shape[2], width, LANES), x.dtype))
    out, z = Channel(direction, k_out), Channel(direction if z is None else z, k)
    filter_blocks(x, epilogue, taps, amounts, step, weight, out, z, np.float32(mean or 0), n_images, sums,
                  workspace)
    return direction, sums


@parallel_kernel
def filter_blocks(x, epilogue, taps, amounts, step, weight, out, z, mean, n_images, sums, workspace):
    # x, which the epilogue makes (n_blocks, C_in, step * h, step * w, LANES) of; taps (n, 3), amounts (n,)
    # weight (C_in, size, size) of zeros: gets the amounts
    # out: the Channel of (n_blocks, C, h, w, LANES) that is written; z: of (n_blocks, C_out, h, w, LANES)
    # sums (3, n_blocks) of out, (z - mean) out and out * out, or of no blocks if nobody asks
    # workspace: padded (n_workspaces, 1, rows, columns, LANES), tiles (n_workspaces, h, w rounded up, LANES)
    bias, is_used = add_taps(taps, amounts, step, weight)
    taken = Filter(weight, bias, is_used)
    for thread in prange(n_threads_of(workspace.padded)):
        filter_share(workspace_of(thread), x, epilogue, taken, step, out, z, mean, n_images, sums, workspace)


@kernel
def filter_share(t, x, epilogue, taken, step, out, z, mean, n_images, sums, workspace):
    # the blocks of the thread with workspace t: arguments as in `filter_blocks`
    # taken: a Filter, whose weights are the amounts, is_used (C_in,) says which channels have any
    start, stop = block_range(t, len(workspace.padded), len(x))
    for b in range(start, stop):
        filter_block(x, b, min(b + 1, stop - 1), epilogue, taken, step, workspace, t, b > start)
        for h in range(out.maps.shape[2]):
            for w in range(out.maps.shape[3]):
                store(out.maps, (b, out.k, h, w), load(workspace.tiles, (t, h, w)))
        if sums.shape[1] > 0:
            sums[0, b], sums[1, b], sums[2, b] = moment_block(z, out, b, mean, n_images - b * LANES)


@kernel
def filter_block(x, b, ahead, epilogue, taken, step, workspace, t, has_border):
    # tiles[t] (h, w, LANES) = bias + the correlation of x[b] (C_in, H, W, LANES) with the weights
    # padded[t] (1, rows, columns, LANES) gets one channel of x after the other; `ahead` is the next block
    padded, tiles, weight = workspace.padded, workspace.tiles, taken.weight
    size = weight.shape[1]
    for h in range(tiles.shape[1]):
        for w in range(tiles.shape[2]):
            store(tiles, (t, h, w), broadcast(taken.bias))
    for c in range(x.shape[1]):
        if taken.is_used[c]:
            load_padded(x, b, c, 1, epilogue, c, -((size - 1) // 2), (size - 1) // 2, padded, t,
                        has_border, False)
            for h in range(tiles.shape[1]):
                for row in range(step * h, step * h + step):
                    for w in range(x.shape[3]):
                        prefetch(x, (ahead, c, row, w))
                for w in range(0, tiles.shape[2], TILE):
                    if size == 3 and step == 1:  # constants, for loops that can be unrolled
                        filter_tile(padded, t, weight, c, tiles, h, w, 3, 1)
                    elif size == 4 and step == 2:
                        filter_tile(padded, t, weight, c, tiles, h, w, 4, 2)
                    else:
                        filter_tile(padded, t, weight, c, tiles, h, w, size, step)


@allocating_kernel
def add_taps(taps, amounts, step, weight):
    # weight (C_in, size, size) += amounts, each a 2x2 square of quarters if a pool is merged (step 2)
    # -> what is added to the bias, and which input channels are used
    bias, is_used = ZERO, np.zeros(len(weight), np.bool_)
    for t in range(len(amounts)):
        c, row, column = taps[t, 0], taps[t, 1], taps[t, 2]
        if c < 0:
            bias += amounts[t]
        else:
            is_used[c] = True
            for h in range(row, row + step):
                for w in range(column, column + step):
                    weight[c, h, w] += amounts[t] / np.float32(step * step)
    return bias, is_used


@formula
def filter_four(x, t, weight, c, y, h, w, size, step):
    """Add the correlation of x[t], padded, with filter c to four pixels of a row of y[t], as many sums."""
    # x (n_workspaces, 1, rows, columns, LANES), weight (C_in, size, size), y (n_workspaces, h, w, LANES)
    a = load_four(y, t, h, w)
    for i in range(size):
        for j in range(size):
            a = plus_four(weight[c, i, j], x, t, step * h + i, step * w + j, step, a)
    store_four(y, t, h, w, a)


@formula
def filter_eight(x, t, weight, c, y, h, w, size, step):
    """Add the same to eight pixels."""
    a, b = load_four(y, t, h, w), load_four(y, t, h, w + 4)
    for i in range(size):
        for j in range(size):
            amount, row, column = weight[c, i, j], step * h + i, step * w + j
            a = plus_four(amount, x, t, row, column, step, a)
            b = plus_four(amount, x, t, row, column + 4 * step, step, b)
    store_four(y, t, h, w, a)
    store_four(y, t, h, w + 4, b)


@formula
def load_four(y, t, h, w):
    """Return four pixels of row h of y[t], from column w on."""
    return load(y, (t, h, w)), load(y, (t, h, w + 1)), load(y, (t, h, w + 2)), load(y, (t, h, w + 3))


@formula
def plus_four(amount, x, t, row, column, step, a):
    """Return a plus `amount` times four pixels of x[t], `step` columns apart."""
    return (multiply_add(amount, load(x, (t, 0, row, column)), a[0]),
            multiply_add(amount, load(x, (t, 0, row, column + step)), a[1]),
            multiply_add(amount, load(x, (t, 0, row, column + 2 * step)), a[2]),
            multiply_add(amount, load(x, (t, 0, row, column + 3 * step)), a[3]))


@formula
def store_four(y, t, h, w, a):
    """Write four pixels of row h of y[t], from column w on."""
    store(y, (t, h, w), a[0])
    store(y, (t, h, w + 1), a[1])
    store(y, (t, h, w + 2), a[2])
    store(y, (t, h, w + 3), a[3])


filter_tile = filter_eight if WIDE else filter_four


@kernel
def moment_block(z, out, b, mean, n_lanes):
    # z, out: Channels of (n_blocks, C, h, w, LANES) -> sums of out, (z - mean) out and out * out of block b,
    # over the first n_lanes lanes (or all): row by row in the type of out, then in float64
    d, zero, is_real = out.maps, out.maps.dtype.type(0), first_lanes(n_lanes, out.maps.dtype.type(1))
    total_d = total_zd = total_dd = 0.0
    for h in range(d.shape[2]):
        row_d = row_zd = row_dd = broadcast(zero)
        for w in range(d.shape[3]):
            value = multiply(is_real, load(d, (b, out.k, h, w)))
            row_d = add(value, row_d)
            row_zd = multiply_add(add(load(z.maps, (b, z.k, h, w)), broadcast(-mean)), value, row_zd)
            row_dd = multiply_add(value, value, row_dd)
        total_d += sum_lanes(row_d)
        total_zd += sum_lanes(row_zd)
        total_dd += sum_lanes(row_dd)
    return total_d, total_zd, total_dd


def channel_sum(z, k, direction, amount):
    """Return channel k of z plus amount * direction, (n_blocks, 1, h, w, LANES)."""
    y = empty(direction.shape, direction.dtype)
    sum_blocks(z, k, direction, amount, y, 0)
    return y


def add_to_channel(z, k, direction, amount):
    """Add amount * direction to channel k of z, in place."""
    sum_blocks(z, k, direction, amount, z, k)


@parallel_kernel
def sum_blocks(z, k, direction, amount, y, k_y):
    # z (n_blocks, C_out, h, w, LANES), direction (n_blocks, 1, h, w, LANES), y (n_blocks, C, h, w, LANES)
    for b in prange(z.shape[0]):
        sum_block(z, b, k, direction, amount, y, b, k_y)


@kernel
def sum_block(z, b, k, direction, amount, y, t, k_y):
    # channel k of z[b] (C_out, h, w, LANES) plus amount * direction[b] (1, h, w, LANES)
    # -> channel k_y of y[t] (C, h, w, LANES)
    for h in range(direction.shape[2]):
        for w in range(direction.shape[3]):
            value = multiply_add(amount, load(direction, (b, 0, h, w)), load(z, (b, k, h, w)))
            store(y, (t, k_y, h, w), value)


def epilogue_change(z, k, direction, amount, before, after):
    """Return how the output of an epilogue changes if channel k of z changes by amount * direction.

    `before` is the epilogue that z has gone through and `after` the one that the changed z goes through, both
    of one channel; the result is (n_blocks, 1, h', w', LANES).
    """
    change = empty((len(z), *pooled_shape((1, *z.shape[2:4]), after.pool), LANES), z.dtype)
    changed, old = (workspaces(name, (1, *z.shape[2:]), z.dtype) for name in ("changed", "old"))
    change_blocks(z, k, direction, amount, before, after, changed, old, change)
    return change


@parallel_kernel
def change_blocks(z, k, direction, amount, before, after, changed, old, change):
    # z (n_blocks, C_out, h, w, LANES), direction (n_blocks, 1, h, w, LANES)
    # change (n_blocks, 1, h', w', LANES)
    # workspaces: changed, old (n_workspaces, 1, h, w, LANES)
    for thread in prange(n_threads_of(old)):
        change_share(workspace_of(thread), z, k, direction, amount, before, after, changed, old, change)


@kernel
def change_share(t, z, k, direction, amount, before, after, changed, old, change):
    # the blocks of the thread with workspace t: arguments as in `change_blocks`
    start, stop = block_range(t, len(old), len(z))
    for b in range(start, stop):
        sum_block(z, b, k, direction, amount, changed, t, 0)
        load_padded(changed, t, 0, 1, after, 0, 0, 0, change, b, False, False)
        load_padded(z, b, k, 1, before, 0, 0, 0, old, t, False, False)
        for h in range(change.shape[2]):
            for w in range(change.shape[3]):
                difference = multiply_add(-ONE, load(old, (t, 0, h, w)), load(change, (b, 0, h, w)))
                store(change, (b, 0, h, w), difference)
