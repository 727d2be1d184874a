"""Memory for activations that is used again, because fresh memory costs more than most kernels.

The operating system hands out large arrays page by page, at the first touch of each page: for a
ReLU that takes several times longer than the arithmetic. A search makes arrays of the same few
sizes again and again, so the memory of an array that nobody holds any more waits here for the next.
"""

import math
import weakref
from collections import defaultdict

import numpy as np

ALIGNMENT = 64  # bytes in a cache line and in a register of AVX-512
SMALLEST = 2**12  # bytes; smaller arrays are left to the allocator
KEPT = 2**29  # bytes that may wait

_waiting = defaultdict(list)  # size -> buffers
_waiting_bytes = [0]


def empty(shape, dtype):
    """Return an uninitialized array that starts a cache line, so that no register straddles two."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < SMALLEST:
        return np.empty(shape, dtype)
    try:
        buffer = _waiting[size].pop()
        _waiting_bytes[0] -= size
    except IndexError:
        buffer = _aligned(size)
    # NumPy lets every view hold the first array that sees a memoryview (`.data`), which is this one:
    # when it dies, nobody can see the memory any more
    array = np.frombuffer(buffer.data, dtype)
    weakref.finalize(array, _give_back, buffer).atexit = False
    return array.reshape(shape)


def _aligned(size):
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size]


def _give_back(buffer):
    if _waiting_bytes[0] + buffer.size <= KEPT:
        _waiting_bytes[0] += buffer.size
        _waiting[buffer.size].append(buffer)
