"""The arithmetic, once for every backend: `plain.py` (NumPy), `cpu/` and `cuda/` (Numba) are twins."""

import importlib.util
import os

from . import threads

BACKENDS = ("cpu", "numpy", "cuda")
BACKEND_CHOICES = (*BACKENDS, "auto")


class GpuError(RuntimeError):
    """The GPU cannot compute: it or its software is missing, its memory is full, or it stopped answering."""


def resolve(name):
    """Return the name of the backend to use: "auto" is "cuda" where that works, else "cpu".

    Raises
    ------
    ValueError
        If there is no such backend.
    """
    if name not in BACKEND_CHOICES:
        raise ValueError(f"unknown backend {name!r}; known backends: {', '.join(BACKEND_CHOICES)}")
    if name == "auto":
        return "cpu" if gpu_problem() else "cuda"
    return name


def backend(name):
    """Return the module of kernels called `name`, importing (and compiling) nothing else.

    Raises
    ------
    ValueError
        If there is no such backend.
    GpuError
        If it is "cuda" and does not work here; the message says what is missing.
    RuntimeError
        If it is "cpu" and this process has lost its threads by a fork, see `threads`.
    """
    name = resolve(name)
    if name == "cpu":
        threads.require_threads()
        from . import cpu

        return cpu
    if name == "numpy":
        from . import plain

        return plain
    if problem := gpu_problem():
        raise GpuError(f"the cuda backend cannot run: {problem}. backend='cpu' needs no GPU")
    from . import cuda

    return cuda


def gpu_problem():
    """Return why the `cuda` backend cannot run here and how to mend it, as text; None if it can."""
    simulated = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") != "0"
    if not simulated and importlib.util.find_spec("numba_cuda") is None:
        return ("the package numba-cuda is not installed; install it and the CUDA toolkit with: "
                "pip install -e '.[cuda]' (or [cuda12], for drivers older than CUDA 13)")
    from .cuda.device import problem

    return problem()
