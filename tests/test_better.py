"""Settings that are not of the paper: mini-batches that grow, rounds that visit a part of the weights."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from networks import small_network

from rso_numba import datasets, rso
from rso_numba.batches import Slices, size_of_round
from rso_numba.layers import Dense, Flatten
from rso_numba.models import Network, build
from rso_numba.presets import resolve
from rso_numba.visits import layers_of_round, visits


class Watched:
    """An evaluator that takes note of its mini-batches; every candidate is as good as any other."""

    def __init__(self):
        self.batches = []

    def set_batch(self, images, labels, key=None):
        self.batches.append((images, labels, key))

    def losses(self, parameter, index, candidates):
        return np.zeros(3)

    def keep(self, parameter, index, value):
        pass


def test_mini_batches_grow_by_the_same_factor():
    assert [size_of_round(100, 16, c, 5, 10_000) for c in range(1, 6)] == [100, 200, 400, 800, 1600]
    assert [size_of_round(100, 16, c, 5, 1000) for c in range(1, 6)] == [100, 200, 400, 800, 1000]
    assert [size_of_round(100, 1, c, 3, 1000) for c in (1, 2, 3)] == [100, 100, 100]
    assert [size_of_round(8, 1e-3, c, 2, 1000) for c in (1, 2)] == [8, 1]
    assert size_of_round(100, 16, 1, 1, 1000) == 100


@pytest.mark.parametrize("batches", ["fresh", "slices", "partition"])
@pytest.mark.parametrize("trained", [("weight",), ("bias",)])
def test_every_policy_gives_larger_mini_batches(small, batches, trained):
    """70 images: the last part of a partition in 20 is short, that in 40 too."""
    watched, network = Watched(), Network([Flatten(), Dense(10)], small.image_shape, 10)
    network.initialize("he", 0)
    trials = list(rso.trials(network, small, 3, 10, batches=batches, growth=4, trained=trained, sigma=0.1,
                             evaluator=watched, rng=0))
    sizes = {c: set() for c in (1, 2, 3)}
    for trial, (_, labels, _) in zip(trials, watched.batches, strict=True):
        sizes[trial.round].add(len(labels))
    assert sizes == {1: {10}, 2: {10, 20} if batches == "partition" else {20},
                     3: {30, 40} if batches == "partition" else {40}}
    seen = {}
    for images, labels, key in watched.batches:
        assert len(np.unique(images, axis=0)) == len(images) == len(labels)
        if key is not None:  # the same key, the same images
            assert np.array_equal(seen.setdefault(key, images), images)
    assert bool(seen) == (batches != "fresh")


def test_slices_of_one_shuffle_that_differ_in_size_differ_in_key(small, rng):
    policy = Slices(small, 10, rng)
    gamma, keys = build("paper_mnist", small.image_shape).parameters()[1], []
    for policy.batch_size in (10, 20):
        policy.begin(gamma)  # which does not shuffle anew
        keys.append(policy.draw()[2])
    assert gamma.name == "gamma" and policy.n_shuffles == 1 and keys[0] != keys[1]


def test_images_are_counted_as_the_mini_batches_grow(small):
    network = build("one_conv", small.image_shape, rng=0)
    history = rso.train(network, small, 3, 10, growth=4, backend="numpy", rng=0)
    assert history["images_forwarded"] == [0, 3 * 690 * 10, 3 * 690 * 30, 3 * 690 * 70]


@pytest.mark.parametrize("unit, expected", [
    ("weight", {"conv1.weight": 4, "conv1.bias": 1, "dense1.weight": 64, "dense1.bias": 1}),
    ("filter", {"conv1.weight": 1, "conv1.bias": 1, "dense1.weight": 1, "dense1.bias": 1}),
    ("layer", {"conv1.weights": 1, "dense1.weights": 1})])
def test_a_round_visits_a_part_of_every_parameter(small, unit, expected):
    network = build("one_conv", small.image_shape, rng=0)
    settings = resolve("paper", fraction=0.1, unit=unit)
    trials = list(rso.trials(network, small, 40, 10, settings, evaluator=Watched(), rng=0))
    order, rounds = [str(p) for p, _, _ in visits(network, settings, Counter())], []
    for c in range(1, 41):
        own = [t for t in trials if t.round == c]
        names = [f"{t.layer}.{t.parameter}" for t in own]
        assert Counter(names) == expected
        assert names == sorted(names, key=order.index)
        rounds.append([(t.layer, t.parameter, t.index) for t in own])
        if unit != "layer":
            inside = [index for _, name, index in rounds[-1] if name == "weight"]
            assert inside == [i for p, indices, _ in visits(network, settings, Counter()) for i in indices
                              if p.name == "weight" and (p.layer, p.name, i) in rounds[-1]]
    if unit == "weight":
        visited = Counter(weight for own in rounds for weight in own)
        assert 0.97 * 690 < len(visited) <= 690  # (1 - 1/10)^40 of them are left out
        assert sum(map(sum, (lengths for _, lengths in layers_of_round(network, settings)))) == 70
        assert max(visited[w] for w in visited if w[1] == "weight") < 16


def test_a_part_is_counted_and_shown_layer_by_layer(small):
    network, layers = build("one_conv", small.image_shape, rng=0), []
    history = rso.train(network, small, 2, 10, fraction=0.1, backend="numpy", rng=0,
                        on_layer=lambda trial: layers.append((trial.round, trial.layer)))
    assert history["weights_visited"] == [0, 70, 140]
    assert history["images_forwarded"] == [0, 2100, 4200]
    assert layers == [(1, "dense1"), (1, "conv1"), (2, "dense1"), (2, "conv1")]


def test_all_of_the_weights_need_no_draw(small):
    streams = [rso.trials(build("one_conv", small.image_shape, rng=0), small, 1, 10, backend="numpy", rng=0,
                          **settings) for settings in ({}, {"fraction": 1, "growth": 1})]
    for one, other in zip(*(islice(stream, 100) for stream in streams), strict=True):
        assert one == other


@pytest.mark.parametrize("name", ["one_conv", "paper_mnist"])
@pytest.mark.parametrize("batches", ["slices", "partition"])
@pytest.mark.parametrize("backend", ["cpu", "numpy"])
def test_delta_evaluation_knows_mini_batches_of_any_size(name, batches, backend, rng):
    images, labels = rng.random((40, 1, 6, 5), np.float32), rng.integers(3, size=40)
    data = datasets.Dataset(images, labels, images[:5], labels[:5], 3)
    networks = [small_network(name) for _ in range(2)]
    streams = [rso.trials(network, data, 3, 9, batches=batches, evaluation=evaluation, backend=backend, rng=0,
                          growth=4, fraction=0.5, sigma=0.3)
               for network, evaluation in zip(networks, ("full", "delta"), strict=True)]
    for full, delta in zip(*streams, strict=True):
        np.testing.assert_allclose(delta.losses, full.losses, 1e-5, 1e-6)
        if full.choice != delta.choice:
            networks[1].weights[:] = networks[0].weights


@pytest.mark.parametrize("settings, message", [
    ({"growth": 0}, "growth is 0; expected 0 < growth < inf"),
    ({"growth": np.inf}, "growth is inf; expected 0 < growth < inf"),
    ({"growth": "2"}, "growth is '2'; expected a number"),
    ({"fraction": 0}, "fraction is 0; expected 0 < fraction <= 1"),
    ({"fraction": 1.1}, "fraction is 1.1; expected 0 < fraction <= 1"),
    ({"fraction": True}, "fraction is True; expected a number"),
    ({"fraction": np.nan}, "fraction is nan; expected 0 < fraction <= 1")])
def test_bad_settings(small, settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        rso.train(build("one_conv", small.image_shape), small, 1, 10, **settings)
