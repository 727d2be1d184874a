"""Threads: how they wait beside other programs, and what happens after a fork."""

import multiprocessing
import os
import subprocess
import sys

import pytest

from rso_numba import kernels
from rso_numba.kernels import threads

# trains, forks a pool of processes, and trains in them; prints the error of the first
FORK_AFTER_TRAINING = """
import multiprocessing
from rso_numba import build, datasets, sgd

def train(backend):
    data = datasets.load_digits().subset(64, 8)
    network = build("one_conv", data.image_shape, rng=0)
    try:
        return sgd.train(network, data, 1, backend=backend, rng=0)["train_loss"][0]
    except RuntimeError as error:
        return str(error)

train("cpu")
with multiprocessing.get_context("fork").Pool(1) as pool:
    print(*pool.map(train, ["cpu", "numpy"]), sep="\\n")
"""

# trains in three threads of Python at once, then one after the other; prints whether the weights are the same
TRAINING_AT_ONCE = """
import threading
import numba
from rso_numba import CNNClassifier, datasets

data = datasets.load_digits().subset(300, 8, rng=0)
rows = data.train_images.reshape(300, -1)
jobs = [("rso", 0), ("sgd", 1), ("rso", 2)]

def fit(weights, solver, seed):
    max_iter = {"rso": 1, "sgd": 20}[solver]
    classifier = CNNClassifier(solver, random_state=seed, max_iter=max_iter, batch_size=100)
    classifier.fit(rows, data.train_labels).predict(rows)
    weights[seed] = classifier.network_.weights.tobytes()

at_once, in_turn = {}, {}
threads = [threading.Thread(target=fit, args=(at_once, *job)) for job in jobs]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for job in jobs:
    fit(in_turn, *job)
print(numba.threading_layer(), len(at_once), at_once == in_turn)
"""


@pytest.mark.parametrize("given, expected", [
    ({}, {"GOMP_SPINCOUNT": str(threads.SPINS)}),
    ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
    ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
])
def test_threads_wait_politely_unless_the_user_says_how(given, expected):
    threads.wait_politely(given)
    assert given == expected


def test_importing_the_package_is_enough():
    code = "import os, sys, rso_numba; print(os.environ['GOMP_SPINCOUNT'], 'numba' in sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True,
                           check=True)
    assert shown.stdout.split() == [str(threads.SPINS), "False"]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_a_fork_that_has_lost_the_threads_says_so_at_its_first_kernel():
    shown = subprocess.run([sys.executable, "-c", FORK_AFTER_TRAINING], capture_output=True, text=True,
                           timeout=300, check=True)
    error, loss = shown.stdout.splitlines()
    assert "was forked" in error and "'spawn'" in error
    assert 0 < float(loss) < 10  # NumPy needs no threads


@pytest.mark.parametrize("layer", ["omp", "tbb", "workqueue"])
def test_threads_of_python_train_at_the_same_time(layer):
    environment = {**os.environ, "NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "2"}
    shown = subprocess.run([sys.executable, "-c", TRAINING_AT_ONCE], env=environment, capture_output=True,
                           text=True, timeout=600)
    if "No threading layer could be loaded" in shown.stderr:
        pytest.skip(f"Numba's threading layer {layer} is not installed")
    assert shown.stdout.split() == [layer, "3", "True"], shown.stderr


def test_without_a_fork_nothing_is_lost():
    assert kernels.backend("cpu").__name__ == "rso_numba.kernels.cpu"
