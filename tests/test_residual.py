"""Networks with skip connections: forward, gradients, files, the order of visits, and delta evaluation."""

import copy
from dataclasses import dataclass

import naive
import networks
import numpy as np
import pytest

from rso_numba import datasets, rso, sgd
from rso_numba.evaluators import DeltaForward, FullForward, NoDelta, PlainDeltaForward, make_evaluator
from rso_numba.evaluators.graph import Graph
from rso_numba.layers import AvgPool, BatchNorm, Conv2D, Dense, Flatten, GlobalMaxPool, Layer, ReLU, Residual
from rso_numba.models import Network, build
from rso_numba.presets import EVERYTHING, PRESETS
from rso_numba.visits import sigmas, visiting_order

RESIDUALS = list(networks.residuals())
every_network = pytest.mark.parametrize("name", RESIDUALS)


def small_data(rng, n=40):
    images, labels = rng.random((n, *networks.IMAGE_SHAPE), np.float32), rng.integers(3, size=n)
    return datasets.Dataset(images, labels, images[:5], labels[:5], 3)


@every_network
@pytest.mark.parametrize("batch_statistics", [False, True])
def test_forward_is_that_of_nested_loops(name, batch_statistics, backend, rng):
    network, images = networks.small_network(name, rng), rng.random((5, *networks.IMAGE_SHAPE), np.float32)
    network.fit_scaling(images)
    if batch_statistics:
        network.calibrate(images, backend)
    expected = networks.naive_logits(network, images, batch_statistics)
    np.testing.assert_allclose(network.forward(images, backend), expected, rtol=1e-4, atol=1e-5)


@every_network
def test_gradients_are_those_of_differences(name, rng):
    network, images = networks.small_network(name, rng, np.float64), rng.random((6, *networks.IMAGE_SHAPE))
    labels = rng.integers(3, size=6)
    found = sgd._gradients(network, images, labels, sgd.kernels.backend("numpy"), 0.0)

    def loss(_):
        return naive.mean_loss(networks.naive_logits(network, images, True), labels)

    for parameter, gradient in zip(network.parameters(), found, strict=True):
        for index in list(np.ndindex(parameter.value.shape))[::11]:
            expected = naive.central_difference(loss, parameter.value, index)
            assert gradient[index] == pytest.approx(expected, rel=1e-4, abs=1e-7), f"{parameter}{index}"


@every_network
def test_gradients_of_both_backends_agree(name, rng):
    network, data = networks.small_network(name, rng), small_data(rng)
    network.fit_scaling(data.train_images)
    both = [sgd.gradients(network, data.train_images, data.train_labels, backend)
            for backend in ("cpu", "numpy")]
    scale = max(np.abs(gradient).max() for gradient in both[1])
    for parameter, cpu, numpy in zip(network.parameters(), *both, strict=True):
        np.testing.assert_allclose(cpu, numpy, rtol=1e-3, atol=1e-5 * scale, err_msg=str(parameter))


@pytest.mark.parametrize("kind", [DeltaForward, PlainDeltaForward])
@pytest.mark.parametrize("n", [20, 37])
@every_network
def test_every_weight_before_and_after_accepted_changes(name, n, kind, rng):
    compare_every_weight(name, n, kind, rng)


def compare_every_weight(name, n, kind, rng, fixed=False):
    """Compare the losses of every weight with those of whole forward passes, between two mini-batches."""
    network = networks.small_network(name, rng)
    images, labels = rng.random((n, *networks.IMAGE_SHAPE), np.float32), rng.integers(3, size=n)
    network.fit_scaling(images)
    backend, fixed_images = "numpy" if kind is PlainDeltaForward else "cpu", images[:11] if fixed else None
    full = FullForward(network, backend, fixed_images=fixed_images)
    delta = kind(network, fixed_images=fixed_images)
    others = images[::-1].copy(), labels[::-1].copy()
    for parameter in reversed(network.parameters()):
        for index in np.ndindex(parameter.value.shape):
            w, step = parameter.value[index], np.float32(rng.normal(0, 0.5))
            candidates = (w, w + step, w - step)
            if rng.random() < 0.5:
                delta.set_batch(*others, key=1)
                delta.losses(parameter, index, candidates)
            for evaluator in (full, delta):
                evaluator.set_batch(images, labels, key=0)
            expected = full.losses(parameter, index, candidates)
            found = delta.losses(parameter, index, candidates)
            np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=f"{parameter}[{index}]")
            assert parameter.value[index] == w
            if rng.random() < 0.5:
                delta.keep(parameter, index, candidates[rng.integers(3)])


@pytest.mark.parametrize("kind", [DeltaForward, PlainDeltaForward])
@pytest.mark.parametrize("name", ["projection", "two at once", "paper_mnist", "BatchNorm of features"])
def test_every_weight_with_fixed_statistics(name, kind, rng):
    compare_every_weight(name, 37, kind, rng, fixed=True)


@pytest.mark.parametrize("name", ["BatchNorm first", "BatchNorm of features", "wide input", "original"])
def test_every_weight_of_chains_in_numpy(name, rng):
    compare_every_weight(name, 37, PlainDeltaForward, rng)


def test_some_weights_of_the_real_network(rng):
    network = build("paper_cifar10", (3, 32, 32), rng=rng, preset="authors")
    images, labels = rng.random((33, 3, 32, 32), np.float32), rng.integers(10, size=33)
    network.fit_scaling(images)
    full, delta = (kind(network, fixed_images=images[:16]) for kind in (FullForward, DeltaForward))
    for parameter in reversed(network.parameters()):
        for index in rng.integers(parameter.value.shape, size=(3, parameter.value.ndim)).tolist():
            w, step = parameter.value[tuple(index)], np.float32(rng.normal(0, 0.2))
            candidates = (w, w + step, w - step)
            for evaluator in (full, delta):
                evaluator.set_batch(images, labels, key=0)
            found = delta.losses(parameter, tuple(index), candidates)
            np.testing.assert_allclose(found, full.losses(parameter, tuple(index), candidates), rtol=1e-5,
                                       err_msg=f"{parameter}{index}")
            delta.keep(parameter, tuple(index), candidates[rng.integers(3)])


@pytest.mark.parametrize("preset", ["paper", "authors", "notebook"])
@every_network
def test_a_whole_round_decides_alike(name, preset, rng):
    """Decisions differ only at ties closer than 1e-5: those are counted, and then followed."""
    data = small_data(rng)
    found = [networks.small_network(name, np.random.default_rng(1)) for _ in range(3)]
    ways = {"evaluation": "full"}, {}, {"backend": "numpy"}
    streams = [rso.trials(network, data, 1, 13, preset, rng=0, sigma=0.3, trained=EVERYTHING, **way)
               for network, way in zip(found, ways, strict=True)]
    ties = 0
    for full, *deltas in zip(*streams, strict=True):
        for network, delta in zip(found[1:], deltas, strict=True):
            np.testing.assert_allclose(delta.losses, full.losses, 1e-5, 1e-6, err_msg=f"{full}\n{delta}")
            if full.choice != delta.choice:
                best, second, _ = sorted(full.losses)
                assert second - best < 1e-5 * best
                ties += 1
                network.weights[:] = found[0].weights
    print(f"{name}, {preset}: {ties} ties decided differently")


@every_network
def test_a_network_is_loaded_as_it_was_saved(name, rng, tmp_path):
    network, images = networks.small_network(name, rng), rng.random((5, *networks.IMAGE_SHAPE), np.float32)
    network.save(tmp_path / "network.npz")
    again = Network.load(tmp_path / "network.npz")
    assert [str(p) for p in again.parameters()] == [str(p) for p in network.parameters()]
    np.testing.assert_array_equal(again.forward(images), network.forward(images))


def test_sgd_learns_the_first_weights_inside_a_branch(rng):
    data = small_data(rng)
    layers = [Residual([Conv2D(1), ReLU(), Conv2D(1)]), Flatten(), Dense(3)]
    network = Network(layers, networks.IMAGE_SHAPE, 3)
    network.initialize("he", 0)
    history = sgd.train(network, data, 20, 10, 0.1, rng=0)
    assert history["train_loss"][-1] < 0.9 * history["train_loss"][0]


def test_branches_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"makes \(3, 4, 4\) of \(2, 4, 4\) and its shortcut \(2, 4, 4\)"):
        Network([Conv2D(2), Residual([Conv2D(3)]), Flatten(), Dense(3)], (1, 4, 4), 3)
    with pytest.raises(ValueError, match="body is empty"):
        Residual([])


def authors_block():
    return [Conv2D(2, use_bias=False), BatchNorm(),
            Residual([ReLU(), Conv2D(4, use_bias=False), BatchNorm(), ReLU(), Conv2D(4, use_bias=False)],
                     [Conv2D(4, size=1, use_bias=False), BatchNorm()]),
            AvgPool(), BatchNorm(), GlobalMaxPool(), Dense(3, use_bias=False)]


def test_the_authors_shortcut():
    """Its weights begin as N(0, sqrt(2 / C_out)), have the sigma of the 3x3 beside them, and follow it."""
    network = Network(authors_block(), (1, 6, 6), 3)
    draws = []
    for seed in range(300):
        network.initialize("authors", seed)
        draws.append(network.state()["shortcut_conv1.weight"].copy())
    assert np.var(draws) == pytest.approx(2 / 4, rel=0.1)
    sigma = sigmas(network, "fan_in", None)
    assert sigma["shortcut_conv1.weight"] == sigma["conv3.weight"] == pytest.approx(np.sqrt(2 / 36))
    assert sigma["conv2.weight"] == pytest.approx(np.sqrt(2 / 18))
    order = visiting_order(network, "blocks", PRESETS["authors"].trained)
    assert [str(p) for p in order] == [
        "dense1.weight", "conv3.weight", "batchnorm3.beta", "batchnorm3.gamma", "shortcut_conv1.weight",
        "shortcut_batchnorm1.beta", "shortcut_batchnorm1.gamma", "conv2.weight", "batchnorm2.beta",
        "batchnorm2.gamma", "conv1.weight", "batchnorm1.beta", "batchnorm1.gamma"]


def test_the_graph_of_the_authors_block():
    graph = Graph(Network(authors_block(), (1, 6, 6), 3))
    conv1, shortcut, conv2, conv3, dense = graph.nodes[1:]
    assert [node.linear.name for node in graph.nodes[1:]] == [
        "conv1", "shortcut_conv1", "conv2", "conv3", "dense1"]
    assert conv3.step == 2 and conv3.shape == (4, 3, 3)  # its pool is merged into it
    (addend,) = conv3.addends
    assert addend.source is shortcut and addend.shape == (4, 3, 3)  # and into what is added
    assert (conv3.input.source, conv2.input.source, dense.input.source) == (conv2, conv1, conv3)
    assert conv1.norms == [graph.nodes[1].outputs[0].norm] and len(conv1.outputs) == 2


def test_which_statistics_are_fixed():
    """Those before the searched layer, one layer earlier where a shortcut enters; not those beside it."""
    graph = Graph(Network(authors_block(), (1, 6, 6), 3))
    assert graph.norms_before("conv1") == set()
    assert graph.norms_before("conv2") == {"batchnorm1"}
    assert graph.norms_before("shortcut_conv1") == {"batchnorm1"}
    assert graph.norms_before("conv3") == {"batchnorm1"}
    assert graph.norms_before("dense1") == {"batchnorm1", "batchnorm2", "batchnorm3", "shortcut_batchnorm1"}


@pytest.mark.parametrize("layers, reason", [
    ([Conv2D(3), Flatten(), Dense(3), ReLU()], "the network does not end in a dense layer"),
    ([Conv2D(2), Flatten(), BatchNorm(), Dense(3)], "stands behind a Flatten"),
    ([Conv2D(2), Flatten(), Residual([Dense(60)]), Dense(3)], "a Residual adds what a Flatten has made"),
])
@pytest.mark.parametrize("backend", ["cpu", "numpy"])
def test_one_rule_for_what_delta_evaluation_cannot_do(layers, reason, backend):
    network = Network(copy.deepcopy(layers), networks.IMAGE_SHAPE, 3)
    with pytest.raises(NoDelta, match=reason):
        (DeltaForward if backend == "cpu" else PlainDeltaForward)(network)
    with pytest.warns(UserWarning, match=f"whole forward pass, because .*{reason}.*evaluation='full'"):
        assert isinstance(make_evaluator("delta", network, backend), FullForward)
    with pytest.warns(UserWarning, match="a step changes a whole layer"):
        assert isinstance(make_evaluator("delta", network, backend, unit="layer"), FullForward)


def test_layers_of_its_own_kind_are_refused():
    @dataclass(eq=False)
    class Twice(Layer):
        layer: Layer

        def leaves(self, shape):
            yield from self.layer.leaves(shape)

    with pytest.raises(NoDelta, match="Twice is a layer of its own kind"):
        Graph(Network([Twice(Conv2D(1)), Flatten(), Dense(3)], networks.IMAGE_SHAPE, 3))


@pytest.mark.parametrize("layers", [
    [Conv2D(2), Flatten(), BatchNorm(), Dense(3)], [Conv2D(2), Flatten(), Dense(4), BatchNorm(), Dense(3)]])
def test_batchnorm_of_features(layers, backend, rng):
    network = Network(copy.deepcopy(layers), networks.IMAGE_SHAPE, 3)
    images = rng.random((20, 1, 6, 5), np.float32)
    network.initialize("he", rng)
    network.calibrate(images, backend)
    logits = network.forward(images, backend)
    assert logits.shape == (20, 3)
    np.testing.assert_allclose(logits, networks.naive_logits(network, images, True), rtol=1e-4, atol=1e-5)
