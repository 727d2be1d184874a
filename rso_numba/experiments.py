"""The comparison that `rso-numba compare` runs: one network trained by RSO, its twin by SGD."""

import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from . import kernels, markdown, models, plots, presets, rso, sgd
from .arguments import training_generator, whole_number
from .checkpoint import Checkpoint
from .datasets import check_images, check_labels, check_training
from .evaluators import MEMORY, FullForward
from .files import make_folder
from .history import History
from .sweeps import read_sweep, sweep  # noqa: F401 (they have a file of their own, which workers import)

SCAN_VALUES = 41  # points of the curve in the picture of one trial


@dataclass(eq=False)
class Comparison:
    """What `compare` returns.

    Parameters
    ----------
    networks, histories : dict
        The trained Network and its History, by solver: "rso" and "sgd".
    files : list of Path
        What was written. compare.png is missing if it could not be drawn.
    interrupted : str or None
        If Ctrl-C ended the training early: where it stopped.
    diverged : dict
        By solver: why its training ended early, if its loss was not finite any more.
    """

    networks: dict
    histories: dict
    files: list = field(default_factory=list)
    interrupted: str | None = None
    diverged: dict = field(default_factory=dict)


def compare(data, model="one_conv", rounds=8, batch_size=1024, preset="paper", *, sgd_epochs=30,
            sgd_batch_size=32, learning_rate=0.1, momentum=0.0, backend="cpu", seed=0, out="rso-out",
            memory=MEMORY, ranks=None, progress=True, report=None, checkpoint_every=None, resume=False):
    """Train one network by RSO and by SGD from the same initial weights, and write what happened.

    The defaults suit the digits of scikit-learn.

    Parameters
    ----------
    data : Dataset
    model : str
        See `models.build`.
    rounds, batch_size, preset
        Of RSO, see `rso.train`.
    sgd_epochs, sgd_batch_size, learning_rate, momentum
        Of SGD, see `sgd.train`.
    backend : {"cpu", "numpy", "cuda", "auto"}
    seed : int
        0 or larger. Draws the initial weights, the steps and the mini-batches.
    out : str or path
        A folder, made if need be, for compare.png, rso.csv, sgd.csv, rso.npz, sgd.npz. Former
        files of these names are replaced.
    memory : float
        Bytes for mini-batches of RSO that come back, see `rso.trials`.
    ranks : Ranks or None
        Processes that share the mini-batches of RSO, see `mpi.py`. All call this with the same arguments and
        train by SGD each for itself; only rank 0 writes.
    progress : bool
        Show progress bars with the time left.
    report : function, optional
        Called with the Comparison when all but the picture is written, for drawing may fail.
    checkpoint_every : float or None
        Seconds between checkpoints, which are rso.checkpoint.npz and sgd.checkpoint.npz in the folder; None
        writes none.
    resume : bool
        Go on from the checkpoints in the folder, see `rso.train`. What they had finished is not done again.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range or does not fit the data, or a checkpoint is damaged or of another
        training.
    FileExistsError
        If there is the checkpoint of an interrupted training, and no `resume`.
    GpuError
        If the GPU fails.

    Warns
    -----
    UserWarning
        If the picture could not be drawn: all else is written then.

    Notes
    -----
    Ctrl-C during the training raises nothing: what was learnt so far is written and returned, see
    `Comparison.interrupted`. It is also written before a GpuError is raised.
    A training that diverges does not stop the other one, see `Comparison.diverged`.
    """
    whole_number(seed, "seed", 0)
    settings = presets.resolve(preset)
    networks = {solver: models.build(model, data.image_shape, data.n_classes, seed, settings)
                for solver in ("rso", "sgd")}
    result = Comparison(networks, {solver: History(solver) for solver in networks})
    check_training(networks["sgd"], data, sgd_epochs, sgd_batch_size, "epochs", "sgd_batch_size")
    # this searches nothing yet, but complains now, not after the SGD, of arguments that do not fit
    rso.trials(networks["rso"], data, rounds, batch_size, settings, backend=backend, memory=memory,
               ranks=ranks, rng=training_generator(seed))
    leads = ranks is None or ranks.leads
    if leads:
        make_folder(out)
    saved = dict.fromkeys(networks, {})
    if checkpoint_every is not None:
        saved = _checkpoints(networks, data, Path(out), checkpoint_every, resume, ranks)
    before = first_filters(networks["rso"]).copy()
    scan = _first_calls(networks, data, batch_size, settings, backend, seed)
    title = f"{data.name}: {model}, {networks['rso'].n_weights:,} weights"
    # SGD first: it takes a moment, and an interrupted search then has something to compare with
    trainings = {
        "sgd": partial(sgd.train, networks["sgd"], data, sgd_epochs, sgd_batch_size, learning_rate, momentum),
        "rso": partial(rso.train, networks["rso"], data, rounds, batch_size, settings, memory=memory,
                       ranks=ranks)}
    write = partial(_write, result, Path(out), before, scan, title, report) if leads else lambda: None
    try:
        for solver, train in trainings.items():
            _train(result, solver, partial(train, backend=backend, rng=training_generator(seed),
                                           progress=progress, **saved[solver]))
    except KeyboardInterrupt:
        result.interrupted = _where(result)
        # BatchNorm's statistics at hand are of the round before
        rso.calibrate(networks["rso"], data, settings, backend)
    except kernels.GpuError as error:  # the network so far is not on the GPU
        rso.calibrate(networks["rso"], data, settings, "cpu")
        write()
        raise kernels.GpuError(f"{error}. {_where(result)}, in {out}") from error
    write()
    return result


def _checkpoints(networks, data, out, checkpoint_every, resume, ranks):
    """Return the arguments of a training that concern checkpoints, by solver; complain early if they fail."""
    if ranks is not None:
        raise ValueError("there are several ranks, which write no checkpoints; leave out checkpoint and "
                         "resume, or start one process")
    paths = {solver: out / f"{solver}.checkpoint.npz" for solver in networks}
    if not resume:
        for solver, network in networks.items():  # is there one of an interrupted training?
            Checkpoint(paths[solver], checkpoint_every).load(False, network, data)
    return {solver: dict(checkpoint=path, checkpoint_every=checkpoint_every, resume=resume)
            for solver, path in paths.items()}


def _train(result, solver, train):
    """Train by a solver. If it diverges, take note why: the other one goes on."""
    try:
        train(history=result.histories[solver])
    except FloatingPointError as error:
        result.diverged[solver] = str(error)


def _first_calls(networks, data, batch_size, settings, backend, seed):
    """Compile every kernel before the clocks start, on copies; return a scan to be drawn."""
    scan = example_trial(networks["rso"], data, batch_size, settings, backend, seed)
    # a search begins in the last layer, which has kernels of its own
    next(rso.trials(_copy(networks["rso"], settings), data, 1, batch_size, settings, backend=backend, rng=0))
    sgd.gradients(networks["sgd"], data.train_images[:2], data.train_labels[:2], backend)
    return scan


def _where(result):
    """Say in which round the training was interrupted, and how much of it the network has seen."""
    histories = result.histories
    if not histories["rso"].rounds:
        solver, part, unit, per_unit = "sgd", "epoch", "steps", result.networks["sgd"].n_weights
    else:
        solver, part, unit, per_unit = "rso", "round", "weight visits", 1
    history = histories[solver]
    if not history.rounds:
        return "interrupted before the training began"
    n = (history.weights_visited - history.rounds[-1].weights_visited) // per_unit
    return (f"interrupted in {part} {len(history.rounds)} of {solver.upper()}; the saved network includes "
            f"the first {n} {unit} of that {part}")


def _write(result, out, before, scan, title, report):
    """Write networks and histories of the solvers that have begun, report, and only then draw the picture."""
    begun = [history for history in result.histories.values() if history.rounds]
    try:
        for history in begun:
            history.to_csv(out / f"{history.solver}.csv")
            result.files.append(out / f"{history.solver}.csv")
            result.networks[history.solver].save(out / f"{history.solver}.npz")
            result.files.append(out / f"{history.solver}.npz")
    finally:  # of what a full disk cannot hold, too
        if report is not None:
            report(result)
    if begun:
        _draw(result, out / "compare.png", begun, before, scan, title)


def _draw(result, path, begun, before, scan, title):
    """Draw the picture; warn if that fails."""
    after = first_filters(result.networks["rso"])
    try:
        plots.save(plots.overview(begun, result.histories["rso"], before, after, scan, title), path)
    except Exception as error:  # matplotlib raises what the fonts, LaTeX or the user's settings make it raise
        former = "; the file there is of a former run" if path.exists() else ""
        warnings.warn(f"{path} could not be drawn ({error}){former}", stacklevel=4)
    else:
        result.files.append(path)


def table(histories):
    """Return the last rows of training histories as a table in Markdown.

    Parameters
    ----------
    histories : iterable of History
        Those without a row are left out.

    Returns
    -------
    str
        Losses in nats; images forwarded and weight visits as `history.Round` counts them.
    """
    rows = [["solver", "rounds or epochs", "train loss", "train accuracy", "test loss", "test accuracy",
             "training seconds", "images forwarded", "weight visits", "accepted %"]]
    for history in histories:
        if not history.rounds:
            continue
        last = history.rounds[-1]
        searched = history.solver == "rso" and last.weights_visited > 0
        rows.append([
            history.solver.upper(), str(last.round),
            f"{last.train_loss:.4f}", f"{last.train_accuracy:.4f}",
            f"{last.test_loss:.4f}", f"{last.test_accuracy:.4f}",
            f"{last.seconds:.1f}", f"{last.images_forwarded:,}", f"{last.weights_visited:,}",
            f"{100 * last.accepted / last.weights_visited:.1f}" if searched else "-",
        ])
    return markdown.table(rows)


def scan_weight(network, parameter, index, values, images, labels, backend="cpu"):
    """Return the loss of a mini-batch for each of many values of one weight; change nothing.

    Parameters
    ----------
    network : Network
    parameter : Parameter
        One of `network.parameters()`.
    index : tuple of int
        The weight is `parameter.value[index]`.
    values : ndarray (n,)
    images : ndarray (N, C, H, W), float32 in [0, 1]
    labels : ndarray (N,), int
    backend : {"cpu", "numpy", "cuda", "auto"}

    Returns
    -------
    ndarray (n,), float64
        Mean cross-entropy in nats. BatchNorm uses the statistics of these images, as in the search.
    """
    images = check_images(images, network.image_shape)
    labels = check_labels(labels, network.n_classes, len(images))
    evaluator = FullForward(network, backend)
    evaluator.set_batch(images, labels)
    return evaluator.losses(parameter, index, values)


def _copy(network, preset):
    copy = models.build(network.name, network.image_shape, network.n_classes, preset=preset)
    copy.set_state(network.state())
    return copy


def example_trial(network, data, batch_size=1024, preset="paper", backend="cpu", seed=0):
    """Search the first convolution of a copy of `network` until a step is accepted; scan that weight.

    Parameters
    ----------
    network : Network
        Not changed.
    data : Dataset
    batch_size, preset, backend
        See `rso.trials`.
    seed : int
        Draws the mini-batch and the steps.

    Returns
    -------
    values, losses : ndarray (41,)
        Loss of the mini-batch, from w - 2 |Delta| to w + 2 |Delta|.
    trial : Trial
        The three arguments of `plots.trial`.
    """
    copy = _copy(network, preset)
    copy.fit_scaling(data.train_images)
    # with a training set of batch_size images, every mini-batch is that set: the scan can use it too
    batch = data.subset(n_train=batch_size, rng=training_generator(seed))
    for trial in rso.trials(copy, batch, 1, batch_size, preset, backend=backend, rng=training_generator(seed),
                            order="first_last", trained=("weight",), unit="weight", fraction=1):
        if trial.accepted:
            break
    (parameter,) = (p for p in copy.parameters() if (p.layer, p.name) == (trial.layer, trial.parameter))
    w = plots.candidates(trial)[0]
    values = np.linspace(w - 2 * abs(trial.delta), w + 2 * abs(trial.delta), SCAN_VALUES)
    losses = scan_weight(copy, parameter, trial.index, values, batch.train_images, batch.train_labels,
                         backend)
    return values, losses, trial


def first_filters(network):
    """Return the weights of the first convolution, (C_out, C_in, k, k): a view, not a copy."""
    return next(p.value for p in network.parameters() if p.value.ndim == 4)
