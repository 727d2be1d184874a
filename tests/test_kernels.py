"""Every kernel of both backends against nested loops, and every gradient against differences."""

import naive
import numpy as np
import pytest

from rso_numba import kernels

# (N, C, H, W): one image, one full block of lanes and one more, no square, odd sizes
SHAPES = [(1, 1, 4, 4), (2, 3, 5, 7), (17, 2, 4, 6), (33, 1, 3, 3)]


def _random(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def _close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("filters", [1, 4, 5])
def test_conv2d(backend, rng, shape, size, filters):
    k = kernels.backend(backend)
    x, bias = _random(rng, *shape), _random(rng, filters)
    weight = _random(rng, filters, shape[1], size, size)
    y = k.unpack(k.conv2d_forward(k.pack(x), weight, bias), len(x))
    _close(y, naive.conv2d(x, weight, bias))


@pytest.mark.parametrize("channels", [16, 17])
def test_conv2d_many_channels(backend, rng, channels):
    k = kernels.backend(backend)
    x, bias = _random(rng, 2, channels, 3, 4), _random(rng, channels)
    weight = _random(rng, channels, channels, 3, 3) / 10
    y = k.unpack(k.conv2d_forward(k.pack(x), weight, bias), len(x))
    _close(y, naive.conv2d(x, weight, bias))


@pytest.mark.parametrize("n", [1, 16, 17])
def test_dense(backend, rng, n):
    k = kernels.backend(backend)
    x, weight, bias = _random(rng, n, 11), _random(rng, 6, 11), _random(rng, 6)
    _close(k.unpack(k.dense_forward(k.pack(x), weight, bias), n), naive.dense(x, weight, bias))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel, judge", [
    ("relu_forward", naive.relu),
    ("maxpool_forward", naive.maxpool),
    ("avgpool_forward", naive.avgpool),
    ("globalmax_forward", naive.global_max),
    ("globalmean_forward", naive.global_mean),
    ("flatten_forward", naive.flatten),
])
def test_layers_without_weights(backend, rng, shape, kernel, judge):
    k = kernels.backend(backend)
    x = _random(rng, *shape)
    _close(k.unpack(getattr(k, kernel)(k.pack(x)), len(x)), judge(x))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batchnorm_statistics_leave_out_padding(backend, rng, shape):
    k = kernels.backend(backend)
    x = _random(rng, *shape) + 10  # far from the zeros that pad a block
    mean, variance = k.batchnorm_statistics(k.pack(x), len(x))
    expected_mean, expected_variance = naive.batch_statistics(x)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-6)
    np.testing.assert_allclose(variance, expected_variance, rtol=1e-4)


def test_scale_shift_is_standardize(backend, rng):
    k = kernels.backend(backend)
    x = _random(rng, 5, 3, 4, 4)
    mean, std = _random(rng, 3), np.abs(_random(rng, 3)) + np.float32(0.5)
    y = k.unpack(k.scale_shift(k.pack(x), 1 / std, -mean / std), len(x))
    np.testing.assert_allclose(y, naive.standardize(x, mean, std), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 16, 35])
def test_cross_entropy(backend, rng, n):
    k = kernels.backend(backend)
    logits, labels = 3 * _random(rng, n, 10), rng.integers(10, size=n)
    packed = k.pack(logits)
    _close(k.cross_entropy(packed, labels), naive.cross_entropy(logits, labels))
    assert k.mean_loss(packed, labels) == pytest.approx(naive.mean_loss(logits, labels), rel=1e-6)


def test_cross_entropy_of_huge_logits_is_finite(backend):
    k = kernels.backend(backend)
    logits = np.array([[1e4, -1e4, 0]], np.float32)
    assert k.mean_loss(k.pack(logits), np.array([0])) == 0
    assert k.mean_loss(k.pack(logits), np.array([1])) == pytest.approx(2e4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_cross_entropy_of_broken_logits_is_not_finite(backend, bad):
    k = kernels.backend(backend)
    logits = np.zeros((3, 4), np.float32)
    logits[1, 2] = bad
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(k.mean_loss(k.pack(logits), np.array([0, 1, 2])))


def _check_gradient(forward, arrays, gradients, weights_of_output):
    # loss = sum(output * weights_of_output) in float64, for every entry of every array
    def loss(_):
        return float((forward() * weights_of_output).sum())

    for array, gradient in zip(arrays, gradients, strict=True):
        expected = [naive.central_difference(loss, array, index) for index in np.ndindex(array.shape)]
        np.testing.assert_allclose(np.ravel(gradient), expected, rtol=1e-6, atol=1e-8)


def _backward(backend, kernel, rng, arrays, x_shape, extra=()):
    """Check `kernel`_backward of a backend in float64 against central differences of its forward."""
    k = kernels.backend(backend)
    n = x_shape[0]
    x = arrays[0]

    def forward():
        return k.unpack(getattr(k, f"{kernel}_forward")(k.pack(x), *arrays[1:]), n)

    y = forward()
    dy = rng.standard_normal(y.shape)
    both = k.pack(x), k.pack(y)
    saved = {"relu": both[1:], "maxpool": both, "globalmax": both}.get(kernel, (k.pack(x), *arrays[1:2]))
    gradients = getattr(k, f"{kernel}_backward")(*saved, k.pack(dy))
    dx, *others = gradients if isinstance(gradients, tuple) else (gradients,)
    _check_gradient(forward, arrays, [k.unpack(dx, n), *others], dy)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("n", [1, 17])
def test_conv2d_gradient(backend, rng, size, n):
    arrays = [rng.standard_normal(s) for s in ((n, 2, 3, 4), (3, 2, size, size), (3,))]
    _backward(backend, "conv2d", rng, arrays, arrays[0].shape)


def test_dense_gradient(backend, rng):
    arrays = [rng.standard_normal(s) for s in ((17, 4), (3, 4), (3,))]
    _backward(backend, "dense", rng, arrays, arrays[0].shape)


@pytest.mark.parametrize("kernel", ["relu", "maxpool", "avgpool", "globalmax", "globalmean", "flatten"])
def test_gradient_of_layers_without_weights(backend, rng, kernel):
    arrays = [rng.standard_normal((3, 2, 5, 4))]
    _backward(backend, kernel, rng, arrays, arrays[0].shape)


@pytest.mark.parametrize("n", [3, 17])
def test_batchnorm_gradient_goes_through_the_statistics(backend, rng, n):
    k = kernels.backend(backend)
    x, gamma, beta = rng.standard_normal((n, 2, 3, 2)), rng.standard_normal(2), rng.standard_normal(2)
    dy = rng.standard_normal(x.shape)

    def forward():
        mean, variance = naive.batch_statistics(x)
        return naive.batchnorm(x, gamma, beta, mean, variance, 1e-5)

    mean, variance = k.batchnorm_statistics(k.pack(x), n)
    dx, dgamma, dbeta = k.batchnorm_backward(k.pack(x), k.pack(dy), mean, variance, gamma, 1e-5, n)
    _check_gradient(forward, [x, gamma, beta], [k.unpack(dx, n), dgamma, dbeta], dy)


@pytest.mark.parametrize("n", [3, 17])
def test_batchnorm_with_the_relu_behind_it_is_both(backend, rng, n):
    k = kernels.backend(backend)
    x, dy, gamma = k.pack(_random(rng, n, 2, 5, 7)), k.pack(_random(rng, n, 2, 5, 7)), _random(rng, 2)
    y = k.relu_forward(k.scale_shift(x, _random(rng, 2), _random(rng, 2)))
    moments = k.batchnorm_statistics(x, n)
    found = k.batchnorm_backward(x, k.relu_backward(y, dy), *moments, gamma, 1e-5, n)
    numbers = k.pack(k.unpack(y, n))  # not deferred
    expected = k.batchnorm_backward(x, k.relu_backward(numbers, dy), *moments, gamma, 1e-5, n)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel, expected", [
    ("maxpool", [[1, 0], [0, 0]]),
    ("globalmax", [[1, 0], [0, 0]]),
])
def test_ties_give_the_gradient_to_the_first_pixel(backend, kernel, expected):
    k = kernels.backend(backend)
    x = k.pack(np.full((1, 1, 2, 2), 7, np.float32))
    y = getattr(k, f"{kernel}_forward")(x)
    dx = getattr(k, f"{kernel}_backward")(x, y, np.ones_like(y))
    np.testing.assert_array_equal(k.unpack(dx, 1)[0, 0], expected)


def test_cross_entropy_gradient(backend, rng):
    k = kernels.backend(backend)
    logits, labels = rng.standard_normal((17, 5)), rng.integers(5, size=17)
    gradient = k.unpack(k.cross_entropy_backward(k.pack(logits), labels), 17)
    expected = [
        naive.central_difference(lambda a: naive.mean_loss(a, labels), logits, index)
        for index in np.ndindex(logits.shape)
    ]
    np.testing.assert_allclose(gradient.ravel(), expected, rtol=1e-6, atol=1e-9)


def test_padding_lanes_carry_no_gradient(rng):
    cpu = kernels.backend("cpu")
    x, labels = _random(rng, 3, 4), np.array([0, 1, 2])
    dlogits = cpu.cross_entropy_backward(cpu.pack(x), labels)
    assert not dlogits[0, :, 3:].any()
    x = cpu.pack(_random(rng, 3, 2, 4, 4))
    mean, variance = cpu.batchnorm_statistics(x, 3)
    dx, _, _ = cpu.batchnorm_backward(x, x, mean, variance, np.ones(2, np.float32), 1e-5, 3)
    assert not dx[0, ..., 3:].any()


def test_unknown_backend_lists_the_known():
    with pytest.raises(ValueError, match="'gpu'; known backends: cpu, numpy, cuda, auto"):
        kernels.backend("gpu")
