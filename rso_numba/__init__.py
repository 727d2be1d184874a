"""RSO (random search optimization): train a small CNN one weight at a time, without gradients.

Reading order: `rso` (the loop) with `presets`, `batches`, `visits`, `layers` with `models` and `losses`,
`kernels/plain.py`, `evaluators/full.py`, `evaluators/delta_plain.py`; `sgd` beside them. How it is made fast:
`evaluators/graph.py`, `kinds.py`, `reach.py`, `delta.py`, `batch_cache.py`, then `kernels/cpu/` and
`kernels/cuda/`. The words of the code are in `GLOSSARY.md`.
"""

from . import datasets, evaluators, losses, models, rso, sgd
from .models import Network, build

__version__ = "0.1.0"
__all__ = ["Network", "build", "datasets", "evaluators", "losses", "models", "rso", "sgd"]
