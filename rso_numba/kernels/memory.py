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


class Arena:
    """Room for copies of arrays that are wanted for a while and forgotten all at once.

    It keeps its slabs of memory when it forgets, so that only their first use pays for fresh memory.

    Parameters
    ----------
    size : float
        Bytes that all slabs together may take.
    """

    SLAB = 2**26

    def __init__(self, size):
        self.size, self.slabs = size, []  # [memory, bytes in use]

    def forget(self):
        """Let all that is held be overwritten. Nobody may look at it any more."""
        for slab in self.slabs:
            slab[1] = 0

    def hold(self, arrays):
        """Return copies of arrays, or None if there is no room for all of them."""
        sizes = [-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays]
        slab = self._slab_with(sum(sizes))
        if slab is None:
            return None
        copies = []
        for array, size in zip(arrays, sizes, strict=True):
            room = slab[0][slab[1] : slab[1] + array.nbytes]
            copies.append(room.view(array.dtype).reshape(array.shape))
            copies[-1][...] = array
            slab[1] += size
        return copies

    def _slab_with(self, size):
        for slab in self.slabs:
            if slab[1] + size <= len(slab[0]):
                return slab
        fresh = max(size, min(self.SLAB, int(self.size)))
        if self._taken() + fresh > self.size:  # what is too small for this stage was large enough for another
            self.slabs = [slab for slab in self.slabs if slab[1]]
        if self._taken() + fresh > self.size:
            return None
        self.slabs.append([_aligned(fresh), 0])
        return self.slabs[-1]

    def _taken(self):
        return sum(len(memory) for memory, _ in self.slabs)
