"""A row of a table of results: what is trained, and how."""

from dataclasses import dataclass, field
from itertools import islice
from time import perf_counter

from . import models, presets, rso, sgd, visits
from .arguments import training_generator
from .batches import size_of_round
from .evaluators import MEMORY
from .history import History

FEW = 32  # images are enough to compile the kernels


@dataclass(frozen=True)
class Published:
    """What a source reports of a row; None where it reports nothing.

    Parameters
    ----------
    rounds : int or None
        After so many; None if the source does not say.
    accuracy, loss, seconds : float or None
        On the test set of MNIST, on the machine of the source.
    """

    rounds: int | None
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
    if settings.unit != "weight":
        return _train_units(row, network, data, settings, backend, rng)
    saved = dict(checkpoint=checkpoint, resume=checkpoint is not None)
    if row.solver == "sgd":
        return sgd.train(network, data, row.rounds, row.batch_size, **row.overrides, backend=backend, rng=rng,
                         progress=progress, **saved)
    return rso.train(network, data, row.schedule or row.rounds, row.batch_size, settings, backend=backend,
                     memory=memory, rng=rng, progress=progress, **saved,
                     on_round=lambda last: last.round >= row.rounds)


def _train_units(row, network, data, settings, backend, rng):
    """Search by steps of whole filters, layers or the network; return the History.

    A round has as many trials here as the network has weights. Those of `rso.train` have only a few, and
    after each it evaluates all images.
    """
    history, n_weights = History("rso"), network.n_weights
    n_rounds = row.rounds * n_weights
    trials = rso.trials(network, data, n_rounds, row.batch_size, settings, evaluation="full",
                        backend=backend, rng=rng)
    history.end_round(network, data, backend)
    for _ in range(row.rounds):
        begin = perf_counter()
        for trial in islice(trials, n_weights):
            images = size_of_round(row.batch_size, settings.growth, trial.round, n_rounds,
                                   len(data.train_images))
            history.add_trial(trial, 3 * images, track=False)
        history.seconds += perf_counter() - begin
        rso.calibrate(network, data, settings, backend)
        history.end_round(network, data, backend)
    return history


def _compile(row, data, backend):
    """Compile every kernel before the clock starts, on a network and images of its own."""
    few = data.subset(n_train=FEW, rng=0)
    network = models.build(row.model, data.image_shape, data.n_classes, 0, row.settings)
    if row.solver == "sgd":
        sgd.gradients(network, few.train_images, few.train_labels, backend)
        return

    def one_weight_each(*arguments):
        return [(parameter, list(indices)[:1], sigma)
                for parameter, indices, sigma in visits.visits(*arguments)]

    evaluation = "delta" if row.settings.unit == "weight" else "full"
    for _ in rso.trials(network, few, 1, FEW, row.settings, evaluation=evaluation, backend=backend,
                        visits=one_weight_each, rng=0):
        pass
