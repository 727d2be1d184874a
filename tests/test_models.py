"""Networks: weight counts, whole forward passes against nested loops, files, bad input."""

import json

import naive
import numpy as np
import pytest
from networks import naive_logits

from rso_numba import models, sgd
from rso_numba import network as network_module
from rso_numba.evaluators.graph import Graph
from rso_numba.kernels import cpu, formulas
from rso_numba.kernels.cpu import chain as cpu_chain
from rso_numba.kernels.cpu.activations import computed
from rso_numba.kernels.cpu.fusion import Deferred
from rso_numba.layers import AvgPool, BatchNorm, Conv2D, Dense, Flatten, ReLU, Residual
from rso_numba.models import Network, build
from rso_numba.passes import Pass


@pytest.mark.parametrize("name, n_weights", [
    ("one_conv", 7890),  # 4*9 + 4 + 10*784 + 10
    ("two_conv", 16 * 9 + 16 + 16 * 16 * 9 + 16 + 10 * 784 + 10),
    ("original", 16 * 9 + 16 + 5 * (16 * 16 * 9 + 16) + 6 * 32 + 170),
    ("paper_mnist", 12016),
    ("paper_cifar10", 57104 - 2 * 16 * 9),  # of grey images
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


def test_paper_cifar10_has_the_authors_parts():
    kinds, network = {}, build("paper_cifar10", (3, 32, 32))
    for p in network.parameters():
        kind = p.layer.rstrip("0123456789")
        kinds[kind] = kinds.get(kind, 0) + p.value.size
    assert kinds == {"conv": 55728, "batchnorm": 480, "shortcut_conv": 512, "shortcut_batchnorm": 64,
                     "dense": 320}
    filters = [p.value.shape[:2] for p in network.parameters() if p.layer.startswith("conv")]
    assert filters == [(16, 3), (16, 16), (16, 16), (32, 16), *[(32, 32)] * 5]


def test_paper_cifar10_adds_before_pools_and_takes_what_it_adds_before_relus():
    nodes = Graph(build("paper_cifar10", (3, 32, 32))).nodes
    by_name = {node.linear.name: node for node in nodes[1:]}
    of_conv = {f"conv{i}": (16 if i < 4 else 32, size, size)  # behind the pools of convolutions 3 and 5
               for i, size in enumerate((32, 32, 16, 16, 8, 8, 8, 8, 8), 1)}
    assert {name: node.shape for name, node in by_name.items() if name in of_conv} == of_conv
    assert {name for name, node in by_name.items() if node.step == 2} == {"conv3", "conv5"}
    added = {name: edge for name, node in by_name.items() for edge in node.addends}
    assert {name: edge.source.linear.name for name, edge in added.items()} == {
        "conv3": "conv1", "conv5": "shortcut_conv1", "conv7": "conv5", "conv9": "conv7"}
    assert all(edge.norm and not edge.relu for edge in added.values())
    shortcut = by_name["shortcut_conv1"].input
    assert shortcut.source is by_name["conv3"] and shortcut.norm and not shortcut.relu
    for i in range(2, 10):
        assert by_name[f"conv{i}"].input.source is by_name[f"conv{i - 1}"] and by_name[f"conv{i}"].input.relu
    last = by_name["dense1"].input
    assert last.norm and not last.relu and last.pool == formulas.GLOBAL_MAX
    multiply_adds = sum(
        node.linear.weight.size * (node.step**2 * node.shape[1] * node.shape[2]) for node in nodes[1:])
    assert multiply_adds == pytest.approx(11.19e6, rel=1e-3)


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
    monkeypatch.setattr(network_module, "FORWARD_IMAGES", 16)
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
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises((IsADirectoryError, PermissionError), match="folder"):  # not "damaged"
        Network.load(tmp_path / "folder.npz")
    with pytest.raises(ValueError, match=r"network\.txt does not end in \.npz"):
        build("one_conv").save(tmp_path / "network.txt")


def test_bad_models():
    with pytest.raises(ValueError, match="'three_conv'; known models: one_conv, two_conv, original, paper"):
        build("three_conv")
    known = "unknown preset .julia.; known presets: paper, authors, notebook, best"
    with pytest.raises(ValueError, match=known):
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


def test_a_batchnorm_does_the_relu_directly_behind_it(rng, monkeypatch):
    x = cpu.pack(rng.standard_normal((3, 2, 4, 4), np.float32))
    scale, shift = np.float32([1, 2]), np.float32([0.1, -0.2])
    scaled = cpu.scale_shift(x, scale, shift)
    y = cpu.relu_forward(scaled)
    assert isinstance(y, Deferred) and y.z is x and y.epilogue.relu
    pooled = cpu.avgpool_forward(y)
    assert isinstance(pooled, Deferred) and pooled.z is x
    assert not isinstance(cpu.relu_forward(pooled), Deferred)  # a pool is the last that can be deferred
    np.testing.assert_array_equal(computed(y), cpu.relu_forward(computed(scaled)))
    assert computed(y) is computed(y)  # nobody computes it twice


def test_zeros_stay_exact_unless_a_batchnorm_is_next(monkeypatch):
    seen, forward, forward_before_norm = [], cpu.conv2d_forward, cpu_chain.conv2d_before_norm
    monkeypatch.setattr(cpu, "conv2d_forward", lambda *a: seen.append(False) or forward(*a))
    monkeypatch.setattr(cpu_chain, "conv2d_before_norm",
                        lambda *a: seen.append(True) or forward_before_norm(*a))
    chain = [Conv2D(2), ReLU(), Conv2D(2), BatchNorm(), Conv2D(2), AvgPool(), BatchNorm(),
             Conv2D(2), AvgPool(), ReLU(), Flatten(), Dense(2)]
    models.Network(chain, (1, 4, 4), 2).forward(np.zeros((2, 1, 4, 4), np.float32))
    assert seen == [False, True, True, False]
    seen.clear()
    chain = [Residual([Conv2D(2), ReLU(), Conv2D(1)], [Conv2D(1)]), AvgPool(), BatchNorm(),
             Residual([Conv2D(1)]), ReLU(), Residual([BatchNorm(), Residual([Conv2D(1)])]), BatchNorm(),
             Flatten(), Dense(2)]
    models.Network(chain, (1, 4, 4), 2).forward(np.zeros((2, 1, 4, 4), np.float32))
    assert seen == [False, True, True, False, True]


def test_the_maps_between_convolutions_are_not_made(rng):
    network, run = build("original", (1, 8, 8), rng=0), Pass(cpu, 3, batch_statistics=True, saved={})
    network.propagate(cpu.pack(rng.random((3, 1, 8, 8), np.float32)), run)
    deferred = {name for name, (x, *_) in run.saved.items() if isinstance(x, Deferred)}
    assert {"conv1", "conv2", "avgpool1", "conv3", "conv4", "avgpool2", "conv5", "conv6"} <= deferred
    assert not any(x.numbers is not None for name, (x, *_) in run.saved.items() if name.startswith("conv"))


def test_a_filter_of_nothing_gives_exactly_its_bias(backend, rng):
    network = build("two_conv", (1, 28, 28), rng=3)
    images = np.zeros((17, 1, 28, 28), np.float32)
    images[:, :, 8:12, 8:12] = rng.random((17, 1, 4, 4))
    gradients = sgd.gradients(network, images, np.arange(17) % 10, backend)
    for a, b in zip(gradients, sgd.gradients(network, images, np.arange(17) % 10, "numpy"), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


# ---- numbers that are not finite ----


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_nan_logits_name_no_class(backend, rng):
    network, images = build("one_conv", (1, 8, 8), rng=0), rng.random((5, 1, 8, 8), np.float32)
    images[:3] = 0
    network.weights[:36], network.layers[-1].weight[...] = 1e30, 1e10  # an image of zeros meets neither
    with pytest.raises(FloatingPointError, match="2 of 5 images have logits .* the first is image 3"):
        network.predict(images, backend)
    with pytest.raises(FloatingPointError, match="2 of 5 images have a loss .* the first is image 3"):
        network.evaluate(images, [0] * 5, backend)
    assert network.predict(images[:3], backend).shape == (3,)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_network_that_is_not_finite_is_neither_saved_nor_loaded(bad, tmp_path):
    network, path = build("one_conv", (1, 8, 8), rng=0), tmp_path / "network.npz"
    network.save(path)
    former = path.read_bytes()
    network.layers[1].weight[1, 0, 2, 1] = bad
    message = rf"conv1\.weight holds 1 NaN or infinite numbers \(the first is {bad} at index \(1, 0, 2, 1\)\)"
    with pytest.raises(FloatingPointError, match=message):
        network.save(path)
    assert path.read_bytes() == former
    with np.load(path) as saved:
        np.savez(path, **(dict(saved) | network.state()))
    with pytest.raises(ValueError, match=message):
        Network.load(path)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_statistics_that_are_not_finite_are_not_stored(backend, rng):
    network, images = build("original", (1, 8, 8), rng=0), rng.random((9, 1, 8, 8), np.float32)
    network.calibrate(images, backend)
    network.layers[1].weight[...] = 1e38
    before = {name: array.tobytes() for name, array in network.state().items()}
    with pytest.raises(FloatingPointError, match=r"batchnorm1\.running_.* holds 16 NaN or infinite"):
        network.calibrate(images, backend)
    assert {name: array.tobytes() for name, array in network.state().items()} == before
