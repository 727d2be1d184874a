"""Memory for activations that is used again, because fresh memory costs more than most kernels.

The operating system hands out large arrays page by page, at the first touch of each page: for a
ReLU that takes several times longer than the arithmetic. A search makes arrays of the same few
sizes again and again, so the memory of an array that nobody holds any more waits here for the next.
"""

import math
import threading
import weakref
from collections import OrderedDict

import numpy as np
from numba import get_num_threads, prange

from .compiling import formula, parallel_kernel

ALIGNMENT = 64  # bytes in a cache line and in a register of AVX-512
SMALLEST = 2**12  # bytes; smaller arrays are left to the allocator
KEPT = 2**29  # bytes that may wait
SCRATCHES = 64  # arrays that a thread of Python keeps for kernels to work in

_waiting = OrderedDict()  # size -> buffers, the size that was used last at the end
_waiting_bytes = [0]
_lent = {}  # id of a weak reference to an array -> the reference, and the buffer that the array is a view of

_own = threading.local()


def empty(shape, dtype):
    """Return an uninitialized array that starts a cache line, so that no register straddles two."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < SMALLEST:
        return np.empty(shape, dtype)
    buffer = _take(size) if size in _waiting else _aligned(size)
    # NumPy lets every view hold the first array that sees a memoryview (`.data`), which is this one:
    # when it dies, nobody can see the memory any more
    array = np.frombuffer(buffer.data, dtype)
    reference = weakref.ref(array, _give_back)
    _lent[id(reference)] = reference, buffer
    return array.reshape(shape)


def _aligned(size):
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size]


def _take(size):
    buffers = _waiting[size]
    buffer = buffers.pop()
    _waiting_bytes[0] -= size
    if not buffers:
        del _waiting[size]
    return buffer


def _give_back(reference):
    _, buffer = _lent.pop(id(reference))
    _waiting.setdefault(buffer.size, []).append(buffer)
    _waiting.move_to_end(buffer.size)
    _waiting_bytes[0] += buffer.size
    while _waiting_bytes[0] > KEPT:  # sizes that nobody asks for any more go first
        _take(next(iter(_waiting)))


def scratch(name, shape, dtype):
    """Return an uninitialized array for a kernel to work in, the same at each call with these arguments.

    Nobody looks at it when the kernel has ended. Threads of Python get arrays of their own.
    """
    arrays, key = _own.__dict__, (name, shape, dtype)
    if key not in arrays:
        if len(arrays) == SCRATCHES:
            arrays.clear()
        arrays[key] = empty(shape, dtype)
    return arrays[key]


def slabs(name, shape, dtype):
    """Return memory for all threads to work in, (2 * n_threads, *shape): as `scratch`, a slab for each.

    There are twice as many slabs as threads, and every second one is left alone. A processor guesses which
    memory is wanted next and fetches it, far beyond the end of a slab; a thread that is writing there would
    have to take it back, again and again. That more than halves the speed of cores that share no cache.
    """
    return scratch(name, (2 * get_num_threads(), *shape), dtype)


@formula
def threads_of(slabs):
    """Return how many threads slabs are for."""
    return len(slabs) // 2


@formula
def slab_of(thread):
    """Return which slab is that of a thread."""
    return 2 * thread


@formula
def share_of(t, n_slabs, n_blocks):
    """Return the first block of the thread with slab t, and the first one behind its last."""
    return t * n_blocks // n_slabs, (t + 2) * n_blocks // n_slabs


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
        self.size, self.slabs = size, []  # a slab is [memory, bytes in use]

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
            copy(array, copies[-1])
            slab[1] += size
        return copies

    def _slab_with(self, size):
        fitting = next((slab for slab in self.slabs if slab[1] + size <= len(slab[0])), None)
        fresh = 0 if fitting else max(size, min(self.SLAB, int(self.size)))
        if self._taken() + fresh > self.size:  # what is too small for this stage was large enough for another
            self.slabs = [slab for slab in self.slabs if slab[1] or slab is fitting]
        if self._taken() + fresh > self.size:
            return None
        if fitting is None:
            fitting = [_aligned(fresh), 0]
            self.slabs.append(fitting)
        return fitting

    def _taken(self):
        return sum(len(memory) for memory, _ in self.slabs)


def copy(source, target):
    """Copy an array into another of the same shape, by all threads: one is far from what memory can do."""
    copy_rows(source.reshape(len(source), -1), target.reshape(len(target), -1))


@parallel_kernel
def copy_rows(rows, copies):
    # rows, copies (n, m)
    for i in prange(rows.shape[0]):
        for j in range(rows.shape[1]):
            copies[i, j] = rows[i, j]
