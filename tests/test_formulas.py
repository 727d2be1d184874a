"""What the CPU computes in another form than `formulas.py`, with vectors, gives the same numbers."""

import math

import numpy as np
import pytest

from rso_numba.kernels import cpu, formulas
from rso_numba.kernels.compiling import kernel
from rso_numba.kernels.cpu import lanes, last_layer
from rso_numba.kernels.cpu.lanes import LANES

SPECIAL = np.float32([0, -0.0, 1, -1, np.nan, np.inf, -np.inf])


@kernel
def vectors(a, b, larger, gradient, zero_or_more):
    # all (n, LANES)
    for i in range(a.shape[0]):
        x, y = lanes.load(a, (i,)), lanes.load(b, (i,))
        lanes.store(larger, (i,), lanes.maximum(x, y))
        lanes.store(gradient, (i,), lanes.relu_gradient(x, y))
        lanes.store(zero_or_more, (i,), lanes.maximum(lanes.broadcast(a.dtype.type(0)), x))


def test_vectors_of_lanes(rng):
    pairs = np.array([(x, y) for x in SPECIAL for y in SPECIAL], np.float32)
    pairs = np.concatenate([pairs, rng.standard_normal((-len(pairs) % LANES + 10 * LANES, 2), np.float32)])
    a, b = (np.ascontiguousarray(numbers).reshape(-1, LANES) for numbers in pairs.T)
    found = [np.empty_like(a) for _ in range(3)]
    vectors(a, b, *found)
    expected = [[formula(*numbers) for numbers in pairs] for formula in (
        formulas.maximum, formulas.relu_gradient, lambda x, _: formulas.relu(x))]
    for array, numbers in zip(found, expected, strict=True):
        np.testing.assert_array_equal(array.ravel(), np.float32(numbers))


def test_gradient_of_batchnorm(rng):
    n, shape = 19, (3, 4, 5)
    x, dy = rng.standard_normal((2, n, *shape)).astype(np.float32)
    gamma, epsilon = rng.standard_normal(3).astype(np.float32), 1e-3
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3))
    dx, _, _ = cpu.batchnorm_backward(cpu.pack(x), cpu.pack(dy), mean, variance, gamma, epsilon, n)
    dx, inverse = cpu.unpack(dx, n), 1 / np.sqrt(variance + epsilon)
    means = dy.mean((0, 2, 3)), (dy * (x - mean[:, None, None]) * inverse[:, None, None]).mean((0, 2, 3))
    for (i, c, h, w), found in np.ndenumerate(dx):
        expected = formulas.batchnorm_gradient(x[i, c, h, w], dy[i, c, h, w], mean[c], inverse[c], gamma[c],
                                               means[0][c], means[1][c])
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("size", [1, 30, 1e4])  # with the largest, the exact way is taken
@pytest.mark.parametrize("bad", [None, np.nan, np.inf, -np.inf])
def test_loss_of_a_changed_logit(size, bad, rng):
    n_classes, k, step = 4, 2, np.float32(0.7)
    z = (size * rng.standard_normal((n_classes, LANES))).astype(np.float32)
    a, labels = rng.standard_normal((2, LANES)).astype(np.float32), np.arange(LANES) % n_classes
    if bad is not None:
        z[k, 0] = bad
    expected = 0.0
    for i, label in enumerate(labels):
        own, others = z[k, i] + step * a[0, i], np.delete(z[:, i], k)
        total = sum(math.exp(logit - others.max()) for logit in others)
        labelled = own if label == k else z[label, i]
        with np.errstate(invalid="ignore"):
            expected += formulas.changed_cross_entropy(own, total, others.max(), labelled)
    nothing = np.empty((0, 4), np.int64), np.empty(0, np.float32)
    ((found,),) = last_layer.last_layer_losses(z, a, *nothing, k, 0, np.array([step]), labels, False)
    assert np.isfinite(found) == np.isfinite(expected)
    if np.isfinite(expected):
        assert found == pytest.approx(expected, rel=1e-5)
