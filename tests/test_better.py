"""Settings that are not of the paper: mini-batches that grow, a part of the weights, the gate."""

from collections import Counter
from itertools import islice

import naive
import numpy as np
import pytest
from networks import small_network

from rso_numba import datasets, rso
from rso_numba.batches import Slices, size_of_round
from rso_numba.evaluators import FullForward, PlainDeltaForward, make_evaluator
from rso_numba.evaluators.blocks import Blocks, sums_by_block
from rso_numba.kernels import formulas
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


# ---- the gate ----


def naive_gain(losses, step, delta):
    """Mean and standard error of what the images gain, by the parabola through the three losses of each.

    losses (3, N); one number for each whole block of 16 images.
    """
    gains = []
    for three in losses.T:
        a, b, c = np.polyfit([0, delta, -delta], three, 2)
        gains.append(three[0] - (a * (step * delta) ** 2 + b * step * delta + c))
    blocks = [np.mean(gains[i : i + 16]) for i in range(0, len(gains), 16)]
    return np.mean(gains), np.std(blocks, ddof=1) / np.sqrt(len(blocks))


@pytest.mark.parametrize("step", [1, -1, 0.3, -2])
def test_gain_and_standard_error(step, rng):
    losses = rng.random((3, 64))
    blocks = Blocks(np.array([sums_by_block(row) for row in losses]), 64)
    assert blocks.sums.shape == (3, 4)
    np.testing.assert_allclose(blocks.gain(step), naive_gain(losses, step, 0.7), rtol=1e-9)


def test_a_short_block_counts_as_what_it_is():
    # 16 images gain 1 each and 8 gain 3: the mean is 5/3, and the sums deviate by -32/3 and 32/3 from their
    # share, so the standard error is sqrt(2 / 1 * 2 * (32/3)^2) / 24 = 8/9
    blocks = Blocks(np.array([[16.0, 24.0], [0.0, 0.0], [99.0, 99.0]]), 24)
    assert blocks.gain(1) == pytest.approx((5 / 3, 8 / 9))


def test_the_standard_error_is_that_of_repeated_samples(rng):
    """A step that changes nothing on average, tried on many samples of 72 images: five blocks."""
    lucky = []
    for _ in range(2000):
        losses = np.zeros((3, 72))
        losses[1] = rng.standard_normal(72)
        gain, error = Blocks(np.array([sums_by_block(row) for row in losses]), 72).gain(1)
        lucky.append(gain > 2.776 * error)  # the 97.5 % point of Student's t with 4 degrees of freedom
    assert np.mean(lucky) == pytest.approx(0.025, abs=0.012)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_one_block_tells_nothing_and_what_is_infinite_cannot_be_kept():
    assert Blocks(np.array([[9.0], [1.0], [1.0]]), 10).gain(1) == (0.8, np.inf)
    gain, error = Blocks(np.array([[np.inf, 1.0], [1.0, 1.0], [1.0, 1.0]]), 32).gain(1)
    assert not gain <= 0.1 * error


@pytest.mark.parametrize("evaluation, backend", [
    ("full", "numpy"), ("full", "cpu"), ("delta", "numpy"), ("delta", "cpu")])
@pytest.mark.parametrize("name", ["one_conv", "paper_mnist"])
def test_losses_by_block_are_those_of_the_images(name, evaluation, backend, rng):
    """Every weight; again when a change was kept, and with a mini-batch that comes back."""
    network = small_network(name)
    images, labels = rng.random((37, 1, 6, 5), np.float32), rng.integers(3, size=37)
    network.fit_scaling(images)
    evaluator = make_evaluator(evaluation, network, backend, by_block=True)
    full = FullForward(network, "numpy")
    for parameter in reversed(network.parameters()):
        for n, index in enumerate(np.ndindex(parameter.value.shape)):
            size = 37 if n % 3 else 24
            evaluator.set_batch(images[:size], labels[:size], key=size)
            w, step = parameter.value[index], np.float32(rng.normal(0, 0.5))
            candidates = w * np.float32(1 - n % 2 / 100), w + step, w - step
            losses = evaluator.losses(parameter, index, candidates)
            for candidate, loss, sums in zip(candidates, losses, evaluator.blocks.sums, strict=True):
                expected = []
                for start in range(0, size, 16):
                    own = slice(start, min(start + 16, size))
                    if name == "one_conv":  # without BatchNorm an image's loss is its own
                        full.set_batch(images[own], labels[own])
                        expected.append((own.stop - start) * full.losses(parameter, index, [candidate])[0])
                np.testing.assert_allclose(sums, expected or sums, rtol=2e-5, atol=1e-5)
                assert loss == pytest.approx(sums.sum() / size, rel=1e-6) and len(sums) == -(-size // 16)
            assert evaluator.blocks.n_images == size
            evaluator.keep(parameter, index, candidates[n % 3])


@pytest.mark.parametrize("choose", ["smallest", "vertex"])
@pytest.mark.parametrize("backend", ["cpu", "numpy"])
def test_the_gate_keeps_what_is_not_surely_worse(digits, choose, backend):
    data, accepted = digits.subset(200, 10, rng=0), []
    for gate in (0, 0.5, 2, 100):
        network = build("one_conv", digits.image_shape, rng=0)
        watched = PlainDeltaForward(network, by_block=True) if backend == "numpy" else None
        trials = []
        stream = rso.trials(network, data, 1, 48, choose=choose, gate=gate, weight_decay=1e-3, rng=0,
                            backend=backend, evaluator=watched)
        for trial in islice(stream, 100):
            trials.append(trial)
            if watched and gate:
                ungated = rso.smallest(trial.losses)
                step = (0, 1, -1)[ungated]
                if choose == "vertex" and formulas.has_vertex(*trial.losses):
                    ungated, step = rso.VERTEX, naive.vertex(1, trial.losses)
                gain, error = watched.blocks.gain(step)
                passes = gain > gate * error
                assert trial.choice == rso.CHOICES[ungated if passes else rso.KEEP]
            if trial.choice == "keep":
                assert trial.after == trial.before * np.float32(1 - 1e-3)
        accepted.append(sum(trial.accepted for trial in trials))
    assert accepted[0] > accepted[1] > accepted[2] > accepted[3] == 0


@pytest.mark.parametrize("name", ["one_conv", "paper_mnist"])
def test_the_gate_decides_alike_however_losses_are_computed(name, rng):
    images, labels = rng.random((60, 1, 6, 5), np.float32), rng.integers(3, size=60)
    data = datasets.Dataset(images, labels, images[:5], labels[:5], 3)
    ways = [("full", "numpy"), ("full", "cpu"), ("delta", "numpy"), ("delta", "cpu")]
    networks = [small_network(name) for _ in ways]
    streams = [rso.trials(network, data, 1, 40, "authors", evaluation=evaluation, backend=backend, rng=0,
                          gate=1, sigma=0.3)
               for network, (evaluation, backend) in zip(networks, ways, strict=True)]
    n_different = n = 0
    for trials in zip(*streams, strict=True):
        n += 1
        for network, trial in zip(networks[1:], trials[1:], strict=True):
            np.testing.assert_allclose(trial.losses, trials[0].losses, 1e-5, 1e-6)
            if trial.choice != trials[0].choice:
                n_different += 1
                network.weights[:] = networks[0].weights
    assert n_different <= 1 + n // 100


def test_who_has_no_gate(small):
    network = build("one_conv", small.image_shape, rng=0)
    for arguments, message in [
            ({"batch_size": 16}, "batch_size is 16, and gate 1.0; expected more than 16 images"),
            ({"evaluator": Watched()}, "the evaluator keeps no losses by block; expected gate=0, or"),
            ({"evaluator": FullForward(network)}, "the evaluator keeps no losses by block"),
            ({"gate": -1}, "gate is -1; expected 0 <= gate < inf")]:
        with pytest.raises(ValueError, match=message):
            rso.trials(network, small, **{"batch_size": 20, "gate": 1} | arguments)
    with pytest.raises(ValueError, match="expected gate=0 with ranks"):
        make_evaluator("delta", network, ranks=object(), by_block=True)
