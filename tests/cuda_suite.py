"""The whole `cuda` backend, judged by nested loops and by its twin in NumPy.

`test_cuda.py` runs this file in a process of its own, in Numba's simulator and on a GPU if there is one. The
simulator runs every thread of the GPU in Python, so everything here is tiny.
"""


import naive
import numpy as np
import pytest
from numba import config, cuda

from rso_numba import datasets, kernels, models, rso, sgd
from rso_numba.kernels import plain
from rso_numba.kernels.cuda import device, layout
from rso_numba.kernels.cuda.convolution import SHARED, conv2d_strided
from rso_numba.kernels.cuda.device import LANES
from rso_numba.layers import (
    AvgPool,
    BatchNorm,
    Conv2D,
    Dense,
    Flatten,
    GlobalMaxPool,
    GlobalMeanPool,
    MaxPool,
    ReLU,
    Standardize,
)

N = LANES + 1  # images: a full block and one more

if config.ENABLE_CUDASIM:
    import simulator

    simulator.repair()


@pytest.fixture
def k():
    """The module of kernels."""
    return kernels.backend("cuda")


def _random(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def _close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


# ---- forward, against nested loops ----


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("shape, filters", [
    ((N, 2, 4, 9), 5), ((1, 1, 3, 2), 4), ((1, SHARED + 1, 1, 2), 3)], ids=str)  # the last in two parts
def test_conv2d(k, rng, shape, size, filters):
    x, bias = _random(rng, *shape), _random(rng, filters)
    weight = _random(rng, filters, shape[1], size, size)
    y = k.unpack(k.conv2d_forward(k.pack(x), weight, bias), len(x))
    _close(y, naive.conv2d(x, weight, bias))


@pytest.mark.parametrize("size", [1, 3])
def test_conv2d_merged_with_an_average_pool(k, rng, size):
    x, weight, bias = _random(rng, 2, 2, 5, 6), _random(rng, 3, 2, size, size), _random(rng, 3)
    merged = np.zeros((3, 2, size + 1, size + 1), np.float32)
    for i in (0, 1):
        for j in (0, 1):
            merged[:, :, i : i + size, j : j + size] += weight / 4
    y = k.unpack(conv2d_strided(k.pack(x), merged, bias, stride=2), 2)
    _close(y, naive.avgpool(naive.conv2d(x, weight, bias)))


@pytest.mark.parametrize("n", [1, N])
def test_dense(k, rng, n):
    x, weight, bias = _random(rng, n, 7), _random(rng, 3, 7), _random(rng, 3)
    _close(k.unpack(k.dense_forward(k.pack(x), weight, bias), n), naive.dense(x, weight, bias))


@pytest.mark.parametrize("kernel, judge", [
    ("relu_forward", naive.relu),
    ("maxpool_forward", naive.maxpool),
    ("avgpool_forward", naive.avgpool),
    ("globalmax_forward", naive.global_max),
    ("globalmean_forward", naive.global_mean),
    ("flatten_forward", naive.flatten),
])
def test_layers_without_weights(k, rng, kernel, judge):
    x = _random(rng, N, 2, 5, 4)
    _close(k.unpack(getattr(k, kernel)(k.pack(x)), N), judge(x))


def test_batchnorm_statistics_leave_out_padding(k, rng):
    x = _random(rng, N, 2, 3, 3) + 10  # far from the zeros that pad a block
    mean, variance = k.batchnorm_statistics(k.pack(x), N)
    expected_mean, expected_variance = naive.batch_statistics(x)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-6)
    np.testing.assert_allclose(variance, expected_variance, rtol=1e-4)


def test_scale_shift_is_standardize(k, rng):
    x, mean = _random(rng, N, 3, 2, 3), _random(rng, 3)
    std = np.abs(_random(rng, 3)) + np.float32(0.5)
    _close(k.unpack(k.scale_shift(k.pack(x), 1 / std, -mean / std), N), naive.standardize(x, mean, std))


@pytest.mark.parametrize("n", [1, 2 * LANES + 1])
def test_losses(k, rng, n):
    logits, labels = 3 * _random(rng, n, 5), rng.integers(5, size=n)
    _close(k.cross_entropy(k.pack(logits), labels), naive.cross_entropy(logits, labels))
    expected = naive.mean_loss(logits, labels)
    assert k.mean_loss(k.pack(logits), labels) == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_loss_of_huge_logits_is_finite_and_of_broken_ones_is_not(k):
    logits = np.array([[1e4, -1e4, 0]], np.float32)
    assert k.mean_loss(k.pack(logits), np.array([0])) == 0
    assert k.mean_loss(k.pack(logits), np.array([1])) == pytest.approx(2e4)
    for bad in (np.nan, np.inf):
        logits = np.array([[0, 0], [0, bad]], np.float32)
        assert not np.isfinite(k.mean_loss(k.pack(logits), np.array([0, 0])))


# ---- backward, against the twin in NumPy (which test_kernels.py judges) ----


def _backward(k, rng, kernel, *arrays, saved="x"):
    """Compare `kernel`_backward of both backends; `saved` names what it takes besides weight and dy."""
    results = []
    for backend in (k, plain):
        x = backend.pack(arrays[0])
        y = getattr(backend, f"{kernel}_forward")(x, *arrays[1:])
        dy = _random(np.random.default_rng(1), *backend.unpack(y, N).shape)
        taken = [{"x": x, "y": y}[name] for name in saved]
        gradients = getattr(backend, f"{kernel}_backward")(*taken, *arrays[1:2], backend.pack(dy))
        dx, *others = gradients if isinstance(gradients, tuple) else (gradients,)
        results.append([backend.unpack(dx, N), *others])
    for found, expected in zip(*results, strict=True):
        assert found.shape == expected.shape
        _close(found, expected)


@pytest.mark.parametrize("size", [1, 3])
def test_conv2d_gradient(k, rng, size):
    _backward(k, rng, "conv2d", _random(rng, N, 2, 3, 4), _random(rng, 3, 2, size, size), _random(rng, 3))


def test_dense_gradient(k, rng):
    _backward(k, rng, "dense", _random(rng, N, 7), _random(rng, 3, 7), _random(rng, 3))


@pytest.mark.parametrize("kernel, saved", [
    ("relu", "y"), ("maxpool", "xy"), ("avgpool", "x"), ("globalmax", "xy"), ("globalmean", "x"),
    ("flatten", "x"),
])
def test_gradient_of_layers_without_weights(k, rng, kernel, saved):
    _backward(k, rng, kernel, _random(rng, N, 2, 5, 3), saved=saved)


def test_batchnorm_gradient(k, rng):
    x, dy, gamma = _random(rng, N, 2, 3, 2), _random(rng, N, 2, 3, 2), _random(rng, 2)
    mean, variance = plain.batchnorm_statistics(x, N)
    found = k.batchnorm_backward(k.pack(x), k.pack(dy), mean, variance, gamma, 1e-5, N)
    expected = plain.batchnorm_backward(x, dy, mean, variance, gamma, 1e-5, N)
    for a, b in zip((k.unpack(found[0], N), *found[1:]), expected, strict=True):
        _close(a, b)


@pytest.mark.parametrize("kernel", ["maxpool", "globalmax"])
def test_ties_give_the_gradient_to_the_first_pixel(k, kernel):
    x = k.pack(np.full((1, 1, 2, 2), 7, np.float32))
    y = getattr(k, f"{kernel}_forward")(x)
    dy = k.pack(np.ones((1, 1, 1, 1) if kernel == "maxpool" else (1, 1), np.float32))
    dx = getattr(k, f"{kernel}_backward")(x, y, dy)
    np.testing.assert_array_equal(k.unpack(dx, 1)[0, 0], [[1, 0], [0, 0]])


def test_cross_entropy_gradient(k, rng):
    logits, labels = _random(rng, N, 5), rng.integers(5, size=N)
    found = k.unpack(k.cross_entropy_backward(k.pack(logits), labels), N)
    _close(found, plain.cross_entropy_backward(logits, labels))


def test_padding_lanes_carry_no_gradient(k, rng):
    dlogits = k.cross_entropy_backward(k.pack(_random(rng, 1, 4)), np.array([0]))
    assert not dlogits.copy_to_host()[0, :, 1:].any()
    x = k.pack(_random(rng, 1, 2, 2, 3))
    mean, variance = k.batchnorm_statistics(x, 1)
    dx, _, _ = k.batchnorm_backward(x, x, mean, variance, np.ones(2, np.float32), 1e-5, 1)
    assert not dx.copy_to_host()[0, ..., 1:].any()


# ---- networks, searches, training ----


def _networks():
    # every kind of layer, in two chains that nothing larger is needed for
    by_max = [Conv2D(2), BatchNorm(), ReLU(), MaxPool(), Conv2D(3, size=1), GlobalMaxPool(), Dense(3)]
    by_mean = [Conv2D(2, use_bias=False), AvgPool(), BatchNorm(), ReLU(), GlobalMeanPool(), Dense(3)]
    flat = [Conv2D(1), ReLU(), Flatten(), Dense(3, use_bias=False)]
    for layers in (by_max, by_mean, flat):
        network = models.Network([Standardize(), *layers], (1, 4, 5), 3)
        network.initialize("he", 0)
        network.weights += np.float32(0.1) * np.cos(np.arange(network.n_weights, dtype=np.float32))
        yield network


def _data(rng, n=N):
    images, labels = rng.random((n, 1, 4, 5), np.float32), np.arange(n) % 3
    return datasets.Dataset(images, labels, images, labels, 3)


@pytest.mark.parametrize("network", list(_networks()), ids=["max", "mean", "flat"])
def test_networks(rng, network):
    data = _data(rng)
    network.fit_scaling(data.train_images)
    batch = data.train_images, data.train_labels
    found, expected = (sgd.gradients(network, *batch, backend) for backend in ("cuda", "numpy"))
    for parameter, a, b in zip(network.parameters(), found, expected, strict=True):
        tolerance = 1e-5 * np.abs(b).max() + 1e-7
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=tolerance, err_msg=str(parameter))
    results = []
    for backend in ("cuda", "numpy"):
        network.calibrate(data.train_images, backend)
        results.append((network.forward(data.train_images, backend), network.evaluate(*batch, backend)))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)


@pytest.mark.parametrize("name", ["one_conv", "paper_mnist"])
def test_models(rng, name):
    network = models.build(name, (1, 4, 4), n_classes=3, rng=1)
    images = rng.random((2, 1, 4, 4), np.float32)
    found, expected = (network.forward(images, backend) for backend in ("cuda", "numpy"))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(network.predict(images, "cuda"), expected.argmax(axis=1))


def test_a_search_decides_as_with_numpy(rng):
    weights, losses = [], []
    for backend in ("cuda", "cuda", "numpy"):
        network = list(_networks())[2]
        trials = rso.trials(network, _data(np.random.default_rng(2)), 1, N, evaluation="full",
                            backend=backend, rng=0)
        losses.append([trial.losses for _, trial in zip(range(12), trials, strict=False)])
        weights.append(network.weights.copy())
    assert losses[0] == losses[1]  # to the last bit
    np.testing.assert_allclose(losses[0], losses[2], rtol=1e-5)
    np.testing.assert_array_equal(weights[0], weights[2])


def test_sgd_takes_the_same_steps_as_with_numpy(rng):
    weights, data = [], _data(rng)
    for backend in ("cuda", "auto", "numpy"):
        network = list(_networks())[2]
        sgd.train(network, data, 1, LANES, 0.1, momentum=0.5, backend=backend, rng=0)
        weights.append(network.weights)
    np.testing.assert_array_equal(weights[0], weights[1])
    np.testing.assert_allclose(weights[0], weights[2], rtol=1e-4, atol=1e-6)


# ---- the module itself ----


class CUDAError(Exception):
    """An error of the driver, named as one of them is."""


@pytest.mark.parametrize("where", ["device_array", "to_device", "launch"])
@pytest.mark.parametrize("said, told", [
    ("CUDA_ERROR_OUT_OF_MEMORY", "memory of the GPU is full.*OUT_OF_MEMORY.*smaller batch_size"),
    ("CUDA_ERROR_LAUNCH_FAILED", "GPU does not answer.*LAUNCH_FAILED.*start Python again"),
])
def test_what_the_driver_says_becomes_one_error(k, rng, monkeypatch, where, said, told):
    class Failing:
        def __getitem__(self, _):
            return fail

    def fail(*_):
        raise CUDAError(said)

    if where == "launch":
        monkeypatch.setattr(layout, "pack_kernel", Failing())
    else:
        monkeypatch.setattr(cuda, where, fail)
    with pytest.raises(kernels.GpuError, match=told):
        k.pack(_random(rng, 1, 2))


def test_other_errors_are_left_as_they_are(k, monkeypatch):
    monkeypatch.setattr(cuda, "to_device", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        k.pack(np.zeros((1, 2), np.float32))


def test_the_drivers_errors_are_called_so():
    from numba.cuda.cudadrv.driver import CudaAPIError

    assert CudaAPIError.__name__ in device.DRIVER_ERRORS


def test_it_works_here(k):
    assert kernels.gpu_problem() is None
    assert kernels.resolve("auto") == "cuda"
