"""Convolution at points (Winograd) against the direct sums, which `plain.py` and `conv2d_blocks` do."""

import numpy as np
import pytest

from rso_numba.kernels import cpu, formulas, plain
from rso_numba.kernels.cpu import convolution, memory, tiles, winograd
from rso_numba.kernels.cpu.convolution import conv2d_before_norm, conv2d_fused
from rso_numba.kernels.cpu.fusion import Epilogue, no_epilogue
from rso_numba.kernels.cpu.norms import mean_and_variance

# (N, C_in, H, W), C_out: ragged blocks, tiles that hang over an edge, an odd number of tiles, more channels
# than a tile has
CASES = [((33, 16, 7, 7), 16), ((20, 9, 14, 11), 10), ((3, 8, 28, 28), 17), ((16, 16, 8, 6), 8),
         ((17, 8, 12, 13), 8)]
cases = pytest.mark.parametrize("shape, n_filters", CASES, ids=str)


def draw(rng, shape, n_filters, dtype=np.float32):
    weight = rng.standard_normal((n_filters, shape[1], 3, 3)).astype(dtype)
    assert winograd.pays(weight, shape[1:])
    return rng.standard_normal(shape).astype(dtype), weight, rng.standard_normal(n_filters).astype(dtype)


@cases
@pytest.mark.parametrize("strip", [tiles.STRIP, 1])
@pytest.mark.parametrize("size", [0, 2**40])
def test_outputs_and_statistics(shape, n_filters, strip, size, rng, monkeypatch):
    monkeypatch.setattr(tiles, "STRIP", strip)
    monkeypatch.setattr(convolution, "NONTEMPORAL_BYTES", size)
    monkeypatch.setattr(memory, "SMALLEST", 0)  # the output begins a cache line
    x, weight, bias = draw(rng, shape, n_filters)
    expected = plain.conv2d_forward(*(a.astype(np.float64) for a in (x, weight, bias)))
    x = cpu.pack(x)
    found, statistics = conv2d_fused(x, no_epilogue(x), weight, bias, shape[0])
    mean, variance = mean_and_variance(statistics, shape[0], found)
    np.testing.assert_allclose(cpu.unpack(found, shape[0]), expected, atol=1e-5 * expected.std())
    np.testing.assert_allclose(mean, expected.mean((0, 2, 3)), atol=1e-6 * expected.std())
    np.testing.assert_allclose(variance, expected.var((0, 2, 3)), rtol=1e-5)


@cases
def test_what_is_added_to_a_start(shape, n_filters, rng):
    x, weight, bias = draw(rng, shape, n_filters)
    start = rng.standard_normal((shape[0], n_filters, *shape[2:]), np.float32)
    expected = start + plain.conv2d_forward(
        *(a.astype(np.float64) for a in (x, weight)), np.zeros(n_filters))  # in the place of the bias
    x, start = cpu.pack(x), cpu.pack(start)
    for y in (None, start):
        found, statistics = conv2d_fused(x, no_epilogue(x), weight, bias, shape[0], start, y=y)
        mean, variance = mean_and_variance(statistics, shape[0], found)
        np.testing.assert_allclose(cpu.unpack(found, shape[0]), expected, atol=1e-5 * expected.std())
        np.testing.assert_allclose(mean, expected.mean((0, 2, 3)), atol=1e-6 * expected.std())
        np.testing.assert_allclose(variance, expected.var((0, 2, 3)), rtol=1e-5)
    assert found is start


@cases
def test_it_is_exact_but_for_rounding(shape, n_filters, rng):
    x, weight, bias = draw(rng, shape, n_filters, np.float64)
    found = cpu.unpack(conv2d_before_norm(cpu.pack(x), weight, bias), shape[0])
    np.testing.assert_allclose(found, plain.conv2d_forward(x, weight, bias), atol=1e-12)


@pytest.mark.parametrize("pool", [formulas.NO_POOL, formulas.MAX])
def test_of_an_epilogue(pool, rng, monkeypatch):
    shape = 17, 9, 14, 12
    x, weight, bias = draw(rng, shape, 8)
    scale, shift = rng.standard_normal((2, 9), np.float32)
    epilogue = Epilogue(scale, shift, True, pool)
    found, _ = conv2d_fused(cpu.pack(x), epilogue, weight, bias, None)
    monkeypatch.setattr(convolution, "pays", lambda *_: False)
    direct, _ = conv2d_fused(cpu.pack(x), epilogue, weight, bias, None)
    assert np.any(found != direct)
    np.testing.assert_allclose(found, direct, atol=1e-5 * direct.std())


def test_small_maps_few_channels_and_other_filters_go_the_direct_way():
    weight = np.ones((16, 16, 3, 3))
    assert not winograd.pays(weight, (16, 3, 3)) and not winograd.pays(weight[:, :1], (1, 28, 28))
    assert not winograd.pays(weight[:, :, :1, :1], (16, 28, 28))
