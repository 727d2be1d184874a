"""RSO (random search optimization): train a small CNN one weight at a time, without gradients.

Reading order: `presets`, `rso` (the loop), `visits`, `batches`, `evaluators`, then `models`,
`layers`, `losses`, `kernels`, and `sgd` beside them.
"""

from . import datasets, evaluators, losses, models, rso, sgd
from .models import Network, build

__version__ = "0.1.0"
__all__ = ["Network", "build", "datasets", "evaluators", "losses", "models", "rso", "sgd"]
