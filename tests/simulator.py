"""Repairs of Numba's CUDA simulator: the threads of a block run one at a time, several times as fast.

Numba gives each a thread of Python. Those take Python's lock from each other, while another one polls whether
all of them wait. Here each is a greenlet, which runs until it ends or waits for the others of its block.
"""

import contextlib
import threading
from collections import Counter

import numpy as np
from greenlet import getcurrent, greenlet
from numba import cuda
from numba.cuda.simulator import kernel
from numba.cuda.simulator.cudadrv.devicearray import FakeWithinKernelCUDAArray
from numba.cuda.simulator.kernelapi import Dim3

users = Counter()


def repair():
    """Repair the simulator, in this process."""
    kernel.BlockManager = Block
    kernel.swapped_cuda_module = swapped_cuda_module
    FakeWithinKernelCUDAArray.__getattr__ = attribute_of_array


class Block:
    """The threads of a block of a kernel's grid."""

    n_blocks = 0

    def __init__(self, function, grid_dim, block_dim, debug):
        self.function, self.block_dim = function, block_dim

    def run(self, block_index, *arguments):
        """Run the kernel in all threads of the block."""
        # The kernel asks the current thread of Python who and where it is.
        python_thread = threading.current_thread()
        python_thread.syncthreads = getcurrent().switch
        python_thread.blockIdx = Dim3(*block_index)
        threads = [(Dim3(*index), greenlet(self.function)) for index in np.ndindex(*self.block_dim)]
        # A kernel without a barrier that it needs fails if the thread that writes comes after the one that
        # reads. So every other block begins with the last thread.
        Block.n_blocks += 1
        if Block.n_blocks % 2:
            threads.reverse()
        while threads:
            for index, thread in threads:
                python_thread.threadIdx = index
                thread.switch(*(() if thread else arguments))
            threads = [(index, thread) for index, thread in threads if not thread.dead]


@contextlib.contextmanager
def swapped_cuda_module(function, simulated):
    """Show the simulated `cuda` to a function, until the last thread has left all functions of its module."""
    names = function.__globals__
    users[id(names)] += 1
    if "cuda" in names:
        names["cuda"] = simulated
    try:
        yield
    finally:
        users[id(names)] -= 1
        if "cuda" in names and not users[id(names)]:
            names["cuda"] = cuda


def attribute_of_array(self, name):
    """Return an attribute of the NumPy array that stands for one of the GPU, without a list of all it has."""
    return getattr(self._item._ary, name)
