"""RSO (random search optimization): train a small CNN one weight at a time, without gradients.

Reading order: `rso` (the loop) with `presets`, `batches`, `visits`, `layers` with `models` and `losses`,
`kernels/plain.py`, `evaluators/full.py`, `evaluators/delta_plain.py`; `sgd` beside them. How it is made fast:
`evaluators/graph.py`, `kinds.py`, `reach.py`, `delta.py`, `batch_cache.py`, then `kernels/cpu/` and
`kernels/cuda/`. The words of the code are in `GLOSSARY.md`.
"""

from . import datasets, evaluators, losses, models, rso, sgd
from .models import Network, build

__version__ = "0.1.0"
__all__ = ["CNNClassifier", "Network", "build", "datasets", "evaluators", "losses",  # noqa: F822
           "models", "rso", "sgd"]


def __getattr__(name):
    if name == "CNNClassifier":  # not before somebody wants it: importing scikit-learn takes a second
        from .estimator import CNNClassifier

        return CNNClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
