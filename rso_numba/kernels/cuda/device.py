"""What all kernels of the `cuda` backend share: the threads they run in, copies, and what can go wrong.

A CUDA block has LANES x ROWS threads. The lanes of a row are a warp and hold LANES images, so a warp reads
one line of the cache; the rows work on different pixels or channels. A kernel comes in one of two forms:

* `launch(kernel, n, ...)`: every row takes tasks from 0 to n - 1 by itself;
* `launch_blocks(kernel, n, ...)`: all rows of a CUDA block take a task together, and add up what they found.
"""

import contextlib
import functools
import warnings

import numpy as np
from numba import config, cuda

from .. import GpuError

# Numba's simulator starts a thread of Python for every thread of the GPU: a few must do
LANES, ROWS, MOST_BLOCKS = (4, 2, 2) if config.ENABLE_CUDASIM else (32, 4, 65535)
THREADS = LANES * ROWS  # a power of two, see block_sum

# An index that could be negative takes more instructions, as it would count from the end. Where kernels spend
# their time, this says that it is none.
unsigned = np.uint64

warnings.filterwarnings("ignore", ".*Grid size")  # a small batch is a small grid: Numba warns at each launch

# what the driver's complaints are called; the modules that hold them differ between releases of numba-cuda
DRIVER_ERRORS = {"CudaDriverError", "CudaAPIError", "CudaSupportError", "CUDAError"}


def launch(kernel, n_tasks, *arguments):
    """Start `kernel`, whose rows share `n_tasks` tasks; do not wait for it."""
    launch_blocks(kernel, -(-n_tasks // ROWS), *arguments)


def launch_blocks(kernel, n_tasks, *arguments, rows=ROWS, stream=0):
    """Start `kernel`, whose CUDA blocks share `n_tasks` tasks; do not wait for it."""
    with gpu_errors():
        kernel[(1, max(1, min(n_tasks, MOST_BLOCKS))), (LANES, rows), stream](*arguments)


@cuda.jit(device=True)
def block_sum(parts, part):
    """Return the sum of `part` over the threads of a CUDA block, always added in the same order."""
    # parts (n_threads,) in shared memory, a power of two; every thread of the block must come here
    thread = cuda.threadIdx.y * LANES + cuda.threadIdx.x
    cuda.syncthreads()  # nobody reads the former sum any more
    parts[thread] = part
    half = parts.size // 2
    while half > 0:
        cuda.syncthreads()
        if thread < half:
            parts[thread] += parts[thread + half]
        half //= 2
    cuda.syncthreads()
    return parts[0]


def empty(shape, dtype):
    """Return an uninitialized array on the GPU."""
    with gpu_errors():
        return cuda.device_array(shape, dtype)


def to_device(array):
    """Return a copy of a NumPy array on the GPU."""
    with gpu_errors():
        return cuda.to_device(np.ascontiguousarray(array))


def to_host(array):
    """Return a copy of a GPU array as a NumPy array, after all kernels have ended."""
    with gpu_errors():
        return array.copy_to_host()


@contextlib.contextmanager
def gpu_errors():
    """Raise GpuError, with what to do, for whatever the driver complains of."""
    try:
        yield
    except Exception as error:
        if DRIVER_ERRORS.isdisjoint(kind.__name__ for kind in type(error).__mro__):
            raise
        if "OUT_OF_MEMORY" in str(error):
            raise GpuError(f"the memory of the GPU is full ({error}); take a smaller batch_size, end other "
                           "programs that use the GPU, or use backend='cpu'") from error
        raise GpuError(f"the GPU does not answer ({error}); what it held is lost. Look at nvidia-smi and "
                       "start Python again, or use backend='cpu'") from error


@functools.cache
def problem():
    """Return why no kernel runs here and how to mend it, as text; None if kernels run."""
    try:
        if not cuda.is_available():
            return _missing_part()
        if not config.ENABLE_CUDASIM and cuda.runtime.get_version() >= (13, 0) and _capability() < (7, 5):
            return ("the GPU has compute capability {}.{} and CUDA 13 needs 7.5; install the older toolkit "
                    "with: pip install -e '.[cuda12]'").format(*_capability())
        numbers = to_device(np.zeros(1, np.float32))
        launch(probe_kernel, 1, numbers)
        to_host(numbers)
    except Exception as error:  # a broken installation raises many things, and each has to be told
        return (f"a first kernel did not run ({type(error).__name__}: {error}); if nvidia-smi names a CUDA "
                "version below 13, install the older toolkit with: pip install -e '.[cuda12]'")
    return None


@cuda.jit
def probe_kernel(numbers):
    # numbers (1,)
    lane, row = cuda.grid(2)
    if lane == 0 and row == 0:
        numbers[0] = np.float32(1)


def _missing_part():
    error = cuda.cuda_error()
    if error is not None:
        return (f"no driver of an NVIDIA GPU answers ({' '.join(str(error).split())}); install it from "
                "https://www.nvidia.com/drivers and see whether nvidia-smi lists the GPU")
    if len(cuda.gpus) == 0:
        return "the driver sees no GPU; see whether nvidia-smi lists it, and look at CUDA_VISIBLE_DEVICES"
    return ("the CUDA toolkit, which compiles the kernels, was not found; install it with: "
            "pip install -e '.[cuda]' (or [cuda12], for drivers older than CUDA 13)")


def _capability():
    return tuple(cuda.get_current_device().compute_capability)


def peaks():
    """Return the most that the GPU can do in a second: float32 multiply-adds, and bytes of its memory.

    From what the driver says of it: multiprocessors x clock x 128 units each (which some GPUs have fewer of),
    and clock of the memory x 2 x width of its bus.
    """
    device = cuda.get_current_device()
    multiply_adds = device.MULTIPROCESSOR_COUNT * device.CLOCK_RATE * 1e3 * 128
    return multiply_adds, device.MEMORY_CLOCK_RATE * 1e3 * 2 * device.GLOBAL_MEMORY_BUS_WIDTH / 8


def device_name():
    """Return the name and the compute capability of the GPU."""
    if config.ENABLE_CUDASIM:
        return "Numba's simulator of a GPU"
    name = cuda.get_current_device().name
    name = name.decode() if isinstance(name, bytes) else name
    return "{}, compute capability {}.{}".format(name, *_capability())
