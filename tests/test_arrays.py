"""The arrays of a network stay views of one vector, whatever is copied or assigned."""

import copy
import pickle
from itertools import islice

import numpy as np
import pytest
from networks import IMAGE_SHAPE, small_network

from rso_numba import datasets, rso, sgd
from rso_numba.layers import BatchNorm, Conv2D, Dense, Flatten, ReLU, Residual
from rso_numba.models import Network, build


def numbers(network):
    return {name: array.tobytes() for name, array in network.state().items()}


def layer_names(layers):
    for layer in layers:
        if isinstance(layer, Residual):
            yield from layer_names([*layer.body, *layer.shortcut])
        else:
            yield layer.name


def assert_whole(network):
    """All arrays with a name are views of the one vector, in their order."""
    leaves = {leaf.name: leaf for leaf in network.leaves}
    assert list(layer_names(network.layers)) == list(leaves)
    for parameter in network.parameters():
        assert parameter.value is getattr(leaves[parameter.layer], parameter.name)
        assert np.shares_memory(parameter.value, network.weights)
    values = [parameter.value.ravel() for parameter in network.parameters()]
    assert np.array_equal(np.concatenate(values), network.weights)


# ---- copies ----


def pickled(network):
    return pickle.loads(pickle.dumps(network))


def read_only(network):
    """Pickle as joblib does where it gives its workers large arrays: read-only."""
    twin, buffers = copy.deepcopy(network), []
    twin.weights.flags.writeable = False
    return pickle.loads(pickle.dumps(twin, protocol=5, buffer_callback=buffers.append), buffers=buffers)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickled, read_only])
@pytest.mark.parametrize("name", ["one_conv", "original", "projection"])
def test_a_copy_learns_as_the_original_does_and_leaves_it_alone(how, name, rng):
    network, images = small_network(name, rng), rng.random((20, *IMAGE_SHAPE), np.float32)
    data = datasets.Dataset(images, rng.integers(3, size=20), images[:2], np.zeros(2, np.int64), 3)
    network.fit_scaling(images)
    network.calibrate(images, "numpy")

    def train(network):
        losses = sgd.train(network, data, 2, 5, learning_rate=0.1, rng=0, backend="numpy")["train_loss"]
        list(islice(rso.trials(network, data, 1, 5, rng=0, backend="numpy"), 20))
        trials = rso.trials(network, data, 9, 5, unit="layer", rng=0, evaluation="full", backend="numpy")
        return losses[0] != losses[-1] and any([trial.accepted for trial in trials])

    before, twin = numbers(network), how(network)
    assert_whole(twin)
    assert numbers(twin) == before and not np.shares_memory(twin.weights, network.weights)
    assert train(twin)
    assert_whole(twin)
    assert numbers(network) == before != numbers(twin)
    train(network)
    assert numbers(network) == numbers(twin)


def test_copies_of_a_part_have_arrays_of_their_own():
    network = build("original", (1, 8, 8), rng=0)
    before = numbers(network)
    for how in (copy.copy, copy.deepcopy, pickled):
        conv, norm, parameter = map(how, (*network.layers[1:3], network.parameters()[0]))
        assert np.array_equal(conv.weight, network.layers[1].weight)
        for array in (conv.weight, norm.running_mean, parameter.value):
            array[...] = 7
    assert numbers(network) == before
    twin, parameters = copy.deepcopy((network, network.parameters()))
    assert all(a is b for a, b in zip(twin.parameters(), parameters, strict=True))


def test_a_layer_is_in_one_network():
    network = build("original", (1, 8, 8), rng=0)
    before = numbers(network)
    for layers in (network.layers, [Residual([Conv2D(1)], [network.layers[1]]), Flatten(), Dense(10)]):
        with pytest.raises(ValueError, match=r"is in another network; .*copy\.deepcopy\(layer\)"):
            Network(layers, (1, 8, 8), 10)
    relu = ReLU()
    with pytest.raises(ValueError, match=r"ReLU\(\) is here twice"):
        Network([relu, Residual([relu]), Flatten(), Dense(10)], (1, 8, 8), 10)
    assert numbers(network) == before and not any(leaf.in_shortcut for leaf in network.leaves)
    twin = Network(copy.deepcopy(network.layers), (3, 8, 8), 10)  # other channels: other arrays
    assert_whole(twin)
    assert twin.layers[1].weight.shape == (16, 3, 3, 3) and not twin.layers[1].weight.any()
    assert numbers(network) == before


# ---- assignments ----


def in_place(network, steps):
    for parameter in network.parameters():
        parameter.value -= steps[str(parameter)]


def by_value(network, steps):
    for parameter in network.parameters():
        parameter.value = parameter.value - steps[str(parameter)]


def into_value(network, steps):
    for parameter in network.parameters():
        parameter.value[...] -= steps[str(parameter)]


def by_layer(network, steps):
    for leaf in network.leaves:
        if "weight" in leaf.parameter_names:
            leaf.weight -= steps[f"{leaf.name}.weight"]
        for name in set(leaf.parameter_names) - {"weight"}:
            setattr(leaf, name, getattr(leaf, name) - steps[f"{leaf.name}.{name}"])


def by_vector(network, steps):
    network.weights = network.weights.astype(np.float64) - np.concatenate([s.ravel() for s in steps.values()])


@pytest.mark.parametrize("change", [in_place, by_value, into_value, by_layer, by_vector])
def test_assigned_weights_are_those_of_the_network(change, rng):
    network, images = small_network("projection", rng), rng.random((4, *IMAGE_SHAPE), np.float32)
    step = rng.integers(-3, 3, network.n_weights).astype(np.float32)
    expected, before = network.weights - step, network.forward(images, "numpy")
    change(network, network.views(step))
    np.testing.assert_array_equal(network.weights, expected)
    assert_whole(network)
    assert (network.forward(images, "numpy") != before).any()


def test_buffers_are_assigned_too(rng):
    network, mean = small_network("projection", rng), np.float32([3, 4])
    norm = next(leaf for leaf in network.leaves if isinstance(leaf, BatchNorm))
    place, norm.running_mean = norm.running_mean, mean
    assert norm.running_mean is place and network.state()[f"{norm.name}.running_mean"].tolist() == [3, 4]
    norm.running_mean += 1
    assert place.tolist() == [4, 5] and mean.tolist() == [3, 4]


@pytest.mark.parametrize("assign, error, message", [
    (lambda n: setattr(n, "weights", n.weights[:-1]), ValueError, r"shape \(690,\).*shape \(689,\)"),
    (lambda n: setattr(n, "weights", 0.0), ValueError, r"shape \(690,\).*shape \(\)"),
    (lambda n: setattr(n, "weights", n.weights * 1j), TypeError, "dtype float32.*dtype complex"),
    (lambda n: setattr(n.parameters()[1], "value", np.zeros((4, 1))), ValueError,
     r"conv1.bias.value has shape \(4,\).*\(4, 1\)"),
    (lambda n: setattr(n.layers[1], "weight", np.zeros((4, 1, 3, 1))), ValueError,
     r"Conv2D.*weight has shape \(4, 1, 3, 3\).*\(4, 1, 3, 1\)"),
    (lambda n: setattr(n.layers[0], "mean", [1, 2]), ValueError, r"mean has shape \(1,\).*\(2,\)"),
    (lambda n: n.set_state(n.state() | {"conv1.bias": 1.0}), ValueError,
     r"conv1.bias has shape \(4,\).*\(\)"),
    (lambda n: n.set_state(n.state() | {"dense1.weight": np.ones((1, 64)), "conv1.bias": np.ones(4)}),
     ValueError, r"dense1.weight has shape \(10, 64\).*\(1, 64\)"),
    (lambda n: n.set_state(n.state() | {"conv1.bias": np.array(list("abcd"))}), TypeError, "conv1.bias.*<U1"),
    (lambda n: n.set_state(n.state() | {"conv2.bias": 0}), KeyError,
     "has unknown conv2.bias; expected conv1.w"),
    (lambda n: n.set_state({"conv1.weight": np.ones((4, 1, 3, 3))}), KeyError,
     "lacks conv1.bias, dense1.bias"),
])
def test_what_does_not_fit_is_refused_and_changes_nothing(assign, error, message):
    network = build("one_conv", (1, 8, 8), rng=0)
    before = numbers(network)
    with pytest.raises(error, match=message):
        assign(network)
    assert numbers(network) == before
    assert_whole(network)
