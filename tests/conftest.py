"""Shared fixtures: the backends that need no GPU, and data small enough for nested loops."""

import numpy as np
import pytest

from rso_numba import datasets


@pytest.fixture(params=["cpu", "numpy"])
def backend(request):
    """Name of a backend; a test that takes it runs on each. (`cuda` has its own, cuda_suite.py.)"""
    return request.param


@pytest.fixture(scope="session")
def digits():
    """scikit-learn's digits, 8x8, (1437, 1, 8, 8) for training."""
    return datasets.load_digits()


@pytest.fixture(scope="session")
def small(digits):
    """70 training and 30 test digits."""
    return digits.subset(70, 30, rng=0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
