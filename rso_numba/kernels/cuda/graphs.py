"""CUDA graphs: launches that are recorded once, and then started all together.

Numba has no function for this; NVIDIA's `cuda-bindings`, on which numba-cuda stands, has the driver's own.
"""

import weakref

from numba import config, cuda

from .device import gpu_errors

if config.ENABLE_CUDASIM:
    driver = None
else:
    try:
        from cuda.bindings import driver
    except ImportError:  # an older release of numba-cuda can do without
        driver = None


def record(start):
    """Return the launches of a function as a `Recorded` graph; None where there are no graphs.

    Parameters
    ----------
    start : function
        Of a stream, in which it starts kernels that were started before. They do not run now.
    """
    if driver is None:
        return None
    with gpu_errors():
        stream = cuda.stream()
        handle = driver.CUstream(int(stream.handle))
        relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        _called(driver.cuStreamBeginCapture(handle, relaxed))
        try:
            start(stream)
        finally:
            graph = _called(driver.cuStreamEndCapture(handle))
        recorded = Recorded(_called(driver.cuGraphInstantiate(graph, 0)))
        _called(driver.cuGraphDestroy(graph))
        return recorded


class Recorded:
    """A CUDA graph that can be started; the arrays of its launches have to stay.

    Parameters
    ----------
    graph : CUgraphExec
    """

    def __init__(self, graph):
        self.graph = graph
        weakref.finalize(self, driver.cuGraphExecDestroy, graph).atexit = False  # the driver ends then, too

    def start(self):
        """Start the launches, behind those that were started before; do not wait for them."""
        with gpu_errors():
            _called(driver.cuGraphLaunch(self.graph, driver.CUstream(0)))


class CUDAError(Exception):
    """What the driver complains of."""


def _called(result):
    """Return what a function of the driver returned beside its status; raise CUDAError if it failed."""
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise CUDAError(status.name)
    return values[0] if values else None
