"""RSO: fit a network by changing one weight at a time. Algorithm 1, line by line.

    1   draw the weights of every layer d; sigma_d = their standard deviation
    2   for round c = 1..C
    3       for layer d = D..1
    4           for every weight w of layer d
    5               take a mini-batch
    6               draw Delta from N(0, sigma_d)
    7               compute the loss of the mini-batch for w, w + Delta, w - Delta
    8               keep the value with the smallest loss

(Algorithm 1 of arXiv 2005.05955 in our words. The paper says *cycle* where the course notebook and
this package say *round*.) `_draws` and `_decide` below are that loop: what is drawn, and what follows from
the losses; the comments give the lines. What the paper, its authors' code and the notebook do differently is
in `presets.py`.
"""

from dataclasses import dataclass
from itertools import islice
from math import inf, isfinite
from time import perf_counter
from typing import Any

import numpy as np
from tqdm import tqdm

from . import presets
from .batches import POLICIES
from .evaluators import evaluator
from .history import History
from .visits import annealing_factor, draw_step, visits

RUNNING_MOMENTUM = 0.1  # of BatchNorm's running statistics, as in the notebook
CALIBRATION_IMAGES = 2000  # the authors' fixed statistics

KEEP, PLUS, MINUS = 0, 1, 2
CHOICES = ("keep", "plus", "minus")


@dataclass(frozen=True, slots=True)
class Trial:
    """One visit to one weight.

    Parameters
    ----------
    round : int
        1..rounds.
    layer, parameter : str
        Such as "conv1" and "weight".
    index : tuple of int
        Position in the parameter's array. (With a larger `unit`, whatever indexes the unit, and
        `delta`, `before` and `after` are arrays.)
    delta : float
        The step that was drawn, Delta.
    losses : tuple of float
        Mean cross-entropy for (w, w + Delta, w - Delta).
    choice : {"keep", "plus", "minus"}
        The smallest of the three; the earliest in this order on a tie.
    before, after : float
        The weight before the visit (and before weight decay) and after it.
    """

    round: int
    layer: str
    parameter: str
    index: Any
    delta: Any
    losses: tuple
    choice: str
    before: Any
    after: Any

    @property
    def accepted(self):
        """Whether the weight was changed by the step."""
        return self.choice != "keep"


def smallest(losses):
    """Return the index of the smallest loss: the first on a tie; NaN and infinity lose."""
    losses = [loss if isfinite(loss) else inf for loss in losses]
    return losses.index(min(losses))


@dataclass(frozen=True, slots=True)
class Draw:
    """What is drawn for a trial before any loss is known; `batch` is None where the last one is held."""

    round: int
    parameter: Any
    index: Any
    batch: tuple | None
    delta: Any


def _draws(network, data, rounds, batch_size, settings, rng):
    round_visits = visits(network, settings, rng)  # line 1
    batches = POLICIES[settings.batches](data, batch_size, rng)
    for c in range(1, rounds + 1):  # line 2
        factor = annealing_factor(settings.annealing, c - 1, rounds)
        for parameter, indices, sigma in round_visits:  # line 3
            batches.begin(parameter)
            held_for = None  # output channel that the mini-batch is held for
            for index in indices:  # line 4
                batch = None
                if settings.hold == "weight" or index[0] != held_for:
                    batch = batches.draw()  # line 5
                    held_for = index[0] if settings.hold == "filter" else None
                shape = np.shape(parameter.value[index])
                delta = np.float32(draw_step(rng, settings.step, factor * sigma, shape))  # line 6
                yield Draw(c, parameter, index, batch, delta)


def _decide(judge, draws, decay):
    for draw in draws:
        if draw.batch is not None:
            judge.set_batch(*draw.batch)
        parameter, index = draw.parameter, draw.index
        before = parameter.value[index].copy()
        w = before * decay
        candidates = (w, w + draw.delta, w - draw.delta)
        losses = judge.losses(parameter, index, candidates).tolist()  # line 7
        best = smallest(losses)
        judge.keep(parameter, index, candidates[best])  # line 8
        yield draw, losses, best, before, candidates[best]


def _search(draws, judge, settings):
    # nothing that is drawn depends on a loss: an evaluator may decide many trials at once by itself
    decay = np.float32(1 - settings.weight_decay)
    decided = judge.decide(draws, decay) if hasattr(judge, "decide") else _decide(judge, draws, decay)
    for draw, losses, best, before, after in decided:
        yield Trial(draw.round, draw.parameter.layer, draw.parameter.name, draw.index, draw.delta,
                    tuple(losses), CHOICES[best], before, after)


def trials(network, data, rounds=10, batch_size=1024, preset="paper", *, evaluation="delta",
           backend="cpu", rng=None, **overrides):
    """Return an iterator that trains `network` as it is consumed, one `Trial` a weight.

    Parameters
    ----------
    network : Network
        Changed in place. Its input scaling is fitted to the training images if it is not yet.
    data : Dataset
    rounds : int
        How often every weight is visited.
    batch_size : int
        Images of a mini-batch.
    preset : {"paper", "authors", "notebook"} or Preset
        Settings of the search. (Input scaling and initial weights are those that
        `models.build` gave the network.)
    evaluation : {"delta", "full"}
        How losses are computed: from what a weight changes, or by whole forward passes. The losses
        are the same, see `evaluators.evaluator`.
    backend : {"cpu", "numpy", "cuda", "auto"}
        "cuda" is an NVIDIA GPU; "auto" is "cuda" where that works, else "cpu".
    rng : None, int or Generator
        The one source of all random numbers. 0 is a seed like any other.
    **overrides
        Fields of `Preset`: sigma, annealing, weight_decay, batches, order, trained,
        test_statistics, step, unit, hold.

    Returns
    -------
    iterator of Trial

    Raises
    ------
    ValueError, TypeError
        At once, if an argument is unknown, out of range, or does not fit the data.

    Notes
    -----
    Algorithm 1 of arXiv 2005.05955. A GPU decides up to 256 trials before the first of them is returned;
    the network always has the weights of the trials that were.
    """
    settings = presets.resolve(preset, **overrides)
    check_training(network, data, rounds, batch_size, "rounds")
    momentum = RUNNING_MOMENTUM if settings.test_statistics == "running" else 0.0
    judge = evaluator(evaluation, network, backend, momentum, settings.unit)
    network.fit_scaling(data.train_images)
    draws = _draws(network, data, rounds, batch_size, settings, np.random.default_rng(rng))
    return _search(draws, judge, settings)


def train(network, data, rounds=10, batch_size=1024, preset="paper", *, evaluation="delta",
          backend="cpu", rng=None, track_trials=False, progress=False, history=None, **overrides):
    """Train `network` by RSO and return what happened, round by round.

    Parameters
    ----------
    network, data, rounds, batch_size, preset, evaluation, backend, rng, **overrides
        See `trials`.
    track_trials : bool
        Keep every `Trial` in `history.trials`.
    progress : bool
        Show a progress bar with the time left.
    history : History or None
        Written to as the rounds end, so that a caller who interrupts the training keeps them.

    Returns
    -------
    History
        Row 0 is the network before training.

    Raises
    ------
    ValueError, TypeError
        See `trials`.
    """
    settings = presets.resolve(preset, **overrides)
    history = History("rso") if history is None else history
    stream = trials(network, data, rounds, batch_size, settings, evaluation=evaluation,
                    backend=backend, rng=rng)
    per_round = sum(len(indices) for _, indices, _ in visits(network, settings, np.random.default_rng(0)))
    _record(history, network, data, settings, backend)
    with tqdm(total=rounds * per_round, unit="weight", desc="RSO", disable=not progress) as bar:
        for _ in range(rounds):
            begin = perf_counter()
            for trial in islice(stream, per_round):
                history.add_trial(trial, 3 * min(batch_size, len(data.train_images)), track_trials)
                bar.update()
            history.seconds += perf_counter() - begin
            _record(history, network, data, settings, backend)
            bar.set_postfix_str(f"test accuracy {history.rounds[-1].test_accuracy:.3f}")
    return history


def _record(history, network, data, settings, backend):
    if network.has_batchnorm and settings.test_statistics == "first_2000":
        network.calibrate(data.train_images[:CALIBRATION_IMAGES], backend)
    history.end_round(network, data, backend)


def check_training(network, data, count, batch_size, count_name):
    """Raise ValueError or TypeError unless the arguments of a training fit together."""
    for name, value in ((count_name, count), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} is {value!r}; expected a positive whole number")
        if value < 1:
            raise ValueError(f"{name} is {value}; expected a positive whole number")
    if batch_size > len(data.train_images):
        raise ValueError(f"batch_size is {batch_size}, larger than the training set of "
                         f"{len(data.train_images)} images; expected at most that")
    if data.image_shape != network.image_shape or data.n_classes != network.n_classes:
        raise ValueError(
            f"the network was built for images {network.image_shape} in {network.n_classes} classes, "
            f"the data has {data.image_shape} in {data.n_classes}; build it with "
            "image_shape=data.image_shape, n_classes=data.n_classes"
        )
