"""Launches: what `cuda.py` prepares once and starts again and again.

A *launch* is a kernel, its number of CUDA blocks, and its arguments; or a function without arguments, where a
layer does by itself what no epilogue can do.
"""

from ..kernels.cuda.device import launch_blocks
from ..kernels.cuda.graphs import record

FEW = 2  # recording takes longer than two starts


class Launches:
    """Launches that are started one after the other, and from the third time on as one CUDA graph.

    For one launch the host needs longer (30 to 50 microseconds) than the GPU for most kernels. A graph starts
    them all at once.

    Parameters
    ----------
    launches : list
    """

    def __init__(self, launches):
        self.launches, self.graph, self.n_starts = launches, None, 0

    def start(self):
        """Start them, and wait for none."""
        self.n_starts += 1
        if self.graph is not None:
            self.graph.start()
            return
        start_all(self.launches)
        if self.n_starts == FEW and not any(callable(launch) for launch in self.launches):
            self.graph = record(lambda stream: start_all(self.launches, stream))


def start_all(launches, stream=0):
    """Start launches one after the other; wait for none."""
    for launch in launches:
        if callable(launch):
            launch()
        else:
            kernel, n_blocks, arguments = launch
            launch_blocks(kernel, n_blocks, *arguments, stream=stream)
