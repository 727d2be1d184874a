"""What stands between two mixing layers, applied while the second reads: against the layers one by one."""

import numpy as np
import pytest

from rso_numba.kernels import cpu, products, tails

POOLS = {
    tails.KEEP: lambda x: x,
    tails.MAX: cpu.maxpool_forward,
    tails.MEAN: cpu.avgpool_forward,
    tails.GLOBAL_MAX: lambda x: cpu.globalmax_forward(x)[..., None, None, :],
    tails.GLOBAL_MEAN: lambda x: cpu.globalmean_forward(x)[..., None, None, :],
}
shapes = pytest.mark.parametrize(
    "shape", [(3, 2, 6, 6), (17, 5, 7, 9), (16, 1, 28, 28), (5, 16, 14, 5)], ids=str)
pools = pytest.mark.parametrize("pool", POOLS)


def tail_of(x, relu, pool, rng):
    scale, shift = (rng.standard_normal(x.shape[1]).astype(np.float32) for _ in range(2))
    return tails.Tail(scale, shift, relu, pool)


def one_by_one(x, tail):
    x = cpu.scale_shift(x, tail.scale, tail.shift)
    return POOLS[tail.pool](cpu.relu_forward(x) if tail.relu else x)


@shapes
@pools
@pytest.mark.parametrize("relu", [True, False])
def test_tail(shape, relu, pool, rng):
    x = cpu.pack(rng.standard_normal(shape, np.float32))
    tail = tail_of(x, relu, pool, rng)
    np.testing.assert_allclose(cpu.apply_tail(x, tail), one_by_one(x, tail), rtol=1e-5, atol=1e-6)


@shapes
@pytest.mark.parametrize("size", [3, 1])
@pytest.mark.parametrize("pool", [tails.KEEP, tails.MEAN])
def test_what_is_pending_for_a_convolution(shape, size, pool, rng):
    z = cpu.pack(rng.standard_normal(shape, np.float32))
    tail = tail_of(z, True, pool, rng)
    x, made = cpu.scale_shift(z, tail.scale, tail.shift, True, lazy=True), one_by_one(z, tail)
    x = cpu.avgpool_forward(x) if pool == tails.MEAN else x
    assert isinstance(x, tails.Pending) and x.shape == made.shape
    weight = rng.standard_normal((6, shape[1], size, size), np.float32)
    y, expected = (cpu.conv2d_forward(a, weight, np.ones(6, np.float32)) for a in (x, made))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    dy = cpu.pack(rng.standard_normal((shape[0], 6, *made.shape[2:4]), np.float32))
    dx = [cpu.conv2d_backward(a, weight, dy) for a in (x, made)]
    for gradient, expected in zip(*dx, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    dy = cpu.avgpool_forward(made)
    np.testing.assert_array_equal(cpu.avgpool_backward(x, dy), cpu.avgpool_backward(made, dy))


@shapes
@pools
@pytest.mark.parametrize("n_filters, strip", [(1, products.STRIP), (6, products.STRIP), (6, 1), (6, 5000)])
def test_convolution_of_a_tail(shape, pool, n_filters, strip, rng, monkeypatch):
    monkeypatch.setattr(products, "STRIP", strip)
    x, n = cpu.pack(rng.standard_normal(shape, np.float32)), shape[0]
    tail = tail_of(x, True, pool, rng)
    weight = rng.standard_normal((n_filters, shape[1], 3, 3), np.float32)
    bias = rng.standard_normal(n_filters, np.float32)
    expected = cpu.conv2d_forward(one_by_one(x, tail), weight, bias)
    found, (mean, variance) = cpu.conv2d_stage(x, tail, weight, bias, n)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    y = cpu.unpack(found, n).astype(np.float64)
    np.testing.assert_allclose(mean, y.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, y.var((0, 2, 3)), rtol=1e-5)
    start = cpu.pack(rng.standard_normal((n, *found.shape[1:4]), np.float32))
    added, _ = cpu.conv2d_stage(x, tail, weight, bias, None, start)
    np.testing.assert_allclose(added, start + expected - bias[:, None, None, None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n, height", [(16, 28), (3, 5)])
def test_statistics_far_from_zero_and_from_the_first_pixels(n, height, rng):
    x = cpu.pack(rng.standard_normal((n, 1, height, 11), np.float32) / 100 + 1)
    weight, bias = np.full((5, 1, 3, 3), 0.1, np.float32), np.full(5, 30, np.float32)
    found, (mean, variance) = cpu.conv2d_stage(x, tails.no_tail(x), weight, bias, n)
    y = cpu.unpack(found, n).astype(np.float64)
    np.testing.assert_allclose(mean, y.mean((0, 2, 3)), rtol=1e-7)
    np.testing.assert_allclose(variance, y.var((0, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("streamed", [0, 2**40])
def test_what_is_streamed_is_the_same(streamed, rng, monkeypatch):
    x, bias = cpu.pack(rng.standard_normal((50, 3, 6, 6), np.float32)), np.zeros(5, np.float32)
    weight = rng.standard_normal((5, 3, 3, 3), np.float32)
    expected = cpu.conv2d_forward(x, weight, bias)
    monkeypatch.setattr(cpu, "STREAMED", streamed)
    np.testing.assert_array_equal(cpu.conv2d_forward(x, weight, bias), expected)


@shapes
@pools
def test_dense_layer_of_a_tail(shape, pool, rng):
    x = cpu.pack(rng.standard_normal(shape, np.float32))
    tail = tail_of(x, True, pool, rng)
    features = cpu.flatten_forward(one_by_one(x, tail))
    weight, bias = rng.standard_normal((5, features.shape[1]), np.float32), rng.standard_normal(5, np.float32)
    expected = cpu.dense_forward(features, weight, bias)
    np.testing.assert_allclose(cpu.dense_stage(x, tail, weight, bias), expected, rtol=1e-4, atol=1e-4)
    start = expected + 1
    added = cpu.dense_stage(x, tail, weight, bias, start)
    np.testing.assert_allclose(added, expected + start - bias[:, None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pools
def test_a_spoilt_pixel_shows(bad, pool):
    x = np.zeros((1, 1, 4, 4), np.float32)
    x[0, 0, 1, 1] = bad
    x = cpu.pack(x)
    tail = tails.Tail(np.ones(1, np.float32), np.zeros(1, np.float32), True, pool)
    assert not np.isfinite(cpu.apply_tail(x, tail)[0, ..., 0]).all()
