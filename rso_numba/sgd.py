"""Stochastic gradient descent, for comparison: backpropagation and the update of all weights."""

from functools import partial
from math import isfinite
from time import perf_counter

import numpy as np

from . import kernels
from .arguments import generator, number_below
from .checkpoint import Checkpoint, named, part, rng_state, set_rng_state
from .datasets import check_images, check_labels, check_training
from .history import History
from .layers import RUNNING_MOMENTUM, BatchNorm
from .passes import Pass
from .progress import ProgressBar


def gradients(network, images, labels, backend="cpu"):
    """Return the gradient of the mean cross-entropy of a mini-batch.

    Parameters
    ----------
    network : Network
        BatchNorm uses the mini-batch's statistics.
    images : ndarray (N, C, H, W), float32 in [0, 1]
    labels : ndarray (N,), int
    backend : {"cpu", "numpy", "cuda", "auto"}

    Returns
    -------
    list of ndarray
        In the order of `network.parameters()`.

    Raises
    ------
    ValueError, TypeError
        If images or labels do not fit the network.
    """
    images = check_images(images, network.image_shape)
    labels = check_labels(labels, network.n_classes, len(images))
    return _gradients(network, images, labels, kernels.backend(backend), momentum=0.0)


def _gradients(network, images, labels, k, momentum):
    run = Pass(k, len(images), batch_statistics=True, momentum=momentum, saved={})
    logits = network.propagate(k.pack(images), run)
    network.backpropagate(k.cross_entropy_backward(logits, labels), run)
    return [run.gradients[p.layer, p.name] for p in network.parameters()]


def _step(network, images, labels, k, velocity, learning_rate, momentum, weight_decay):
    gradient = _gradients(network, images, labels, k, RUNNING_MOMENTUM)
    velocity *= np.float32(momentum)
    velocity += np.concatenate([g.ravel() for g in gradient])
    velocity += np.float32(weight_decay) * network.weights
    network.weights -= np.float32(learning_rate) * velocity


class _LastFinite:
    """Gives a network its last weights with a finite loss back if a FloatingPointError leaves the context."""

    def __init__(self, network):
        statistics = [getattr(leaf, name) for leaf in network.leaves if isinstance(leaf, BatchNorm)
                      for name in leaf.buffer_names]
        self.arrays = [network.weights, *statistics]
        self.copies = [[array.copy() for array in self.arrays] for _ in range(2)]  # of the last two steps
        self.place = "before the training"

    def keep(self, place):
        """Copy the network before a step; `place` names the step in the message."""
        self.place = place
        self.copies.reverse()
        for array, kept in zip(self.arrays, self.copies[1], strict=True):
            kept[...] = array

    def check(self):
        """Raise FloatingPointError if the gradient of a step, and so its loss, was not finite."""
        # squares of huge numbers are infinite too, but adding up is ten times as quick as looking at each
        total = sum(float(np.vdot(array, array)) for array in self.arrays)
        if not isfinite(total) and not np.isfinite(np.concatenate(self.arrays)).all():
            raise FloatingPointError("the loss is not finite")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, FloatingPointError):
            for array, kept in zip(self.arrays, self.copies[0], strict=True):
                array[...] = kept
            raise FloatingPointError(f"SGD, {self.place}: {error}; the network has the weights of the step "
                                     "before, whose loss was finite. Try a smaller learning_rate") from error


def train(network, data, epochs=10, batch_size=32, learning_rate=0.01, momentum=0.0, *,
          weight_decay=0.0, validation_fraction=0.0, backend="cpu", rng=None, progress=False,
          history=None, on_round=None, checkpoint=None, checkpoint_every=60, resume=False):
    """Train `network` by stochastic gradient descent and return what happened, epoch by epoch.

    The defaults are the notebook's. One step is v <- momentum v + gradient + weight_decay w,
    w <- w - learning_rate v.

    Parameters
    ----------
    network : Network
        Changed in place. Its input scaling is fitted to the training images if it is not yet.
    data : Dataset
    epochs : int
        Passes over the training set, shuffled anew each time.
    batch_size : int
        The last mini-batch of an epoch may be shorter.
    learning_rate, momentum, weight_decay : float
    validation_fraction : float
        If positive, this fraction of the training set is not trained on, and the network ends
        with a copy of the weights that had the smallest loss on it (never on the test set).
    backend : {"cpu", "numpy", "cuda", "auto"}
    rng : None, int or Generator
    progress : bool
        Show a progress bar with the time left.
    history : History or None
        See `rso.train`.
    on_round : function or None
        Called with the `history.Round` of every epoch that ends; if it returns True, the training ends there.
    checkpoint, checkpoint_every, resume
        See `rso.train`. The training goes on from the step at which it was interrupted.

    Returns
    -------
    History
        Row 0 is the network before training.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range or does not fit the data, or a checkpoint is damaged or of another
        training.
    FileExistsError, KeyboardInterrupt
        See `rso.train`.
    FloatingPointError
        If a loss is NaN or infinite; the message says in which epoch and step. The network then has the
        weights of the step before, the last whose loss was finite.
    """
    check_training(network, data, epochs, batch_size, "epochs")
    network.check_finite()
    check_settings(learning_rate, momentum, weight_decay, validation_fraction)
    settings = dict(learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay)
    rng, k = generator(rng), kernels.backend(backend)
    network.fit_scaling(data.train_images)
    history = History("sgd") if history is None else history
    run = _Run(network, len(data.train_images), validation_fraction, rng)
    if batch_size > len(run.order):
        raise ValueError(f"batch_size is {batch_size}; {len(run.order)} images are left to train on")
    saved, steps = Checkpoint(checkpoint, checkpoint_every), -(-len(run.order) // batch_size)
    found = saved.load(resume, network, data, solver="sgd", epochs=epochs, batch_size=batch_size,
                       validation_fraction=validation_fraction, backend=kernels.resolve(backend), **settings)
    if found is not None:
        run.restore(history, *found)
    else:
        history.end_round(network, data, backend)
    with (ProgressBar(epochs * steps, "step", "SGD", progress) as bar, saved,
          np.errstate(over="ignore", invalid="ignore"), _LastFinite(network) as last_finite):
        bar.update((len(history.rounds) - 1) * steps + run.step)
        while not run.is_over and len(history.rounds) <= epochs:
            if run.step == 0:
                run.order = rng.permutation(run.order)
            while run.step < steps:
                chosen = run.order[run.step * batch_size : (run.step + 1) * batch_size]
                run.step += 1
                saved.place = f"epoch {len(history.rounds)}, step {run.step} of {steps}"
                last_finite.keep(saved.place)
                begin, images = perf_counter(), data.train_images[chosen]
                _step(network, images, data.train_labels[chosen], k, run.velocity, **settings)
                last_finite.check()
                history.seconds += perf_counter() - begin
                history.add_step(len(chosen), network.n_weights)
                bar.update()
                saved.after_step(partial(run.state, history))
            run.step = 0
            history.end_round(network, data, backend)
            bar.set_postfix_str(f"test accuracy {history.rounds[-1].test_accuracy:.3f}")
            run.validate(data, backend)
            run.is_over = on_round is not None and on_round(history.rounds[-1])
        if run.best:
            network.set_state(run.best)
        saved.write(*run.state(history), is_finished=True)
    return history


class _Run:
    """What SGD remembers from step to step, beside the network's weights."""

    def __init__(self, network, n_images, validation_fraction, rng):
        self.network, self.rng, order = network, rng, rng.permutation(n_images)
        n_validation = round(validation_fraction * n_images)
        self.held_out, self.order = order[:n_validation], order[n_validation:]  # order: of this epoch
        self.velocity, self.step, self.is_over = np.zeros_like(network.weights), 0, False
        self.best_loss, self.best = np.inf, {}  # of the epochs so far, and the network then

    def validate(self, data, backend):
        """Keep the network if its loss on the images held out is the smallest so far."""
        if len(self.held_out):
            images, labels = data.train_images[self.held_out], data.train_labels[self.held_out]
            loss, _ = self.network.evaluate(images, labels, backend)
            if loss < self.best_loss:
                self.best_loss, self.best = loss, self.network.copied_state()

    def state(self, history):
        """Return (header, arrays) for a checkpoint."""
        header = {"step": self.step, "best_loss": self.best_loss, "draws": rng_state(self.rng),
                  "history": history.to_dict()}
        arrays = dict(velocity=self.velocity, order=self.order, held_out=self.held_out)
        return header, arrays | named("network", self.network.state()) | named("best", self.best)

    def restore(self, history, header, arrays):
        """Go on from what `state` returned."""
        self.step, self.best_loss, self.is_over = header["step"], header["best_loss"], header["is_finished"]
        set_rng_state(self.rng, header["draws"])
        history.restore(header["history"])
        self.network.set_state(part("network", arrays))
        self.best, self.velocity = part("best", arrays), arrays["velocity"].copy()
        self.order, self.held_out = arrays["order"], arrays["held_out"]


def check_settings(learning_rate=0.01, momentum=0.0, weight_decay=0.0, validation_fraction=0.0):
    """Raise ValueError or TypeError unless the numbers of a training are in range; see `train`."""
    highs = {"learning_rate": np.inf, "momentum": 1, "weight_decay": 1, "validation_fraction": 1}
    values = learning_rate, momentum, weight_decay, validation_fraction
    for (name, high), value in zip(highs.items(), values, strict=True):
        number_below(value, name, high)
