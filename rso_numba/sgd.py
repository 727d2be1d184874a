"""Stochastic gradient descent, for comparison: backpropagation and the update of all weights."""

from math import isfinite
from time import perf_counter

import numpy as np

from . import kernels
from .arguments import generator, number_below
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
        for array, copied in zip(self.arrays, self.copies[1], strict=True):
            copied[...] = array

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
            for array, copied in zip(self.arrays, self.copies[0], strict=True):
                array[...] = copied
            raise FloatingPointError(f"SGD, {self.place}: {error}; the network has the weights of the step "
                                     "before, whose loss was finite. Try a smaller learning_rate") from error


def train(network, data, epochs=10, batch_size=32, learning_rate=0.01, momentum=0.0, *,
          weight_decay=0.0, validation_fraction=0.0, backend="cpu", rng=None, progress=False,
          history=None):
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

    Returns
    -------
    History
        Row 0 is the network before training.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range or does not fit the data.
    FloatingPointError
        If a loss is NaN or infinite; the message says in which epoch and step. The network then has the
        weights of the step before, the last whose loss was finite.
    """
    check_training(network, data, epochs, batch_size, "epochs")
    network.check_finite()
    check_settings(learning_rate, momentum, weight_decay, validation_fraction)
    rng, k = generator(rng), kernels.backend(backend)
    network.fit_scaling(data.train_images)
    order = rng.permutation(len(data.train_images))
    n_validation = round(validation_fraction * len(order))
    held_out, order = order[:n_validation], order[n_validation:]
    if batch_size > len(order):
        raise ValueError(f"batch_size is {batch_size}; {len(order)} images are left to train on")
    history = History("sgd") if history is None else history
    history.end_round(network, data, backend)
    velocity, best_loss, best_state = np.zeros_like(network.weights), np.inf, None
    settings, steps = (learning_rate, momentum, weight_decay), -(-len(order) // batch_size)
    with (ProgressBar(epochs * steps, "step", "SGD", progress) as bar,
          np.errstate(over="ignore", invalid="ignore"), _LastFinite(network) as last_finite):
        for epoch in range(1, epochs + 1):
            begin, order = perf_counter(), rng.permutation(order)
            for step in range(steps):
                chosen = order[step * batch_size : (step + 1) * batch_size]
                last_finite.keep(f"epoch {epoch}, step {step + 1} of {steps}")
                _step(network, data.train_images[chosen], data.train_labels[chosen], k, velocity, *settings)
                last_finite.check()
                history.add_step(len(chosen), network.n_weights)
                bar.update()
            history.seconds += perf_counter() - begin
            history.end_round(network, data, backend)
            bar.set_postfix_str(f"test accuracy {history.rounds[-1].test_accuracy:.3f}")
            if n_validation:
                loss, _ = network.evaluate(data.train_images[held_out], data.train_labels[held_out], backend)
                if loss < best_loss:
                    best_loss = loss
                    best_state = {name: array.copy() for name, array in network.state().items()}
    if best_state is not None:
        network.set_state(best_state)
    return history


def check_settings(learning_rate=0.01, momentum=0.0, weight_decay=0.0, validation_fraction=0.0):
    """Raise ValueError or TypeError unless the numbers of a training are in range; see `train`."""
    highs = {"learning_rate": np.inf, "momentum": 1, "weight_decay": 1, "validation_fraction": 1}
    values = learning_rate, momentum, weight_decay, validation_fraction
    for (name, high), value in zip(highs.items(), values, strict=True):
        number_below(value, name, high)
