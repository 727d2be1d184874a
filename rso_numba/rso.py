"""RSO: fit a network by changing one weight at a time. `algorithm_1` is the loop, with its line numbers.

    1   draw the weights of every layer d; sigma_d = their standard deviation
    2   for round c = 1..C
    3       for layer d = D..1
    4           for every weight w of layer d
    5               take a mini-batch
    6               draw Delta from N(0, sigma_d)
    7               compute the loss of the mini-batch for w, w + Delta, w - Delta
    8               keep the value with the smallest loss

(Algorithm 1 of arXiv 2005.05955 in our words. The paper says *cycle* where the course notebook and
this package say *round*.) What the paper, its authors' code and the notebook do differently is in
`presets.py`.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from math import isfinite
from time import perf_counter
from typing import Any

import numpy as np

from . import kernels, presets
from .arguments import generator
from .batches import POLICIES, size_of_round
from .checkpoint import SearchCheckpoint
from .datasets import check_training
from .evaluators import MEMORY, make_evaluator
from .evaluators.blocks import BLOCK_IMAGES
from .history import History
from .kernels import formulas
from .layers import RUNNING_MOMENTUM
from .progress import ProgressBar
from .trial_log import TrialLog
from .visits import annealing_factor, draw_step, drawn, layers_of_round, sigmas, visits

CALIBRATION_IMAGES = 2000  # the authors' fixed statistics
CHOICES = ("keep", "plus", "minus", "vertex")
KEEP, PLUS, MINUS, VERTEX = range(len(CHOICES))


def algorithm_1(network, data, evaluator, settings, rounds, batch_size, rng, visits=visits, cursor=None):
    """Train `network` by Algorithm 1; yield a `Trial` a weight. The comments are its line numbers.

    Parameters
    ----------
    network : Network
        With its initial weights, and its input scaling fitted.
    data : Dataset
    evaluator : FullForward, DeltaForward or the like
        See `evaluators`. Nothing that is drawn here depends on what it answers.
    settings : Preset
    rounds, batch_size : int
    rng : Generator
    visits : function
        Which weights are visited, and in which order.
    cursor : Cursor or None
        Where a search goes on that was interrupted: see `checkpoint.py`.
    """
    sigma = sigmas(network, settings.sigma, rng)  # 1
    batches = POLICIES[settings.batches](data, batch_size, rng, settings.hold)
    round_visits, decay = visits(network, settings, sigma), settings.decay
    for c in range(1, rounds + 1):  # 2
        annealing = annealing_factor(settings.annealing, c - 1, rounds)
        batches.batch_size = size_of_round(batch_size, settings.growth, c, rounds, len(data.train_images))
        for parameter, indices, sigma_d in round_visits:  # 3
            if cursor is not None and cursor.is_done(batches):
                continue
            batches.begin(parameter)
            for index in drawn(indices, settings.fraction, rng):  # 4
                if batches.is_due(index):
                    evaluator.set_batch(*batches.draw())  # 5
                before = parameter.value[index].copy()
                w = before * decay
                delta = np.float32(draw_step(rng, settings.step, annealing * sigma_d, w.shape))  # 6
                candidates = w, w + delta, w - delta
                losses = evaluator.losses(parameter, index, candidates).tolist()  # 7
                best = smallest(losses)
                after = candidates[best]
                if settings.choose == "vertex" and formulas.has_vertex(*losses):  # not of Algorithm 1
                    best, after = VERTEX, w + np.float32(formulas.vertex(*losses)) * delta
                if settings.gate:
                    gain, error = evaluator.blocks.gain(step_of(best, losses))
                    if gain <= settings.gate * error:  # not if one is NaN: then w has no finite loss
                        best, after = KEEP, w
                evaluator.keep(parameter, index, after)  # 8
                yield Trial(c, parameter.layer, parameter.name, index, delta, tuple(losses),
                            CHOICES[best], before, after)


def smallest(losses):
    """Return the index of the smallest of three losses: the first on a tie; NaN and infinity lose."""
    return formulas.smallest_of_three(*losses)


def step_of(best, losses):
    """Return the step that a choice is, as a multiple of Delta."""
    return formulas.vertex(*losses) if best == VERTEX else {KEEP: 0, PLUS: 1, MINUS: -1}[best]


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
    choice : {"keep", "plus", "minus", "vertex"}
        The smallest of the three; the earliest in this order on a tie. "vertex" is none of the three: see
        `Preset.choose`. "keep" also where a gate does not let the step pass.
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

    def decided(self, losses, best, before, after):
        """Return the same trial with losses, index of the smallest, weight before and after it."""
        return replace(self, losses=tuple(losses), choice=CHOICES[best], before=before, after=after)


def trials(network, data, rounds=10, batch_size=1024, preset="paper", *, evaluation="delta",
           backend="cpu", evaluator=None, memory=MEMORY, visits=visits, ranks=None, cursor=None, rng=None,
           **overrides):
    """Return an iterator that trains `network` as it is consumed, one `Trial` a weight.

    Parameters
    ----------
    network : Network
        Changed in place. Its input scaling is fitted to the training images if it is not yet.
    data : Dataset
    rounds : int
        How often every weight is visited; with `fraction`, a part of them.
    batch_size : int
        Images of a mini-batch; with `growth`, in the first round.
    preset : {"paper", "authors", "notebook", "best"} or Preset
        Settings of the search. (Input scaling and initial weights are those that
        `models.build` gave the network.)
    evaluation : {"delta", "full"}
        How losses are computed: from what a weight changes, or by whole forward passes. The losses
        are the same, see `evaluators.make_evaluator`.
    backend : {"cpu", "numpy", "cuda", "auto"}
        "cuda" is an NVIDIA GPU; "auto" is "cuda" where that works, else "cpu".
    evaluator : object or None
        Computes the losses in the place of `evaluation` and `backend`: anything with the three methods that
        `evaluators` describes.
    memory : float
        Bytes that delta evaluation may keep of mini-batches that come back. What does not fit is computed
        anew, which takes longer. (Data, and arrays of a few mini-batches, come on top of it.)
    visits : function
        Which weights are visited in a round, and in which order: `visits.visits`, or one with its arguments.
    ranks : Ranks or None
        Processes that share every mini-batch, see `mpi.py`. All call this with the same arguments.
    cursor : Cursor or None
        See `algorithm_1`.
    rng : None, int or Generator
        The one source of all random numbers. 0 is a seed like any other.
    **overrides
        Fields of `Preset`: sigma, annealing, weight_decay, batches, order, trained,
        test_statistics, search_statistics, step, unit, hold, growth, fraction, choose,
        gate.

    Returns
    -------
    iterator of Trial

    Raises
    ------
    ValueError, TypeError
        At once, if an argument is unknown, out of range, or does not fit the data, or differs between ranks.
    FloatingPointError
        At once, if weights are NaN or infinite. Later, if no loss of a trial is finite, or that of an
        infinite weight is the smallest: the message names the trial, whose weight stays as it was.

    Notes
    -----
    Algorithm 1 of arXiv 2005.05955. A GPU decides up to 256 trials before the first of them is returned;
    the network always has the weights of the trials that were.
    """
    settings = presets.resolve(preset, **overrides)
    check_training(network, data, rounds, batch_size, "rounds")
    rng = generator(rng)
    network.check_finite()
    if ranks is not None:
        ranks.require_same({"settings": (settings, rounds, batch_size, evaluation),
                            "rng": rng.bit_generator.state, "train_images": data.train_images,
                            "train_labels": data.train_labels, **network.state()})
    if evaluator is not None and ranks is not None:
        raise ValueError("evaluator and ranks are both given; expected one of them")
    if settings.gate and batch_size <= BLOCK_IMAGES:
        raise ValueError(f"batch_size is {batch_size}, and gate {settings.gate}; expected more than "
                         f"{BLOCK_IMAGES} images, which are a block: two blocks tell how sure a loss is")
    if settings.gate and evaluator is not None and not getattr(evaluator, "by_block", False):
        raise ValueError(f"gate is {settings.gate}, and the evaluator keeps no losses by block; expected "
                         "gate=0, or an evaluator such as FullForward(network, by_block=True)")
    if evaluator is None:
        momentum = RUNNING_MOMENTUM if settings.test_statistics == "running" else 0.0
        fixed = data.train_images[:CALIBRATION_IMAGES] if settings.search_statistics == "fixed" else None
        evaluator = make_evaluator(evaluation, network, backend, momentum, settings.unit, fixed, ranks,
                                   memory, settings.gate > 0)
    network.fit_scaling(data.train_images)
    search = partial(algorithm_1, network, data, settings=settings, rounds=rounds, batch_size=batch_size,
                     rng=rng, visits=visits, cursor=cursor)
    # a GPU takes from this loop what is drawn, and decides many trials at once: see `evaluators`
    decides = hasattr(evaluator, "decide")
    return checked(evaluator.decide(search, settings) if decides else search(evaluator), network)


def checked(stream, network):
    """Yield the trials of a search; raise FloatingPointError at one that leaves no finite loss or weight."""
    values = {(p.layer, p.name): p.value for p in network.parameters()}
    for trial in stream:
        after, several = trial.after, isinstance(trial.after, np.ndarray)
        # a loss that is not finite loses: if w was kept in spite of that, all three are not
        decided = trial.accepted or isfinite(trial.losses[0])
        if not decided or not (np.isfinite(after).all() if several else isfinite(after)):
            values.get((trial.layer, trial.parameter), network.weights)[trial.index] = trial.before
            problem = "an infinite weight has the smallest loss" if decided else "no loss is finite"
            at = f" at {trial.index}" if np.size(trial.index) < 5 else ""  # a layer has many
            raise FloatingPointError(
                f"RSO, round {trial.round}, {trial.layer}.{trial.parameter}{at}: "
                f"{problem} {trial.losses}; the weight stays as it was. Begin with smaller weights or give a "
                "smaller sigma")
        yield trial


def train(network, data, rounds=10, batch_size=1024, preset="paper", *, evaluation="delta",
          backend="cpu", evaluator=None, memory=MEMORY, ranks=None, rng=None, track_trials=False,
          progress=False, history=None, on_trial=None, on_layer=None, on_round=None, trial_log=None,
          checkpoint=None, checkpoint_every=60, resume=False, **overrides):
    """Train `network` by RSO and return what happened, round by round.

    Parameters
    ----------
    network, data, rounds, batch_size, preset, evaluation, backend, evaluator, memory, ranks, rng, **overrides
        See `trials`.
    track_trials : bool
        Keep every `Trial` in `history.trials`.
    progress : bool
        Show a progress bar with the time left.
    history : History or None
        Written to as the rounds end, so that a caller who interrupts the training keeps them.
    on_trial, on_layer : function or None
        Called with every `Trial`; with the last one of a layer.
    on_round : function or None
        Called with the `history.Round` of every round that ends. If one of the three returns True, the
        training ends there, and its last row is that of the network as it is then.
    trial_log : str, path or None
        A CSV file to which every trial is written: see `trial_log.py`.
    checkpoint : str, path or None
        A file (.npz) from which an interrupted training can go on: see `checkpoint.py`.
    checkpoint_every : float
        Seconds from one checkpoint to the next.
    resume : bool or "previous"
        Go on from the checkpoint if there is one, to the same weights, bit for bit; network, data and
        settings have to be the same, and weights and `rng` are those of the checkpoint. "previous" takes the
        checkpoint before the last one.

    Returns
    -------
    History
        Row 0 is the network before training.

    Raises
    ------
    ValueError, TypeError
        See `trials`; or if a checkpoint is damaged or of another training.
    FileExistsError
        If there is the checkpoint of an interrupted training, and no `resume`.
    FloatingPointError
        See `trials`; or if, after a round, the loss of an image is not finite.
    KeyboardInterrupt
        With a checkpoint, after the trial during which Ctrl-C or SIGTERM came, and when it is written.
    """
    settings, rng = presets.resolve(preset, **overrides), generator(rng)
    history = History("rso") if history is None else history
    if checkpoint is not None and track_trials:
        raise ValueError("track_trials is True, which a checkpoint does not keep; use trial_log with it")
    if ranks is not None and (checkpoint is not None or trial_log is not None):
        raise ValueError("ranks write neither checkpoint nor trial_log; leave them out, or start one process")
    saved = SearchCheckpoint(checkpoint, checkpoint_every, network, rng, history)
    stream = trials(network, data, rounds, batch_size, settings, evaluation=evaluation, backend=backend,
                    evaluator=evaluator, memory=memory, ranks=ranks, cursor=saved.cursor, rng=rng)
    goes_on = saved.begin(resume, data, settings=asdict(settings), rounds=rounds, batch_size=batch_size,
                          evaluation=evaluation, backend=kernels.resolve(backend), memory=memory)
    if not goes_on:
        _end_round(history, network, data, settings, backend)
    layers, n_images = layers_of_round(network, settings), len(data.train_images)
    n_trials, is_over = rounds * sum(sum(lengths) for _, lengths in layers), saved.is_finished
    sizes = [size_of_round(batch_size, settings.growth, c, rounds, n_images) for c in range(1, rounds + 1)]
    with (ProgressBar(n_trials, "weight", "RSO", progress) as bar, saved,
          TrialLog(trial_log, history.weights_visited) as log):
        bar.update(history.weights_visited)

        def take_note(trial):
            history.add_trial(trial, 3 * sizes[trial.round - 1], track_trials)
            log.write(trial)
            bar.update()
            saved.after_trial()
            return on_trial is not None and on_trial(trial)

        while not is_over and len(history.rounds) <= rounds:
            is_over = _search_round(stream, layers, history, saved, take_note, on_layer)
            _end_round(history, network, data, settings, backend)
            bar.set_postfix_str(f"test accuracy {history.rounds[-1].test_accuracy:.3f}")
            is_over = is_over or (on_round is not None and on_round(history.rounds[-1]))
        saved.finish()
    return history


def _search_round(stream, layers, history, saved, on_trial, on_layer):
    """Take the trials of a round from the stream; return whether a callback ends the training."""
    visit, is_over = (len(history.rounds) - 1) * sum(len(lengths) for _, lengths in layers), False
    for name, lengths in layers:
        if saved.begin_layer(visit, name):
            begin = perf_counter()
            for trial in islice(stream, sum(lengths)):
                is_over = on_trial(trial)
                if is_over:
                    break
            history.seconds += perf_counter() - begin
            if is_over or (on_layer is not None and on_layer(trial)):
                return True
        visit += len(lengths)
    return False


def _end_round(history, network, data, settings, backend):
    try:
        calibrate(network, data, settings, backend)
        history.end_round(network, data, backend)
    except FloatingPointError as error:
        raise FloatingPointError(f"RSO, after round {len(history.rounds)}: {error}") from error


def calibrate(network, data, settings, backend):
    """Give BatchNorm the statistics of the first images for use outside the search, if `settings` say so."""
    if network.has_batchnorm and settings.test_statistics == "first_2000":
        network.calibrate(data.train_images[:CALIBRATION_IMAGES], backend)
