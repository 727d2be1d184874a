"""Answers to one question: what is the loss of this mini-batch with this weight changed?

Every evaluator has the same three methods, and the search loop never knows which one it has:

* `set_batch(images, labels, key=None)`: the question is about these images from now on; the same
  key promises the same images;
* `losses(parameter, index, candidates)`: the mean loss for every candidate value of
  `parameter.value[index]`, the first of which is the weight as it is, float64;
* `keep(parameter, index, value)`: this value stays.

One that would have to wait long for each answer may have a fourth, `decide(search, decay)`: it runs the
search with a `Recorder`, which notes what is asked and answers nothing, and decides many trials at a time.
"""

import contextlib

from .. import kernels
from .full import FullForward

__all__ = ["CudaForward", "DeltaForward", "FullForward", "make_evaluator"]  # noqa: F822  (see __getattr__)

EVALUATIONS = ("delta", "full")


def make_evaluator(evaluation, network, backend, momentum, unit="weight"):
    """Return the evaluator for a search.

    Parameters
    ----------
    evaluation : {"delta", "full"}
        Compute only what a weight changes, or everything. The losses are the same. The `numpy`
        backend, steps that change more than one weight, and on a GPU networks that are no chain
        are always evaluated in full.
    network : Network
    backend : {"cpu", "numpy", "cuda", "auto"}
    momentum : float
        How far each mini-batch moves BatchNorm's running statistics.
    unit : str
        See `Preset.unit`.

    Raises
    ------
    ValueError
        If there is no such evaluation or backend.
    GpuError
        If the backend is "cuda" and does not work here.
    """
    if evaluation not in EVALUATIONS:
        raise ValueError(f"unknown evaluation {evaluation!r}; known evaluations: {', '.join(EVALUATIONS)}")
    backend = kernels.resolve(backend)
    if evaluation == "delta" and backend == "cpu" and unit == "weight":
        from .delta import DeltaForward

        return DeltaForward(network, momentum)
    if evaluation == "delta" and backend == "cuda" and unit == "weight":
        kernels.backend("cuda")  # says what is missing, if anything is
        from .cuda import CudaForward
        from .stages import NotAChain

        with contextlib.suppress(NotAChain):
            return CudaForward(network, momentum)
    return FullForward(network, backend, momentum)


def __getattr__(name):
    # these import Numba, which takes a second: not before somebody wants it
    if name == "DeltaForward":
        from .delta import DeltaForward

        return DeltaForward
    if name == "CudaForward":
        from .cuda import CudaForward

        return CudaForward
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
