"""The evaluators answer one question: what the loss of a mini-batch is if one weight is changed.

Every evaluator has the same three methods, and the search loop never knows which one it has:

* `set_batch(images, labels, key=None)`: the question is about these images from now on, an array or
  `batches.LazyImages`, of which np.asarray makes one; the same key promises the same images;
* `losses(parameter, index, candidates)`: the mean loss for every candidate value of
  `parameter.value[index]`, the first of which is the weight as it is, float64;
* `keep(parameter, index, value)`: this value stays.

With `by_block=True` (but for `CudaForward`) they also keep what they last answered by blocks of images, in
`blocks`, for `Preset.gate`.

One that would have to wait long for each answer may have a fourth, `decide(search, decay)`: it runs the
search with a `Recorder`, which notes what is asked and answers nothing, and decides many trials at a time.
"""

import warnings

from .. import kernels
from ..arguments import number_below
from .delta_plain import PlainDeltaForward
from .full import FullForward
from .graph import NoDelta

__all__ = ["CudaForward", "DeltaForward", "FullForward", "NoDelta",  # noqa: F822  (see __getattr__)
           "PlainDeltaForward", "make_evaluator"]

EVALUATIONS = ("delta", "full")
MEMORY = 3.5e9  # bytes that delta evaluation keeps of mini-batches that come back, unless somebody says less


def make_evaluator(evaluation, network, backend="cpu", momentum=0.0, unit="weight", fixed_images=None,
                   ranks=None, memory=MEMORY, by_block=False):
    """Return the evaluator for a search.

    Parameters
    ----------
    evaluation : {"delta", "full"}
        Compute only what a weight changes, or everything. The losses are the same.
    network : Network
    backend : {"cpu", "numpy", "cuda", "auto"}
    momentum : float
        How far each mini-batch moves BatchNorm's running statistics.
    unit : str
        See `Preset.unit`.
    fixed_images : ndarray (N, C, H, W) or None
        If given, BatchNorms before the layer that is being searched use the statistics of these images.
    ranks : Ranks or None
        Processes that share every mini-batch, see `mpi.py`. They need the backend "cpu".
    memory : float
        Bytes that delta evaluation, on the CPU or a GPU, may keep of mini-batches that come back.
    by_block : bool
        Whether losses are wanted by blocks of images, too.

    Raises
    ------
    ValueError
        If there is no such evaluation or backend, or ranks cannot use it, or it has no losses by block.
    GpuError
        If the backend is "cuda" and does not work here.

    Warns
    -----
    UserWarning
        If delta evaluation cannot be done, on any backend: then everything is computed in full.
    """
    if evaluation not in EVALUATIONS:
        raise ValueError(f"unknown evaluation {evaluation!r}; known evaluations: {', '.join(EVALUATIONS)}")
    backend = kernels.resolve(backend)
    kernels.backend(backend)  # says what is missing, if anything is
    if ranks is not None and backend != "cpu":
        raise ValueError(f"backend is {backend!r}; expected 'cpu', the only one that ranks can share")
    if by_block and ranks is not None:
        raise ValueError("a gate needs the losses of all images in one process; expected gate=0 with ranks")
    memory = number_below(memory, "memory")
    options = {} if ranks is None else {"ranks": ranks}
    options |= {} if backend == "numpy" else {"memory": memory}
    options |= {} if backend == "cuda" else {"by_block": by_block}
    if evaluation == "delta":
        try:
            if unit != "weight":
                raise NoDelta(f"a step changes a whole {unit} (unit={unit!r})")
            if by_block and backend == "cuda":
                raise ValueError("a GPU that evaluates by delta decides by mean losses, and a gate needs "
                                 "them by block; expected gate=0, evaluation='full' or backend='cpu'")
            return _delta_forward(backend)(network, momentum, fixed_images, **options)
        except NoDelta as reason:
            warnings.warn(f"every loss is computed by a whole forward pass, because {reason}, which delta "
                          "evaluation cannot do; evaluation='full' does the same without this warning",
                          stacklevel=3)
    if ranks is not None:
        from .share import SharedFullForward

        return SharedFullForward(network, momentum, fixed_images, ranks)
    return FullForward(network, backend, momentum, fixed_images, by_block)


def _delta_forward(backend):
    """Return the class; two of them import Numba, which takes a second: not before somebody wants it."""
    if backend == "numpy":
        return PlainDeltaForward
    if backend == "cpu":
        from .delta import DeltaForward

        return DeltaForward
    from .cuda import CudaForward

    return CudaForward


def __getattr__(name):
    if name in ("DeltaForward", "CudaForward"):
        return _delta_forward("cpu" if name == "DeltaForward" else "cuda")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
