"""Compiled code is taken from the disk only while no file of `kernels/` has changed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rso_numba
from rso_numba.kernels import compiling

PROGRAM = """
import numpy as np
from rso_numba.kernels import compiling, cpu
from rso_numba.kernels.cpu import activations, layout

x = cpu.relu_forward(cpu.pack(np.float32([[-1]])))
kernels = layout.pack_blocks, activations.relu_blocks
print(x[0, 0, 0], compiling.DIGEST, sum(sum(kernel.stats.cache_hits.values()) for kernel in kernels))
"""

# prints the weights after 30 trials and an epoch of SGD, whether a kernel came from the cache, and how often
# one was compiled that many others call, with indices of all kinds
TRAINING = """
from itertools import islice
import numpy as np
from rso_numba import build, datasets, rso, sgd
from rso_numba.kernels.cpu.fusion import load_padded
from rso_numba.kernels.cpu.softmax import cross_entropy_gradient_blocks

data = datasets.load_digits()
network = build("one_conv", data.image_shape, rng=0)
for trial in islice(rso.trials(network, data, 1, 64, rng=0), 30):
    pass
sgd.train(network, data, 1, 64, learning_rate=0.1, rng=0)
print(network.weights.tobytes().hex(), sum(cross_entropy_gradient_blocks.stats.cache_hits.values()),
      sum(load_padded.stats.cache_misses.values()))
"""


def edit(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("file", ["formulas.py", "cpu/lanes.py", "cpu/__init__.py", "cuda/fusion.py"])
def test_an_edit_in_any_folder_changes_the_digest(file, tmp_path):
    shutil.copytree(compiling.FOLDER, tmp_path / "kernels")
    assert compiling.digest(tmp_path / "kernels") == compiling.DIGEST
    with open(tmp_path / "kernels" / file, "a") as source:
        source.write("# edited\n")
    assert compiling.digest(tmp_path / "kernels") != compiling.DIGEST


def test_an_edited_formula_takes_effect_and_what_is_stale_is_deleted(tmp_path):
    package, cache = tmp_path / "rso_numba", tmp_path / "cache"
    shutil.copytree(Path(rso_numba.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(cache)}
    environment.pop("NUMBA_DISABLE_JIT", None)

    def run():
        shown = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, cwd=tmp_path,
                               capture_output=True, text=True, check=True).stdout
        value, digest, from_cache = shown.split()
        assert {digest in path.name for path in cache.rglob("*.nb[ic]")} == {True}
        return float(value), int(from_cache), digest

    first, _, before = run()
    again, from_cache, same = run()
    assert first == again == 0 and from_cache == 2 and before == same
    edit(package / "kernels" / "formulas.py", "return ZERO if x <= ZERO else x", "return x")
    value, from_cache, after = run()
    assert value == -1 and from_cache == 0 and after != before


def test_a_process_that_compiles_computes_the_same_bits_as_one_that_reads_the_cache(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_NUM_THREADS": "1"}
    environment.pop("NUMBA_DISABLE_JIT", None)
    (weights, cold, n_compiled), (again, warm, _) = (
        subprocess.run([sys.executable, "-c", TRAINING], env=environment, capture_output=True, text=True,
                       check=True).stdout.split() for _ in range(2))
    assert (cold, warm, n_compiled) == ("0", "1", "1")
    assert weights == again
