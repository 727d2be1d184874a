"""The packed layout (drawn in `__init__.py`): images in and out, and views of it."""

import numpy as np
from numba import prange

from ..compiling import kernel, parallel_kernel
from .activations import computed
from .lanes import LANES
from .memory import empty

ZERO = np.float32(0)


def by_channel(x):
    """View (n_blocks, C, ..., LANES) as (n_blocks, C, n_pixels, LANES)."""
    return x.reshape(*x.shape[:2], -1, LANES)


def as_maps(x):
    """View features (n_blocks, n, LANES) as n maps of one pixel; maps stay as they are."""
    return x if x.ndim == 5 else x.reshape(*x.shape[:2], 1, 1, LANES)


def as_row(x):
    """View the features of an image, (n_blocks, ..., LANES), as one row, (n_blocks, 1, 1, n, LANES)."""
    return x.reshape(len(x), 1, 1, -1, LANES)


def pack(images):
    """Return images (N, ...) as (n_blocks, ..., LANES), filled up with zeros."""
    images = np.ascontiguousarray(images)
    rows = images.reshape(len(images), -1)
    x = empty((-(-len(images) // LANES), *images.shape[1:], LANES), images.dtype)
    pack_blocks(rows, x.reshape(len(x), -1, LANES))
    return x


@parallel_kernel
def pack_blocks(rows, x):
    # rows (N, n), x (n_blocks, n, LANES)
    for b in prange(x.shape[0]):
        first, n = b * LANES, min(LANES, rows.shape[0] - b * LANES)
        for i in range(x.shape[1]):
            for lane in range(LANES):
                x[b, i, lane] = rows[first + lane, i] if lane < n else ZERO


def unpack(x, n_images):
    """Return the first n_images of (n_blocks, ..., LANES) as (n_images, ...)."""
    x = computed(x)
    rows = np.empty((n_images, *x.shape[1:-1]), x.dtype)
    unpack_blocks(x.reshape(len(x), -1, LANES), rows.reshape(n_images, -1))
    return rows


@parallel_kernel
def unpack_blocks(x, rows):
    # x (n_blocks, n, LANES), rows (N, n)
    for b in prange(x.shape[0]):
        for lane in range(min(LANES, rows.shape[0] - b * LANES)):
            for i in range(x.shape[1]):
                rows[b * LANES + lane, i] = x[b, i, lane]


def flatten_forward(x):
    """Return (n_blocks, C, H, W, LANES) as (n_blocks, C * H * W, LANES)."""
    x = computed(x)
    return x.reshape(len(x), -1, LANES)


def flatten_backward(x, dy):
    """Return dy in the shape of x."""
    return computed(dy).reshape(x.shape)


def add_blocks(parts, dtype):
    """Return the sum of the blocks' parts (n_blocks, ...), added in their order."""
    totals = np.zeros(parts[0].size)
    add_rows(parts.reshape(len(parts), -1), totals)
    return totals.astype(dtype).reshape(parts.shape[1:])


@kernel
def add_rows(rows, totals):
    # rows (n, m), totals (m,) of zeros in float64: their sum, row by row
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            totals[j] += rows[i, j]
