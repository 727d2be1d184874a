"""Shared fixtures: the backends that need no GPU, and data small enough for nested loops."""

import numba
import numpy as np
import pytest
import sklearn.datasets

from rso_numba import datasets

OF_KERNELS = {"test_fusion", "test_kernels", "test_threads", "test_winograd"}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Give kernels one thread, but in the tests that are of kernels all that there are.

    Arrays of tests are small: a second thread saves nothing, and beside another busy process it makes all
    take three times as long. (Tests of what depends on threads set them themselves.)
    """
    all_threads = numba.config.NUMBA_NUM_THREADS
    numba.set_num_threads(all_threads if item.module.__name__ in OF_KERNELS else 1)


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


@pytest.fixture(scope="session")
def few(small):
    """The same digits of 4x4 pixels, as small as paper_mnist takes them."""
    train, test = (images[:, :, ::2, ::2] for images in (small.train_images, small.test_images))
    return datasets.Dataset(train, small.train_labels, test, small.test_labels, n_classes=10)


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """Stand in an empty folder, where no files of data sets are named or found, and none are downloaded."""
    monkeypatch.delenv("RSO_NUMBA_DATA", raising=False)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")

    def no_download(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", no_download)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
