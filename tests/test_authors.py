"""The preset `authors`, judged by the authors' whole program: order, steps, mini-batches, losses, choices.

The program is written out here with NumPy, in float64, from what the authors' MXNet code does; it shares
nothing with the package but the initial weights. To save time, both visit every n-th weight of an array.
"""

import naive
import numpy as np
import pytest

from rso_numba import rso
from rso_numba.models import build
from rso_numba.visits import visits

FILTERS = {"paper_mnist": [16] * 6, "paper_cifar10": [16] * 3 + [32] * 6}
POOLED = {"paper_mnist": {2, 4}, "paper_cifar10": {3, 5}}  # convolutions that an average pool follows
SKIPS = {"paper_mnist": {}, "paper_cifar10": {3: 1, 5: 3, 7: 5, 9: 7}}  # where a sum ends: where it begins
ROUNDS, BATCH_SIZE = 50, 20


class Program:
    """What the authors' code computes.

    Parameters
    ----------
    name : str
        Of the network.
    weights : dict of (str, str) to ndarray
        By layer and name.
    images : ndarray (N, C, H, W)
    labels : ndarray (N,)
    step : int
        One in so many weights of an array is visited.
    """

    def __init__(self, name, weights, images, labels, step):
        self.filters, self.pooled, self.skips = FILTERS[name], POOLED[name], SKIPS[name]
        self.weights, self.labels, self.step = weights, labels, step
        self.images = images - images.mean((0, 2, 3), dtype=np.float64, keepdims=True)

    def conv(self, x, layer):
        weight = self.weights[layer, "weight"].astype(np.float64)
        size = weight.shape[-1]
        x = np.pad(x, ((0, 0), (0, 0), (size // 2,) * 2, (size // 2,) * 2))
        windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (2, 3))
        return np.moveaxis(np.tensordot(windows, weight, ((1, 4, 5), (1, 2, 3))), -1, 1)

    def batchnorm(self, x, layer, statistics):
        """Normalize by the mini-batch's statistics, and note them; or by those given."""
        if statistics is None:
            self.noted[layer] = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
        mean, variance = (statistics or self.noted)[layer]
        gamma, beta = (self.weights[layer, name].reshape(-1, 1, 1) for name in ("gamma", "beta"))
        return (x - mean) / np.sqrt(variance + 1e-3) * gamma + beta

    def blocks(self, x, begin=1, statistics=None):
        """Return the output of each convolution's BatchNorm, from that of convolution `begin` - 1 on."""
        outputs, self.noted = {begin - 1: x}, {}
        for i in range(begin, len(self.filters) + 1):
            x = outputs[i - 1] if i == 1 else np.maximum(outputs[i - 1], 0)
            x = self.conv(x, f"conv{i}")
            if i in self.skips:
                skipped = outputs[self.skips[i]]
                if skipped.shape[1] != x.shape[1]:
                    skipped = self.conv(skipped, "shortcut_conv1")
                    skipped = self.batchnorm(skipped, "shortcut_batchnorm1", statistics)
                x = x + skipped
            if i in self.pooled:
                n, c, h, w = x.shape
                x = x.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))
            outputs[i] = self.batchnorm(x, f"batchnorm{i}", statistics)
        return outputs

    def loss(self, at, w, x, labels, begin):
        """Return the loss with w for the weight at `at`, x the output of BatchNorm `begin` - 1, or images."""
        layer, name, index = at
        self.weights[layer, name][index] = w
        features = self.blocks(x, begin)[len(self.filters)].max((2, 3))
        return naive.mean_loss(features @ self.weights["dense1", "weight"].T.astype(np.float64), labels)

    def visits(self):
        """Return layer, name, sigma and where the forward pass begins, in the order of the search."""
        n = len(self.filters)
        order = [("dense1", "weight", np.sqrt(2 / self.filters[-1]), n + 1)]
        for i in range(n, 0, -1):
            begin = self.skips[i] + 1 if i in self.skips else i
            sigma = np.sqrt(2 / self.weights[f"conv{i}", "weight"][0].size)
            layers = [(f"conv{i}", f"batchnorm{i}")]
            if i in self.skips and self.filters[self.skips[i] - 1] != self.filters[i - 1]:
                layers.append(("shortcut_conv1", "shortcut_batchnorm1"))
            for conv, norm in layers:
                order.append((conv, "weight", sigma, begin))
                order += [(norm, name, 0.167, begin) for name in ("beta", "gamma")]
        return order

    def trials(self, rng):
        """Yield where a weight is (layer, name, index), its step, and what `loss` needs to know more."""
        n_slices = len(self.images) // BATCH_SIZE
        for e in range(ROUNDS):
            annealing = 0.1 + 0.9 * (ROUNDS - e) / ROUNDS
            for layer, name, sigma, begin in self.visits():
                if name == "weight":
                    order = rng.permutation(len(self.images))
                    self.blocks(self.images)
                    cached = self.blocks(self.images[order], 1, self.noted)[begin - 1]
                indices = list(np.ndindex(self.weights[layer, name].shape))[:: self.step]
                for i, index in enumerate(indices):
                    own = slice(i % n_slices * BATCH_SIZE, (i % n_slices + 1) * BATCH_SIZE)
                    delta = rng.normal(0, annealing * sigma)
                    yield (layer, name, index), delta, (cached[own], self.labels[order[own]], begin)


@pytest.mark.parametrize("name, step", [("paper_mnist", 41), ("paper_cifar10", 211)])
def test_search_is_that_of_the_authors_program(name, step, small):
    network = build(name, small.image_shape, rng=0, preset="authors")
    weights = {(p.layer, p.name): p.value.copy() for p in network.parameters()}
    program = Program(name, weights, small.train_images, small.train_labels, step)

    def some_visits(*args):
        return [(parameter, indices[::step], sigma) for parameter, indices, sigma in visits(*args)]

    choices, expected = [], program.trials(np.random.default_rng(1))
    for trial in rso.trials(network, small, ROUNDS, BATCH_SIZE, "authors", visits=some_visits, rng=1):
        if trial.round == 2 and trial.layer != "dense1":
            break
        at, delta, batch = next(expected)
        layer, parameter, index = at
        value = weights[layer, parameter]
        assert (trial.layer, trial.parameter, trial.index) == at
        assert trial.before == value[index] and trial.delta == pytest.approx(delta, rel=1e-6)
        w = trial.before * np.float32(1 - 1e-4)
        candidates = w, w + trial.delta, w - trial.delta
        losses = [program.loss(at, candidate, *batch) for candidate in candidates]
        assert trial.losses == pytest.approx(losses, rel=1e-5), str(trial)
        best = naive.choose(trial.losses)
        assert trial.after == candidates[best] and trial.choice == rso.CHOICES[best]
        value[index] = trial.after
        choices.append(trial.choice)
    assert len(choices) > 250 and set(choices) == {"keep", "plus", "minus"}
