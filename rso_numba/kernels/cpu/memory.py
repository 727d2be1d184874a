"""Memory for activations that is used again, because fresh memory costs more than most kernels.

The operating system hands out large arrays page by page, at the first touch of each page: for a
ReLU that takes several times longer than the arithmetic. A search makes arrays of the same few
sizes again and again, so the memory of an array that nobody holds any more waits here for the next.
"""

import math
import threading
import weakref
from collections import OrderedDict, deque

import numpy as np
from numba import get_num_threads, prange

from ..compiling import formula, parallel_kernel

ALIGNMENT = 64  # bytes in a cache line and in a register of AVX-512
# Bytes. Smaller arrays are left to the allocator, which is quicker with them (0.3 us against 4 to 10), and
# kernels are as fast where these begin in the middle of a cache line (16 to 50 KB, measured).
SMALLEST = 2**16
KEPT = 2**29  # bytes that may wait
SCRATCHES = 64  # arrays that a thread of Python keeps for kernels to work in

_waiting = OrderedDict()  # size -> buffers, the size that was used last at the end
_waiting_bytes = [0]
_lock = threading.RLock()  # reentrant: collecting garbage may run code that asks for memory
_lent = {}  # id of a weak reference to an array -> the reference, and the buffer that the array is a view of
_dead = deque()  # weak references to arrays that are no more

_own = threading.local()


def empty(shape, dtype):
    """Return an uninitialized array; a large one starts a cache line, so that no register straddles two."""
    size = _n_bytes(shape, dtype)
    if size < SMALLEST:
        return np.empty(shape, dtype)
    with _lock:  # two threads of Python must not take the same
        _take_back()
        buffer = _take(size) if size in _waiting else None
    if buffer is None:
        buffer = _aligned(size)
    # NumPy lets every view hold the first array that sees a memoryview (`.data`), which is this one:
    # when it dies, nobody can see the memory any more
    array = np.frombuffer(buffer.data, dtype)
    # (what is called then is no Python: in that, Ctrl-C would be lost)
    reference = weakref.ref(array, _dead.append)
    _lent[id(reference)] = reference, buffer
    return array.reshape(shape)


def _n_bytes(shape, dtype):
    return math.prod(shape) * np.dtype(dtype).itemsize


def _aligned(size):
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size]


def _take(size):
    *others, buffer = _waiting[size]
    if others:
        _waiting[size] = others
    else:
        del _waiting[size]
    _waiting_bytes[0] -= size
    return buffer


def _take_back():
    """Let the memory of arrays that are no more wait. Ctrl-C may end this anywhere: a buffer may be lost."""
    while _dead:
        _, buffer = _lent.pop(id(_dead.popleft()))
        _waiting[buffer.size] = [*_waiting.get(buffer.size, ()), buffer]
        _waiting.move_to_end(buffer.size)
        _waiting_bytes[0] += buffer.size
        while _waiting and _waiting_bytes[0] > KEPT:  # sizes that nobody asks for any more go first
            _take(next(iter(_waiting)))


def scratch(name, shape, dtype):
    """Return an uninitialized array for a kernel to work in, the same at each call with these arguments.

    Nobody looks at it when the kernel has ended. Threads of Python get arrays of their own. It starts a cache
    line whatever its size: kernels write it over and over, and AVX-512 takes twice as long in the middle.
    """
    arrays, key = _own.__dict__, (name, shape, dtype)
    if key not in arrays:
        if len(arrays) == SCRATCHES:
            arrays.clear()
        arrays[key] = _aligned(_n_bytes(shape, dtype)).view(dtype).reshape(shape)
    return arrays[key]


def workspaces(name, shape, dtype):
    """Return memory for all threads to work in, (2 * n_threads, *shape): as `scratch`, a workspace for each.

    There are twice as many workspaces as threads, and every second one stays unused, as a gap. A processor
    guesses which memory is wanted next and reads it early, far beyond the end of a workspace. If the next
    workspace belonged to another core, each core would take from the other's cache what that one is writing.
    The gaps keep them apart. Without them, cores that share no cache reach less than half of their speed.
    """
    return scratch(name, (2 * get_num_threads(), *shape), dtype)


@formula
def n_threads_of(workspaces):
    """Return how many threads an array of workspaces is for."""
    return len(workspaces) // 2


@formula
def workspace_of(thread):
    """Return the index of a thread's workspace."""
    return 2 * thread


@formula
def block_range(t, n_workspaces, n_blocks):
    """Return the first block of the thread with workspace t, and the first one behind its last."""
    return t * n_blocks // n_workspaces, (t + 2) * n_blocks // n_workspaces


class Arena:
    """Memory for copies of arrays that are wanted for a while and forgotten all at once.

    It takes memory in large chunks and keeps them when it forgets, so that only their first use pays for
    fresh memory.

    Parameters
    ----------
    size : float
        Bytes that all chunks together may take.
    """

    CHUNK_BYTES = 2**26

    def __init__(self, size):
        self.size, self.chunks, self.spare = size, [], []  # a chunk is [memory, bytes in use]

    def forget(self):
        """Let all that is held be overwritten. Nobody may look at it any more.

        What finds room from now on is what would find it in a new Arena.
        """
        self.spare += [memory for memory, _ in self.chunks]
        self.chunks = []

    def hold(self, arrays, times=1):
        """Return copies of arrays, or None if there is no room for all of them.

        So many `times` their size is set aside, as if they were of all images and not of a share of them.
        (Memory that nobody touches costs nothing.)
        """
        sizes = [-(-int(array.nbytes * times) // ALIGNMENT) * ALIGNMENT for array in arrays]
        chunk = self._chunk_with(sum(sizes))
        if chunk is None:
            return None
        copies = []
        for array, size in zip(arrays, sizes, strict=True):
            place = chunk[0][chunk[1] : chunk[1] + array.nbytes]
            copies.append(place.view(array.dtype).reshape(array.shape))
            copy(array, copies[-1])
            chunk[1] += size
        return copies

    def _chunk_with(self, size):
        fitting = next((chunk for chunk in self.chunks if chunk[1] + size <= len(chunk[0])), None)
        if fitting is None:
            fresh = max(size, min(self.CHUNK_BYTES, int(self.size)))
            taken = fresh + sum(len(memory) for memory, _ in self.chunks)
            if taken > self.size:
                return None
            fitting = [self._memory(fresh, self.size - taken), 0]
            self.chunks.append(fitting)
        return fitting

    def _memory(self, size, room):
        """Return memory of this size, spare or new; keep no more spare memory than there is room for."""
        found = next((memory for memory in self.spare if len(memory) == size), None)
        self.spare = [memory for memory in self.spare if memory is not found]
        while sum(map(len, self.spare)) > room:
            self.spare.pop(0)
        return _aligned(size) if found is None else found


def copy(source, target):
    """Copy an array into another of the same shape, by all threads: one is far from what memory can do."""
    copy_rows(source.reshape(len(source), -1), target.reshape(len(target), -1))


@parallel_kernel
def copy_rows(rows, copies):
    # rows, copies (n, m)
    for i in prange(rows.shape[0]):
        for j in range(rows.shape[1]):
            copies[i, j] = rows[i, j]
