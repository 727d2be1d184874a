"""Delta evaluation equals full forward passes: for every weight, and over whole rounds."""

from itertools import islice

import networks
import numpy as np
import pytest
from networks import small_network

from rso_numba import datasets, rso
from rso_numba.evaluators import DeltaForward, FullForward, PlainDeltaForward, make_evaluator
from rso_numba.evaluators import delta as delta_module
from rso_numba.kernels import cpu
from rso_numba.kernels.compiling import kernel
from rso_numba.kernels.cpu import softmax, tiles
from rso_numba.kernels.cpu.convolution import conv2d_fused
from rso_numba.kernels.cpu.fusion import no_epilogue
from rso_numba.layers import BatchNorm
from rso_numba.models import build


def shuffled(network, rng):
    """Give every parameter values of its own: biases, gamma and beta are all equal at first."""
    network.weights += rng.normal(0, 0.1, network.n_weights).astype(np.float32)
    return network


CHAINS = list(networks.chains())


@pytest.mark.parametrize("n", [5, 16, 37])
@pytest.mark.parametrize("name", CHAINS)
def test_every_weight_before_and_after_accepted_changes(name, n, rng):
    network = shuffled(small_network(name), rng)
    images, labels = rng.random((n, 1, 6, 5), np.float32), rng.integers(3, size=n)
    network.fit_scaling(images)
    full, delta = FullForward(network), DeltaForward(network)
    full.set_batch(images, labels)
    delta.set_batch(images, labels, key=0)
    for parameter in reversed(network.parameters()):
        for index in np.ndindex(parameter.value.shape):
            w, step = parameter.value[index], np.float32(rng.normal(0, 0.5))
            candidates = (w, w + step, w - step)
            expected = full.losses(parameter, index, candidates)
            found = delta.losses(parameter, index, candidates)
            np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=f"{parameter}[{index}]")
            assert parameter.value[index] == w
            if rng.random() < 0.5:
                value = candidates[rng.integers(3)]
                if sum(index) % 4 == 3:
                    value = w + np.float32(0.3) * (value - w)  # none of the three, as the vertex
                delta.keep(parameter, index, value)


@pytest.mark.parametrize("preset", ["paper", "authors", "notebook"])
@pytest.mark.parametrize("hold", ["weight", "filter"])
@pytest.mark.parametrize("name", ["one_conv", "original", "paper_mnist", "two dense, 1x1, late BatchNorm",
                                  "flatten only"])
def test_a_whole_round_decides_alike(name, hold, preset, rng):
    """Decisions differ only at ties closer than 1e-5: those are counted, and then followed."""
    images, labels = rng.random((40, 1, 6, 5), np.float32), rng.integers(3, size=40)
    data = datasets.Dataset(images, labels, images[:5], labels[:5], 3)
    networks = [shuffled(small_network(name), np.random.default_rng(1)) for _ in range(2)]
    streams = [
        rso.trials(network, data, rounds=2, batch_size=13, preset=preset, evaluation=evaluation, rng=0,
                   hold=hold)
        for network, evaluation in zip(networks, ("full", "delta"), strict=True)]
    ties = 0
    for full, delta in zip(*streams, strict=True):
        # atol: a loss near 0 comes from logits that are rounded to 1e-6 themselves
        np.testing.assert_allclose(delta.losses, full.losses, 1e-5, 1e-6, err_msg=f"{full}\n{delta}")
        if full.choice != delta.choice:
            best, second, _ = sorted(full.losses)
            assert second - best < 1e-5 * best
            ties += 1
            networks[1].weights[:] = networks[0].weights
    print(f"{name}, {preset}, hold={hold}: {ties} ties decided differently")
    for full, delta in zip(*(network.leaves for network in networks), strict=True):
        if isinstance(full, BatchNorm):
            np.testing.assert_allclose(delta.running_mean, full.running_mean, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(delta.running_variance, full.running_variance, rtol=1e-4)


@pytest.mark.parametrize("name", ["two_conv", "paper_mnist", "two dense, 1x1, late BatchNorm"])
def test_what_is_far_behind_is_computed_anew(name, monkeypatch, rng):
    monkeypatch.setattr(delta_module, "MANY_CHANNELS", 0)
    test_a_whole_round_decides_alike(name, "weight", "notebook", rng)


@pytest.mark.parametrize("name", ["one_conv", "original", "paper_mnist", "two dense, 1x1, late BatchNorm"])
def test_z_is_kept_if_filters_have_many_taps(name, monkeypatch, rng):
    monkeypatch.setattr(delta_module, "FEW_TAPS", 0)  # the filters of small networks all have few
    test_every_weight_before_and_after_accepted_changes(name, 16, rng)
    test_a_whole_round_decides_alike(name, "weight", "notebook", rng)


@pytest.mark.parametrize("many_channels", [0, 5])
@pytest.mark.parametrize("name", ["wide input", "paper_mnist"])
def test_an_input_that_is_most_of_the_memory_is_rematerialized(name, many_channels, monkeypatch, rng):
    monkeypatch.setattr(delta_module, "FEW_TAPS", 9)  # so that z of the second layer is kept
    monkeypatch.setattr(delta_module, "MANY_CHANNELS", many_channels)
    rematerialized, channels = [], DeltaForward._channels

    def watched(self, x, taps):
        rematerialized.extend([self.node.index] if isinstance(x, delta_module.Rematerialized) else [])
        return channels(self, x, taps)

    monkeypatch.setattr(DeltaForward, "_channels", watched)
    test_every_weight_before_and_after_accepted_changes(name, 37, rng)
    test_a_whole_round_decides_alike(name, "weight", "notebook", rng)
    assert set(rematerialized) == {2}


@pytest.mark.parametrize("name", ["one_conv", "two_conv", "original", "paper_mnist"])
def test_all_that_waits_for_a_batch_lies_in_the_arena(name, digits):
    network = build(name, (1, 8, 8), rng=0)
    delta = DeltaForward(network)
    for parameter in reversed(network.parameters()):
        index, images = (0,) * parameter.value.ndim, digits.train_images[:40]
        for key in (0, 1, 0, 1):
            delta.set_batch(images, digits.train_labels[:40], key)
            delta.losses(parameter, index, parameter.value[index] + np.float32([0, 0.1, -0.1]))
        for batch in delta.cache.batches.values():
            assert batch.is_held
            for array in (delta_module._array(batch.x), *batch.values.z.values()):
                assert any(np.shares_memory(array, chunk) for chunk, _ in delta.cache.arena.chunks)


def test_a_loss_that_is_known_is_not_computed_again(digits, monkeypatch):
    network = build("two_conv", (1, 8, 8), rng=0)
    full, delta = FullForward(network), DeltaForward(network)
    parameter, index = network.parameters()[0], (3, 0, 1, 1)
    for evaluator in (full, delta):
        evaluator.set_batch(digits.train_images[:50], digits.train_labels[:50])
    first = delta.losses(parameter, index, (parameter.value[index], 0.5, -0.5))
    delta.keep(parameter, index, 0.5)
    finished, loss_sums = [], delta.reach.loss_sums
    monkeypatch.setattr(delta.reach, "loss_sums", lambda *a: finished.append(a) or loss_sums(*a))
    second = delta.losses(parameter, index, (0.5, 1.0, -1.0))
    assert len(finished) == 2 and second[0] == first[1]
    np.testing.assert_allclose(second, full.losses(parameter, index, (0.5, 1.0, -1.0)), rtol=1e-5)


@pytest.mark.parametrize("name", ["one_conv", "two_conv", "paper_mnist"])
def test_what_is_remembered_does_not_drift(name, digits):
    network = build(name, (1, 8, 8), rng=0)
    network.fit_scaling(digits.train_images)
    delta, rng = DeltaForward(network), np.random.default_rng(0)
    conv = network.parameters()[0]
    for dense_or_conv in (network.parameters()[-1], conv):
        for i in range(300):
            key = i % 3
            delta.set_batch(digits.train_images[100 * key :][:90], digits.train_labels[100 * key :][:90], key)
            index = tuple(rng.integers(s) for s in dense_or_conv.value.shape)
            w, step = dense_or_conv.value[index], np.float32(rng.normal(0, 0.3))
            delta.losses(dense_or_conv, index, (w, w + step, w - step))
            delta.keep(dense_or_conv, index, w + step if i % 2 else w - step)
        for key in range(3):
            delta.set_batch(digits.train_images[100 * key :][:90], digits.train_labels[100 * key :][:90], key)
            w = dense_or_conv.value[index]
            remembered = delta.losses(dense_or_conv, index, (w, w))[0]
            assert delta.batch.is_held
            full = FullForward(network)
            full.set_batch(delta.batch.images, delta.batch.labels)
            assert remembered == pytest.approx(full.losses(dense_or_conv, index, (w,))[0], rel=1e-4)


def test_a_weight_changed_by_somebody_else_is_noticed(digits):
    network = build("two_conv", (1, 8, 8), rng=0)
    full, delta = FullForward(network), DeltaForward(network)
    parameter = network.parameters()[2]
    for evaluator in (full, delta):
        evaluator.set_batch(digits.train_images[:50], digits.train_labels[:50])
    for _ in range(2):
        expected, found = (e.losses(parameter, (3, 1, 0, 2), (0.1, 0.2)) for e in (full, delta))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        network.weights[::7] *= 1.5


@pytest.mark.parametrize("step", [0.5, 30.0, 90.0, 1e4, 1e30])
def test_huge_steps_of_the_last_layer(step, digits):
    network = build("one_conv", (1, 8, 8), rng=0)
    full, delta = FullForward(network), DeltaForward(network)
    for evaluator in (full, delta):
        evaluator.set_batch(digits.train_images[:70], digits.train_labels[:70])
    for parameter, index in ((network.parameters()[2], (3, 17)), (network.parameters()[3], (3,))):
        candidates = (parameter.value[index], np.float32(step), np.float32(-step))
        expected, found = (evaluator.losses(parameter, index, candidates) for evaluator in (full, delta))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_memory_is_bounded(digits):
    network = build("one_conv", (1, 8, 8), rng=0)
    delta = DeltaForward(network, memory=200_000)
    parameter = network.parameters()[-2]
    for _ in range(3):
        for key in range(10):
            part = slice(100 * key, 100 * key + 100)
            delta.set_batch(digits.train_images[part], digits.train_labels[part], key)
            delta.losses(parameter, (0, 0), (0.0, 0.1))
        held = [batch for batch in delta.cache.batches.values() if batch.values and batch is not delta.batch]
        total = sum(batch.x.nbytes + sum(z.nbytes for z in batch.values.z.values()) for batch in held)
        assert 100_000 < total <= 200_000


def test_fast_exp():
    @kernel
    def exponentials(x, y):
        for i in range(len(x)):
            y[i] = softmax.fast_exp(x[i])

    x = np.linspace(-87, 88, 100_001, dtype=np.float32)
    y = np.empty_like(x)
    exponentials(x, y)
    np.testing.assert_allclose(y, np.exp(x.astype(np.float64)), rtol=4e-7)


@pytest.mark.parametrize("shape", [(3, 2, 6, 6), (17, 3, 7, 5)], ids=str)
@pytest.mark.parametrize("strip", [1, tiles.STRIP])
def test_convolution_and_average_pool_in_one(shape, strip, rng, monkeypatch):
    monkeypatch.setattr(tiles, "STRIP", strip)
    x = cpu.pack(rng.standard_normal(shape, np.float32))
    weight, bias = rng.standard_normal((5, shape[1], 3, 3), np.float32), rng.standard_normal(5, np.float32)
    merged, _ = conv2d_fused(x, no_epilogue(x), weight, bias, None, stride=2)
    apart = cpu.avgpool_forward(cpu.conv2d_forward(x, weight, bias))
    merged, apart = cpu.unpack(merged, shape[0]), cpu.unpack(apart, shape[0])
    np.testing.assert_allclose(merged, apart, rtol=1e-4, atol=1e-5)


class Together:
    """Several evaluators of one network, of which the first decides: a tie may be decided either way."""

    def __init__(self, evaluators):
        self.evaluators = evaluators

    def set_batch(self, *batch):
        for evaluator in self.evaluators:
            evaluator.set_batch(*batch)

    def losses(self, *trial):
        first, *others = [evaluator.losses(*trial) for evaluator in self.evaluators]
        for losses in others:
            np.testing.assert_allclose(losses, first, rtol=1e-5)
        return first

    def keep(self, *winner):
        for evaluator in self.evaluators:
            evaluator.keep(*winner)


def test_memory_bounds_what_is_kept_and_changes_no_loss(small):
    network, memory = build("paper_mnist", (1, 8, 8), rng=0, preset="authors"), (1e9, 1e5, 0)
    evaluators = [make_evaluator("delta", network, memory=size) for size in memory]
    for _ in islice(rso.trials(network, small, 1, 16, "authors", evaluator=Together(evaluators), rng=0), 700):
        for evaluator, size in zip(evaluators, memory, strict=True):
            assert sum(len(chunk) for chunk, _ in evaluator.cache.arena.chunks) <= size
    assert [len(evaluator.cache.arena.chunks) for evaluator in evaluators] == [1, 1, 0]
    for size in (-1, "1e9"):
        with pytest.raises((ValueError, TypeError), match="memory"):
            rso.trials(network, small, 1, 16, memory=size)


def test_who_evaluates():
    network = build("one_conv", (1, 8, 8))
    assert isinstance(make_evaluator("delta", network, "cpu"), DeltaForward)
    assert isinstance(make_evaluator("delta", network, "numpy"), PlainDeltaForward)
    assert isinstance(make_evaluator("full", network, "cpu"), FullForward)
