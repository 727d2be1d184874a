"""Shared fixtures: the backends that need no GPU, and data small enough for nested loops."""

import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import sklearn.datasets

from rso_numba import datasets

SIMULATED = "test_suites_in_the_simulator"
OF_KERNELS = {"test_fusion", "test_kernels", "test_threads", "test_winograd"}


def pytest_collection_modifyitems(items):
    """Wait for the simulator last."""
    items.sort(key=lambda item: item.name == SIMULATED)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Give kernels one thread, but in the tests that are of kernels all that there are.

    Arrays of tests are small: a second thread saves nothing, and beside another process, such as the
    simulator, it makes all take three times as long. (Tests of what depends on threads set them themselves.)
    """
    all_threads = numba.config.NUMBA_NUM_THREADS
    numba.set_num_threads(all_threads if item.module.__name__ in OF_KERNELS else 1)


@pytest.fixture(scope="session")
def start_suites():
    """Return a function that starts the suites of `cuda`, on a "GPU" or in Numba's "simulator"."""
    suites = [Path(__file__).with_name(name) for name in ("cuda_suite.py", "cuda_search_suite.py")]

    def start(where, output):
        # the simulator has to be chosen before Numba is imported, so in a process of its own
        environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": str(int(where == "simulator"))}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, suites)]
        return subprocess.Popen(command, env=environment, cwd=suites[0].parents[1], stdout=output,
                                stderr=subprocess.STDOUT)

    return start


@pytest.fixture(scope="session", autouse=True)
def simulated(request, start_suites, tmp_path_factory):
    """The process that runs the suites in the simulator, beside all other tests, and its output."""
    if not any(item.name == SIMULATED for item in request.session.items):
        yield None
        return
    path = tmp_path_factory.mktemp("simulator") / "output"
    with open(path, "w") as output:
        process = start_suites("simulator", output)
    yield process, path
    process.kill()


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
