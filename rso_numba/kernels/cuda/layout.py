"""The packed layout (drawn in `__init__.py`): images in and out, and views of it."""

import numpy as np
from numba import cuda

from .device import LANES, empty, launch, to_device, to_host

ZERO = np.float32(0)


def by_channel(x):
    """View (n_blocks, C, ..., LANES) as (n_blocks, C, n_pixels, LANES)."""
    return x.reshape(*x.shape[:2], int(np.prod(x.shape[2:-1])), LANES)


def by_row(x):
    """View (n_blocks, ..., LANES) as (n_blocks, n, LANES)."""
    return x.reshape(len(x), int(np.prod(x.shape[1:-1])), LANES)


def by_line(x):
    """View (n_blocks, C, H, W, LANES) as (n_blocks, C, H, W * LANES)."""
    return x.reshape(*x.shape[:3], x.shape[3] * LANES)


def pack(images):
    """Return NumPy images (N, ...) as (n_blocks, ..., LANES) on the GPU, filled up with zeros."""
    images = np.asarray(images)
    rows = to_device(images.reshape(len(images), -1))
    x = empty((-(-len(images) // LANES), *images.shape[1:], LANES), images.dtype)
    launch(pack_kernel, len(x) * rows.shape[1], rows, by_row(x))
    return x


@cuda.jit
def pack_kernel(rows, x):
    # rows (N, n), x (n_blocks, n, LANES)
    lane, first = cuda.grid(2)
    for task in range(first, x.shape[0] * x.shape[1], cuda.gridsize(2)[1]):
        b, i = task // x.shape[1], task % x.shape[1]
        image = b * LANES + lane
        x[b, i, lane] = rows[image, i] if image < rows.shape[0] else ZERO


def unpack(x, n_images):
    """Return the first n_images of (n_blocks, ..., LANES) as a NumPy array (n_images, ...)."""
    rows = empty((n_images, int(np.prod(x.shape[1:-1]))), x.dtype)
    launch(unpack_kernel, len(x) * rows.shape[1], by_row(x), rows)
    return to_host(rows).reshape(n_images, *x.shape[1:-1])


@cuda.jit
def unpack_kernel(x, rows):
    # x (n_blocks, n, LANES), rows (N, n)
    lane, first = cuda.grid(2)
    for task in range(first, x.shape[0] * x.shape[1], cuda.gridsize(2)[1]):
        b, i = task // x.shape[1], task % x.shape[1]
        if b * LANES + lane < rows.shape[0]:
            rows[b * LANES + lane, i] = x[b, i, lane]


def flatten_forward(x):
    """Return (n_blocks, C, H, W, LANES) as (n_blocks, C * H * W, LANES)."""
    return by_row(x)


def flatten_backward(x, dy):
    """Return dy in the shape of x."""
    return dy.reshape(x.shape)


def add_blocks(parts, dtype):
    """Return the sum of the blocks' parts (n_blocks, ...), added in their order."""
    return parts.sum(axis=0, dtype=np.float64).astype(dtype)
