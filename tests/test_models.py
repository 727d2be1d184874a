"""Networks: weight counts, whole forward passes against nested loops, files, bad input."""

import json
from dataclasses import dataclass

import naive
import numpy as np
import pytest

from rso_numba import models, sgd
from rso_numba.kernels import cpu
from rso_numba.kernels.tails import Pending
from rso_numba.layers import (
    AvgPool,
    BatchNorm,
    Conv2D,
    Dense,
    Flatten,
    GlobalMaxPool,
    Layer,
    MaxPool,
    Pass,
    ReLU,
    Standardize,
)
from rso_numba.models import Network, build


def naive_logits(network, images, batch_statistics):
    """Logits by nested loops, from the weights of `network` and nothing else of it."""
    state, x = network.state(), images
    for layer in network.layers:
        own = {name.split(".")[1]: a for name, a in state.items() if name.split(".")[0] == layer.name}
        kind = type(layer).__name__
        if kind == "Standardize":
            x = naive.standardize(x, own["mean"], own["std"])
        elif kind == "Conv2D":
            x = naive.conv2d(x, own["weight"], own.get("bias"))
        elif kind == "Dense":
            x = naive.dense(x, own["weight"], own.get("bias"))
        elif kind == "BatchNorm":
            statistics = own["running_mean"], own["running_variance"]
            if batch_statistics:
                statistics = naive.batch_statistics(x)
            x = naive.batchnorm(x, own["gamma"], own["beta"], *statistics, 1e-5)
        else:
            judge = {
                "ReLU": naive.relu, "MaxPool": naive.maxpool, "AvgPool": naive.avgpool,
                "GlobalMaxPool": naive.global_max, "GlobalMeanPool": naive.global_mean,
                "Flatten": naive.flatten,
            }
            x = judge[kind](x)
    return x


@pytest.mark.parametrize("name, n_weights", [
    ("one_conv", 7890),  # 4*9 + 4 + 10*784 + 10
    ("two_conv", 16 * 9 + 16 + 16 * 16 * 9 + 16 + 10 * 784 + 10),
    ("original", 16 * 9 + 16 + 5 * (16 * 16 * 9 + 16) + 6 * 32 + 170),
    ("paper_mnist", 12016),
])
def test_weight_counts(name, n_weights):
    assert build(name, rng=0).n_weights == n_weights
    assert sum(p.value.size for p in build(name).parameters()) == n_weights


def test_paper_mnist_has_the_authors_parts():
    kinds = {}
    for p in build("paper_mnist").parameters():
        kind = p.layer.rstrip("0123456789")
        kinds[kind] = kinds.get(kind, 0) + p.value.size
    assert kinds == {"conv": 11664, "batchnorm": 192, "dense": 160}


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 9)], ids=str)
def test_forward_equals_nested_loops(backend, rng, name, shape):
    network = build(name, shape, n_classes=4, rng=1)
    network.weights += rng.normal(0, 0.1, network.n_weights).astype(np.float32)  # biases, gamma, beta too
    images = rng.random((3, *shape), np.float32)
    network.fit_scaling(images)
    network.calibrate(rng.random((5, *shape), np.float32), backend)
    expected = naive_logits(network, images, batch_statistics=False)
    np.testing.assert_allclose(network.forward(images, backend), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(network.predict(images, backend), np.argmax(expected, axis=1))
    loss, accuracy = network.evaluate(images, [0, 1, 2], backend)
    assert loss == pytest.approx(naive.mean_loss(expected, [0, 1, 2]), rel=1e-4)
    assert accuracy == naive.accuracy(expected, [0, 1, 2])


def test_calibrate_stores_the_statistics_of_those_images(backend, rng):
    network = build("paper_mnist", (1, 8, 8), rng=1)
    images = rng.random((20, 1, 8, 8), np.float32)
    network.calibrate(images, backend)
    by_batch = naive_logits(network, images[:20], batch_statistics=True)
    np.testing.assert_allclose(network.forward(images, backend), by_batch, rtol=1e-3, atol=1e-4)


def test_forward_in_chunks_is_forward_at_once(backend, rng, monkeypatch):
    network = build("original", (1, 8, 8), rng=1)
    images = rng.random((37, 1, 8, 8), np.float32)
    at_once = network.forward(images, backend)
    monkeypatch.setattr(models, "CHUNK", 16)
    np.testing.assert_allclose(network.forward(images, backend), at_once, rtol=1e-5, atol=1e-6)


def test_initial_weights_follow_the_preset():
    for parameter in build("two_conv", rng=0, preset="paper").parameters():
        if parameter.name == "bias":
            assert not parameter.value.any()
        elif parameter.value.size > 2000:
            fan_in = {"conv2": 144, "dense1": 784}[parameter.layer]
            assert parameter.fan_in == fan_in
            assert parameter.value.std() == pytest.approx(np.sqrt(2 / fan_in), rel=0.05)
    glorot = build("two_conv", rng=0, preset="notebook").parameters()
    limit = np.sqrt(6 / (784 + 10))  # dense1
    assert limit * 0.99 < np.abs(glorot[4].value).max() <= limit
    limit = np.sqrt(6 / (144 + 144))  # conv2
    assert limit * 0.99 < np.abs(glorot[2].value).max() <= limit
    gamma, beta = build("paper_mnist", preset="authors").parameters()[1:3]
    assert gamma.value.tolist() == [1] * 16
    assert beta.value.tolist() == [0] * 16


def test_seed_0_is_a_seed():
    weights = [build("one_conv", rng=seed).weights for seed in (0, 0, 1)]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert (weights[0] != weights[2]).any()


@pytest.mark.parametrize("preset, mean, std", [
    ("paper", 0.5, 0.25), ("authors", 0.5, 1.0), ("notebook", 0.0, 1.0),
])
def test_scaling_follows_the_preset(preset, mean, std):
    images = np.tile(np.float32([[0.25, 0.75]]), (6, 1, 4, 2))
    network = build("one_conv", (1, 4, 4), preset=preset)
    assert not network.layers[0].fitted
    network.fit_scaling(images)
    assert network.layers[0].mean == mean
    assert network.layers[0].std == std
    network.fit_scaling(images + 1)
    assert network.layers[0].mean == mean  # the first training decides


def test_a_constant_channel_becomes_zero():
    network = build("one_conv", (1, 4, 4), preset="paper")
    network.fit_scaling(np.full((3, 1, 4, 4), 0.5, np.float32))
    assert (network.layers[0].mean, network.layers[0].std) == (0.5, 1)
    assert np.isfinite(network.forward(np.full((1, 1, 4, 4), 0.5, np.float32))).all()


def test_parameters_are_views_of_the_weights():
    network = build("one_conv", rng=0)
    network.parameters()[0].value[0, 0, 0, 0] = 42
    assert network.weights[0] == 42
    names = [str(p) for p in network.parameters()]
    assert names == ["conv1.weight", "conv1.bias", "dense1.weight", "dense1.bias"]


@pytest.mark.parametrize("name", models.MODELS)
def test_save_and_load(tmp_path, rng, name):
    network = build(name, (1, 8, 8), rng=0)
    images = rng.random((9, 1, 8, 8), np.float32)
    network.fit_scaling(images)
    network.calibrate(images)
    network.save(tmp_path / "network.npz")
    loaded = Network.load(tmp_path / "network.npz")
    np.testing.assert_array_equal(loaded.forward(images), network.forward(images))
    assert (loaded.name, loaded.image_shape, loaded.layers[0].fitted) == (name, (1, 8, 8), True)
    assert [path.name for path in tmp_path.iterdir()] == ["network.npz"]


def test_a_failed_save_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "network.npz"
    build("one_conv", rng=0).save(path)
    former = path.read_bytes()

    def broken(file, **arrays):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", broken)
    with pytest.raises(OSError, match="disk full"):
        build("one_conv", rng=1).save(path)
    assert path.read_bytes() == former
    assert [p.name for p in tmp_path.iterdir()] == ["network.npz"]


def _damaged(path, damage):
    build("one_conv", (1, 8, 8), rng=0).save(path)
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "flipped bits":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "not a zip":
        path.write_bytes(b"hello" * 100)
    else:
        with np.load(path) as saved:
            arrays = dict(saved)
        if damage == "missing array":
            del arrays["conv1.weight"]
        elif damage == "wrong shape":
            arrays["conv1.weight"] = arrays["conv1.weight"][:2]
        elif damage == "unknown layer":
            arrays["description"] = np.array(str(arrays["description"]).replace("ReLU", "Gremlin"))
        elif damage == "not json":
            arrays["description"] = np.array("{")
        elif damage == "json of something else":
            arrays["description"] = np.array(json.dumps([1, 2]))
        elif damage == "pickled":
            arrays["conv1.weight"] = np.array([{}], object)
        np.savez(path, **arrays)


@pytest.mark.parametrize("damage", [
    "cut short", "flipped bits", "empty", "not a zip", "missing array", "wrong shape", "unknown layer",
    "not json", "json of something else", "pickled",
])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "network.npz"
    _damaged(path, damage)
    with pytest.raises(ValueError, match=r"network\.npz is damaged or is not a network"):
        Network.load(path)


def test_files_that_cannot_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Network.load(tmp_path / "nowhere.npz")
    with pytest.raises(ValueError, match=r"network\.txt does not end in \.npz"):
        build("one_conv").save(tmp_path / "network.txt")


def test_bad_models():
    with pytest.raises(ValueError, match="'three_conv'; known models: one_conv, two_conv, original, paper"):
        build("three_conv")
    with pytest.raises(ValueError, match="unknown preset 'julia'; known presets: paper, authors, notebook"):
        build("one_conv", preset="julia")
    with pytest.raises(ValueError, match="maxpool2 gets maps of 1x8 pixels; it needs at least 2x2"):
        build("two_conv", (1, 3, 16))
    with pytest.raises(ValueError, match=r"image_shape is \(8, 8\); expected three positive"):
        build("one_conv", (8, 8))
    with pytest.raises(ValueError, match=r"gives \(5,\) numbers an image; expected \(10,\)"):
        Network([Flatten(), Dense(5)], (1, 2, 2), 10)
    with pytest.raises(ValueError, match="size is 5; expected 3 or 1"):
        Conv2D(4, size=5)


def test_bad_images():
    network = build("one_conv", (1, 8, 8))
    images = np.zeros((2, 1, 8, 8), np.float32)
    images[1, 0, 3, 4] = np.nan
    with pytest.raises(ValueError, match=r"1 NaN or infinite pixels.*\(1, 0, 3, 4\)"):
        network.predict(images)
    with pytest.raises(ValueError, match=r"\(1, 9, 8\), expected \(1, 8, 8\)"):
        network.forward(np.zeros((2, 1, 9, 8), np.float32))
    with pytest.raises(TypeError, match="divide by 255"):
        network.forward(np.zeros((2, 1, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="value 10 at 1"):
        network.evaluate(np.zeros((2, 1, 8, 8), np.float32), [0, 10])


@dataclass(eq=False)
class Residual(Layer):
    """A skip connection as a user could write it today: x + branch(x), all through public hooks."""

    branch: tuple

    def leaves(self, shape):
        for layer in self.branch:
            yield from layer.leaves(shape)
            shape = layer.output_shape(shape)

    def forward(self, x, run):
        y = x
        for layer in self.branch:
            y = layer.forward(y, run)
        return x + y

    def backward(self, dy, run):
        dx = dy
        for layer in reversed(self.branch):
            dx = layer.backward(dx, run)
        return dx + dy


def test_a_skip_connection_needs_no_rewrite(backend, rng):
    from rso_numba import sgd

    skip = Residual((Conv2D(3), BatchNorm(), ReLU(), Conv2D(3)))
    layers = [Standardize(), Conv2D(3), skip, ReLU(), GlobalMaxPool(), Dense(2)]
    network = Network(layers, (1, 4, 4), 2, dtype=np.float64 if backend == "numpy" else np.float32)
    network.initialize("he", rng)
    assert [p.layer for p in network.parameters()][2:8:2] == ["conv2", "batchnorm1", "conv3"]
    images, labels = rng.random((6, 1, 4, 4), np.float32), np.array([0, 1, 0, 1, 0, 1])
    found = sgd.gradients(network, images, labels, backend)

    def loss(_):
        x = naive.conv2d(images, layers[1].weight, layers[1].bias)
        conv2, norm, _, conv3 = skip.branch
        y = naive.conv2d(x, conv2.weight, conv2.bias)
        y = naive.relu(naive.batchnorm(y, norm.gamma, norm.beta, *naive.batch_statistics(y), 1e-5))
        x = naive.relu(x + naive.conv2d(y, conv3.weight, conv3.bias))
        return naive.mean_loss(naive.dense(naive.global_max(x), layers[-1].weight, layers[-1].bias), labels)

    if backend == "cpu":
        assert np.isfinite(np.concatenate([g.ravel() for g in found])).all()
        return
    for parameter, gradient in zip(network.parameters(), found, strict=True):
        for index in list(np.ndindex(parameter.value.shape))[::7]:
            expected = naive.central_difference(loss, parameter.value, index)
            assert gradient[index] == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_a_batchnorm_does_the_relu_directly_behind_it():
    relus = [ReLU() for _ in range(4)]
    norms = [BatchNorm() for _ in range(3)]
    chain = [relus[0], norms[0], relus[1], relus[2], norms[1], norms[2], relus[3], Flatten(), Dense(2)]
    steps = models.Network(chain, (1, 2, 2), 2).steps
    alone, both = ({}, {}), ({"with_relu": True}, {"with_relu": True})
    assert steps[:3] == [(relus[0], *alone), (norms[0], *both), (relus[2], *alone)]
    assert steps[3:5] == [(norms[1], *alone), (norms[2], *both)]
    assert [step[0] for step in steps[5:]] == chain[-2:]


def test_zeros_stay_exact_unless_a_batchnorm_is_next():
    chain = [Conv2D(2), ReLU(), Conv2D(2), BatchNorm(), Conv2D(2), AvgPool(), BatchNorm(),
             Conv2D(2), AvgPool(), ReLU(), Flatten(), Dense(2)]
    steps = models.Network(chain, (1, 4, 4), 2).steps
    assert [step[1] for step in steps if isinstance(step[0], Conv2D)] == [
        {}, {"exact_zeros": False}, {"exact_zeros": False}, {}]


def test_a_batchnorm_is_left_to_a_convolution_that_is_next():
    chain = [BatchNorm(), Conv2D(2), BatchNorm(), ReLU(), AvgPool(), Conv2D(2), BatchNorm(), AvgPool(),
             AvgPool(), Conv2D(2), BatchNorm(), MaxPool(), Conv2D(2), BatchNorm(), AvgPool(), Flatten(),
             Dense(2)]
    steps = models.Network(chain, (1, 32, 32), 2).steps
    assert [step[1] for step in steps if isinstance(step[0], BatchNorm)] == [
        {"lazy": True}, {"with_relu": True, "lazy": True}, {}, {}, {}]


def test_the_maps_between_convolutions_are_not_made(rng):
    network, run = build("original", (1, 8, 8), rng=0), Pass(cpu, 3, batch_statistics=True, saved={})
    network.propagate(cpu.pack(rng.random((3, 1, 8, 8), np.float32)), run)
    pending = {name for name, (x, *_) in run.saved.items() if isinstance(x, Pending)}
    assert pending == {"conv2", "avgpool1", "conv3", "conv4", "avgpool2", "conv5", "conv6"}


def test_a_filter_of_nothing_gives_exactly_its_bias(backend, rng):
    network = build("two_conv", (1, 28, 28), rng=3)
    images = np.zeros((17, 1, 28, 28), np.float32)
    images[:, :, 8:12, 8:12] = rng.random((17, 1, 4, 4))
    gradients = sgd.gradients(network, images, np.arange(17) % 10, backend)
    for a, b in zip(gradients, sgd.gradients(network, images, np.arange(17) % 10, "numpy"), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())
