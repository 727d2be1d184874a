"""The dense layer."""

import numpy as np
from numba import prange

from ..compiling import kernel, parallel_kernel
from .activations import computed
from .fusion import load_padded, no_epilogue, pooled_shape
from .lanes import LANES, broadcast, load, multiply_add, store
from .layout import add_blocks, as_row, unpack
from .memory import block_range, empty, n_threads_of, scratch, workspace_of, workspaces


def dense_forward(x, weight, bias):
    """Return x @ weight.T + bias."""
    x = as_row(computed(x))
    return dense_fused(x, no_epilogue(x), weight, bias)


def dense_fused(z, epilogue, weight, bias, start=None, y=None):
    """Return the dense layer's output for what an `Epilogue` makes of z.

    Parameters
    ----------
    z : ndarray (n_blocks, C, H, W, LANES)
    epilogue : Epilogue
        Makes maps (n_blocks, C, h, w, LANES) of z, whose n_in = C * h * w pixels are the features.
    weight : ndarray (n_out, n_in)
    bias : ndarray (n_out,)
    start : ndarray (n_blocks, n_out, LANES) or None
        What the products are added to, instead of the bias.
    y : ndarray (n_blocks, n_out, LANES) or None
        Where the result is written; it may be `start`.

    Returns
    -------
    ndarray (n_blocks, n_out, LANES)
    """
    y = empty((len(z), len(weight), LANES), z.dtype) if y is None else y
    features = workspaces("features", (*pooled_shape(z.shape[1:4], epilogue.pool), LANES), z.dtype)
    started = start is not None
    dense_blocks(z, epilogue, weight, bias, start if started else y, started, y, features)
    return y


@parallel_kernel
def dense_blocks(z, epilogue, weight, bias, start, started, y, features):
    # z (n_blocks, C, H, W, LANES), which the epilogue makes n_in = C * h * w features of
    # weight (n_out, n_in), bias (n_out,)
    # y, start (n_blocks, n_out, LANES); started: begin with start, not with the bias
    # workspace: features (n_workspaces, C, h, w, LANES)
    flat = features.reshape(len(features), -1, LANES)
    for thread in prange(n_threads_of(features)):
        dense_share(workspace_of(thread), z, epilogue, weight, bias, start, started, y, features, flat)


@kernel
def dense_share(t, z, epilogue, weight, bias, start, started, y, features, flat):
    # the blocks of the thread with workspace t: arguments as in `dense_blocks`
    # flat is features (n_workspaces, n_in, LANES)
    begin, stop = block_range(t, len(features), len(z))
    for b in range(begin, stop):
        load_padded(z, b, 0, z.shape[1], epilogue, 0, 0, 0, features, t, False, False)
        for o in range(0, weight.shape[0], 4):
            dense_tile(flat, t, weight, bias, start, started, y, b, o)


@kernel
def dense_tile(x, t, weight, bias, start, started, y, n, o):
    # x[t] (n_in, LANES), weight (n_out, n_in), bias (n_out,) -> outputs o to o + 3 of block n
    # y, start (n_blocks, n_out, LANES)
    last = y.shape[1] - 1
    o1, o2, o3 = min(o + 1, last), min(o + 2, last), min(o + 3, last)
    a, b, c, d = broadcast(bias[o]), broadcast(bias[o1]), broadcast(bias[o2]), broadcast(bias[o3])
    if started:
        a, b, c, d = load(start, (n, o)), load(start, (n, o1)), load(start, (n, o2)), load(start, (n, o3))
    for i in range(weight.shape[1]):
        x0 = load(x, (t, i))
        a, b = multiply_add(weight[o, i], x0, a), multiply_add(weight[o1, i], x0, b)
        c, d = multiply_add(weight[o2, i], x0, c), multiply_add(weight[o3, i], x0, d)
    store(y, (n, o), a)
    store(y, (n, o1), b)
    store(y, (n, o2), c)
    store(y, (n, o3), d)


def dense_backward(x, weight, dy):
    """Return the gradients (dx, dweight, dbias) of dense_forward."""
    x, dy = computed(x), computed(dy)
    dx = dense_forward(dy, np.ascontiguousarray(weight.T), np.zeros(weight.shape[1], x.dtype))
    dweight = scratch("dweight", (len(x), *weight.shape), x.dtype)
    rows = unpack(x, len(x) * LANES).reshape(len(x), LANES, -1)
    dense_weight_blocks(rows, dy, dweight)
    return dx, add_blocks(dweight, x.dtype), dy.sum(axis=(0, 2), dtype=np.float64).astype(x.dtype)


@parallel_kernel
def dense_weight_blocks(rows, dy, dweight):
    # rows (n_blocks, LANES, n_in), dy (n_blocks, n_out, LANES), dweight (n_blocks, n_out, n_in)
    # Unpacked, the features of an image lie side by side, and the inner loop runs over them.
    for b in prange(rows.shape[0]):
        for o in range(dy.shape[1]):
            for i in range(rows.shape[2]):
                dweight[b, o, i] = dy[b, o, 0] * rows[b, 0, i]
            for lane in range(1, LANES):
                for i in range(rows.shape[2]):
                    dweight[b, o, i] += dy[b, o, lane] * rows[b, lane, i]
