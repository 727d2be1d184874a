"""The rows of the tables that `rso-numba table` makes, and how one of them is trained.

What was published stands beside what is to be measured here. `results.py` keeps what was measured.
"""

from dataclasses import dataclass, field

from . import models, presets, rso, sgd, visits
from .arguments import training_generator
from .evaluators import MEMORY


@dataclass(frozen=True)
class Published:
    """What a source reports of a row; None where it reports nothing.

    Parameters
    ----------
    rounds : int
        After so many.
    accuracy, loss, seconds : float or None
        On the test set of MNIST, on the machine of the source.
    """

    rounds: int
    accuracy: float | None = None
    loss: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Row:
    """A training that is repeated with several seeds.

    Parameters
    ----------
    name : str
        In its table no other row has it.
    model : str
        See `models.build`.
    batch_size : int
    rounds : int
        How many are trained: rounds of RSO, epochs of SGD.
    preset : str
        For SGD: input scaling and initial weights.
    overrides : dict
        Fields of `presets.Preset` for RSO; learning_rate and momentum for SGD.
    solver : {"rso", "sgd"}
    schedule : int or None
        Rounds that the annealing is made for; None if they are those that are trained.
    published : tuple of Published
    """

    name: str
    model: str
    batch_size: int
    rounds: int
    preset: str = "paper"
    overrides: dict = field(default_factory=dict)
    solver: str = "rso"
    schedule: int | None = None
    published: tuple = ()

    @property
    def settings(self):
        """Settings of the search, a Preset; for SGD those that `models.build` reads."""
        return presets.resolve(self.preset, **self.overrides if self.solver == "rso" else {})


def _notebook(model, batch_size, published):
    return Row(f"RSO, {model}, batch {batch_size}", model, batch_size, 10, "notebook",
               published=(published,))


def _notebook_sgd(model):
    return Row(f"SGD, {model}, batch 32", model, 32, 10, "notebook", {"learning_rate": 0.01}, "sgd")


# accuracy, loss and seconds as the notebook's tables have them; of `original` it ran one round
NOTEBOOK = (
    _notebook("one_conv", 32, Published(10, 0.8075, 0.632, 212)),
    _notebook("one_conv", 64, Published(10, 0.8353, 0.553, 345)),
    _notebook("one_conv", 256, Published(10, 0.8929, 0.372, 1641)),
    _notebook("one_conv", 512, Published(10, 0.9152, 0.297, 2834)),
    _notebook("one_conv", 1024, Published(10, 0.9148, 0.301, 5046)),
    _notebook_sgd("one_conv"),
    _notebook("two_conv", 32, Published(10, 0.8504, 0.513, 1457)),
    _notebook("two_conv", 512, Published(10, 0.9397, 0.193, 19186)),
    _notebook("two_conv", 1000, Published(10, 0.9604, 0.126, 36464)),
    _notebook_sgd("two_conv"),
    _notebook("original", 256, Published(1, seconds=5240)),
    _notebook("original", 1000, Published(1, seconds=73042)),
    _notebook_sgd("original"),
)

TABLES = {"notebook": NOTEBOOK}


def chosen(name, texts=("",)):
    """Return the rows of a table in whose names stands one of `texts`.

    Raises
    ------
    ValueError
        If there is no such table, or no such row in it.
    """
    if name not in TABLES:
        raise ValueError(f"there is no table {name!r}; expected one of {', '.join(TABLES)}")
    rows = [row for row in TABLES[name] if any(text in row.name for text in texts)]
    if not rows:
        raise ValueError(f"no row of the table {name!r} has {' or '.join(map(repr, texts))} in its name; its "
                         f"rows are {'; '.join(row.name for row in TABLES[name])}")
    return rows


def train(row, data, seed, *, backend="cpu", memory=MEMORY, progress=False, checkpoint=None):
    """Train a row's network with a seed.

    Parameters
    ----------
    row : Row
    data : Dataset
    seed : int
        Draws initial weights, steps and mini-batches, as in `rso-numba compare`.
    backend, memory, progress
        See `rso.train`.
    checkpoint : str, path or None
        See `rso.train`. If the file is there, the training goes on from it.

    Returns
    -------
    History
    """
    settings = row.settings
    network = models.build(row.model, data.image_shape, data.n_classes, seed, settings)
    _compile(row, data, backend)
    rng = training_generator(seed)
    saved = dict(checkpoint=checkpoint, resume=checkpoint is not None)
    if row.solver == "sgd":
        return sgd.train(network, data, row.rounds, row.batch_size, **row.overrides, backend=backend, rng=rng,
                         progress=progress, **saved)
    return rso.train(network, data, row.schedule or row.rounds, row.batch_size, settings, backend=backend,
                     memory=memory, rng=rng, progress=progress, **saved,
                     on_round=lambda last: last.round >= row.rounds)


def _compile(row, data, backend):
    """Compile every kernel before the clock starts, on a network and images of its own."""
    few = data.subset(64, 64, rng=0)
    network = models.build(row.model, data.image_shape, data.n_classes, 0, row.settings)
    if row.solver == "sgd":
        sgd.train(network, few, 1, backend=backend, rng=0)
        return

    def one_weight_each(*arguments):
        return [(parameter, list(indices)[:1], sigma)
                for parameter, indices, sigma in visits.visits(*arguments)]

    for _ in rso.trials(network, few, 1, 32, row.settings, backend=backend, visits=one_weight_each, rng=0):
        pass
