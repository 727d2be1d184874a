"""What stands between two linear layers, applied while the second reads: against the layers one by one."""

import numba
import numpy as np
import pytest

from rso_numba.kernels import cpu, formulas, plain
from rso_numba.kernels.cpu import convolution, fusion, memory, tiles
from rso_numba.kernels.cpu.activations import computed
from rso_numba.kernels.cpu.convolution import conv2d_fused
from rso_numba.kernels.cpu.dense import dense_fused
from rso_numba.kernels.cpu.lanes import LANES
from rso_numba.kernels.cpu.norms import mean_and_variance

POOLS = {
    formulas.NO_POOL: lambda x: x,
    formulas.MAX: cpu.maxpool_forward,
    formulas.MEAN: cpu.avgpool_forward,
    formulas.GLOBAL_MAX: lambda x: cpu.globalmax_forward(x)[..., None, None, :],
    formulas.GLOBAL_MEAN: lambda x: cpu.globalmean_forward(x)[..., None, None, :],
}
shapes = pytest.mark.parametrize(
    "shape", [(3, 2, 6, 6), (17, 5, 7, 9), (16, 1, 28, 28), (5, 16, 14, 5)], ids=str)
pools = pytest.mark.parametrize("pool", POOLS)


def epilogue_of(x, relu, pool, rng):
    scale, shift = (rng.standard_normal(x.shape[1]).astype(np.float32) for _ in range(2))
    return fusion.Epilogue(scale, shift, relu, pool)


def one_by_one(x, epilogue):
    x = cpu.scale_shift(x, epilogue.scale, epilogue.shift)
    return computed(POOLS[epilogue.pool](cpu.relu_forward(x) if epilogue.relu else x))


@shapes
@pools
@pytest.mark.parametrize("relu", [True, False])
def test_epilogue(shape, relu, pool, rng):
    x = cpu.pack(rng.standard_normal(shape, np.float32))
    epilogue = epilogue_of(x, relu, pool, rng)
    found = fusion.apply_epilogue(x, epilogue)
    np.testing.assert_allclose(found, one_by_one(x, epilogue), rtol=1e-5, atol=1e-6)


@shapes
@pytest.mark.parametrize("size", [3, 1])
@pytest.mark.parametrize("pool", [formulas.NO_POOL, formulas.MEAN])
def test_what_is_deferred_for_a_convolution(shape, size, pool, rng):
    z = cpu.pack(rng.standard_normal(shape, np.float32))
    epilogue = epilogue_of(z, True, pool, rng)
    x, made = cpu.relu_forward(cpu.scale_shift(z, epilogue.scale, epilogue.shift)), one_by_one(z, epilogue)
    x = cpu.avgpool_forward(x) if pool == formulas.MEAN else x
    assert isinstance(x, fusion.Deferred) and x.shape == made.shape
    weight = rng.standard_normal((6, shape[1], size, size), np.float32)
    y, expected = (cpu.conv2d_forward(a, weight, np.ones(6, np.float32)) for a in (x, made))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    dy = cpu.pack(rng.standard_normal((shape[0], 6, *made.shape[2:4]), np.float32))
    dx = [cpu.conv2d_backward(a, weight, dy) for a in (x, made)]
    for gradient, expected in zip(*dx, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    dy = cpu.avgpool_forward(made)
    np.testing.assert_array_equal(cpu.avgpool_backward(x, dy), cpu.avgpool_backward(made, dy))


@pytest.mark.parametrize("strip", [tiles.STRIP, 1])
def test_borders_of_later_blocks(strip, rng, monkeypatch):
    # maps of one strip keep their border, and of several strips each has its own
    monkeypatch.setattr(tiles, "STRIP", strip)
    x = rng.standard_normal((4 * LANES * numba.config.NUMBA_NUM_THREADS, 2, 6, 5), np.float32)
    weight, bias = rng.standard_normal((3, 2, 3, 3), np.float32), np.ones(3, np.float32)
    found = cpu.unpack(cpu.conv2d_forward(cpu.pack(x), weight, bias), len(x))
    np.testing.assert_allclose(found, plain.conv2d_forward(x, weight, bias), rtol=1e-4, atol=1e-4)


@shapes
@pools
@pytest.mark.parametrize("n_filters, strip", [(1, tiles.STRIP), (6, tiles.STRIP), (6, 1), (6, 5000)])
def test_convolution_of_an_epilogue(shape, pool, n_filters, strip, rng, monkeypatch):
    monkeypatch.setattr(tiles, "STRIP", strip)
    x, n = cpu.pack(rng.standard_normal(shape, np.float32)), shape[0]
    epilogue = epilogue_of(x, True, pool, rng)
    weight = rng.standard_normal((n_filters, shape[1], 3, 3), np.float32)
    bias = rng.standard_normal(n_filters, np.float32)
    expected = cpu.conv2d_forward(one_by_one(x, epilogue), weight, bias)
    found, statistics = conv2d_fused(x, epilogue, weight, bias, n)
    mean, variance = mean_and_variance(statistics, n, found)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    y = cpu.unpack(found, n).astype(np.float64)
    np.testing.assert_allclose(mean, y.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, y.var((0, 2, 3)), rtol=1e-5)
    start = cpu.pack(rng.standard_normal((n, *found.shape[1:4]), np.float32))
    added, _ = conv2d_fused(x, epilogue, weight, bias, None, start)
    np.testing.assert_allclose(added, start + expected - bias[:, None, None, None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n, height", [(16, 28), (3, 5)])
def test_statistics_far_from_zero_and_from_the_first_pixels(n, height, rng):
    x = cpu.pack(rng.standard_normal((n, 1, height, 11), np.float32) / 100 + 1)
    weight, bias = np.full((5, 1, 3, 3), 0.1, np.float32), np.full(5, 30, np.float32)
    found, statistics = conv2d_fused(x, fusion.no_epilogue(x), weight, bias, n)
    mean, variance = mean_and_variance(statistics, n, found)
    y = cpu.unpack(found, n).astype(np.float64)
    np.testing.assert_allclose(mean, y.mean((0, 2, 3)), rtol=1e-7)
    np.testing.assert_allclose(variance, y.var((0, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("size", [0, 2**40])
@pytest.mark.parametrize("begin", [0, 4])  # in the middle of a line such a write would end the process
def test_what_is_stored_past_the_caches_is_the_same(size, begin, rng, monkeypatch):
    x, bias = cpu.pack(rng.standard_normal((50, 3, 6, 6), np.float32)), np.zeros(5, np.float32)
    weight = rng.standard_normal((5, 3, 3, 3), np.float32)
    expected = cpu.conv2d_forward(x, weight, bias)
    monkeypatch.setattr(memory, "SMALLEST", 0)
    y = memory.empty((expected.size + begin,), np.float32)[begin:].reshape(expected.shape)
    monkeypatch.setattr(convolution, "NONTEMPORAL_BYTES", size)
    found, _ = conv2d_fused(x, fusion.no_epilogue(x), weight, bias, None, y=y, exact_zeros=True)
    np.testing.assert_array_equal(found, expected)


@shapes
@pools
def test_dense_layer_of_an_epilogue(shape, pool, rng):
    x = cpu.pack(rng.standard_normal(shape, np.float32))
    epilogue = epilogue_of(x, True, pool, rng)
    features = cpu.flatten_forward(one_by_one(x, epilogue))
    weight, bias = rng.standard_normal((5, features.shape[1]), np.float32), rng.standard_normal(5, np.float32)
    expected = cpu.dense_forward(features, weight, bias)
    np.testing.assert_allclose(dense_fused(x, epilogue, weight, bias), expected, rtol=1e-4, atol=1e-4)
    start = expected + 1
    added = dense_fused(x, epilogue, weight, bias, start)
    np.testing.assert_allclose(added, expected + start - bias[:, None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pools
def test_a_spoilt_pixel_shows(bad, pool):
    x = np.zeros((1, 1, 4, 4), np.float32)
    x[0, 0, 1, 1] = bad
    x = cpu.pack(x)
    epilogue = fusion.Epilogue(np.ones(1, np.float32), np.zeros(1, np.float32), True, pool)
    assert not np.isfinite(fusion.apply_epilogue(x, epilogue)[0, ..., 0]).all()
