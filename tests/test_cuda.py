"""The `cuda` backend: its suite in processes of its own, and what is said where it cannot run."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rso_numba import kernels, models
from rso_numba.__main__ import main


@pytest.mark.parametrize("where", ["simulator", "GPU"])
def test_suites(where):
    if where == "GPU" and (problem := kernels.gpu_problem()):
        pytest.skip(f"no GPU to run on: {problem}")
    suites = [Path(__file__).with_name(name) for name in ("cuda_suite.py", "cuda_search_suite.py")]
    # the simulator has to be chosen before Numba is imported, so in a process of its own
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": str(int(where == "simulator"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, suites)]
    ended = subprocess.run(command, env=environment, cwd=suites[0].parents[1], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_nothing_else_imports_cuda():
    code = (
        "import sys, numpy, rso_numba; from rso_numba.evaluators import DeltaForward\n"
        "images = numpy.zeros((1, 1, 8, 8), numpy.float32)\n"
        "for backend in ('cpu', 'numpy'): rso_numba.build('one_conv', (1, 8, 8)).forward(images, backend)\n"
        "print([name for name in sys.modules if name.startswith(('numba.cuda', 'numba_cuda'))])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


# ---- where no GPU works ----


@pytest.fixture
def problem_of(monkeypatch):
    """Return a function that says what `gpu_problem` finds with a driver made up of attributes."""
    device = pytest.importorskip("rso_numba.kernels.cuda.device", reason="this Numba has no CUDA target")
    device.problem.cache_clear()

    def find(**attributes):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(device, "cuda", SimpleNamespace(**attributes))
        return kernels.gpu_problem()

    yield find
    monkeypatch.undo()
    device.problem.cache_clear()


def _driver(capability=(9, 0), toolkit=(13, 0)):
    device = SimpleNamespace(compute_capability=capability)
    return dict(is_available=lambda: True, get_current_device=lambda: device,
                runtime=SimpleNamespace(get_version=lambda: toolkit))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.delenv("NUMBA_ENABLE_CUDASIM", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "numba-cuda is not installed" in kernels.gpu_problem()
    assert "pip install -e '.[cuda]'" in kernels.gpu_problem()
    assert kernels.resolve("auto") == "cpu"


@pytest.mark.parametrize("error, n_gpus, told", [
    ("library cannot\nbe found", 0, r"no driver.*\(library cannot be found\).*nvidia\.com/drivers"),
    (None, 0, "sees no GPU.*CUDA_VISIBLE_DEVICES"),
    (None, 1, r"toolkit.*not found.*pip install -e '\.\[cuda\]'"),
])
def test_a_missing_driver_gpu_or_toolkit_is_named(problem_of, error, n_gpus, told):
    parts = dict(is_available=lambda: False, cuda_error=lambda: error, gpus=range(n_gpus))
    assert re.search(told, problem_of(**parts))


def test_an_old_gpu_is_named(problem_of):
    assert "compute capability 6.1 and CUDA 13 needs 7.5" in problem_of(**_driver((6, 1)))


def test_a_gpu_that_does_not_run_a_kernel_is_told(problem_of):
    def fail(_):
        raise OSError("bad PTX version")

    found = problem_of(**_driver(), to_device=fail)
    assert "a first kernel did not run (OSError: bad PTX version)" in found and "[cuda12]" in found


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "gpu_problem", lambda: "the GPU is on holiday; call it back")


def test_asked_for_without_a_gpu_it_says_so(no_gpu):
    with pytest.raises(kernels.GpuError, match="cuda backend cannot run: the GPU is on holiday"):
        models.build("one_conv", (1, 8, 8)).forward(np.zeros((1, 1, 8, 8), np.float32), backend="cuda")
    assert issubclass(kernels.GpuError, RuntimeError)
    assert kernels.backend("auto") is kernels.backend("cpu")


def test_the_command_line_says_so_too(no_gpu, capsys, tmp_path):
    assert main(["info"]) == 0
    assert "the cuda backend cannot run: the GPU is on holiday" in capsys.readouterr().out
    assert main(["compare", "--backend", "cuda", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rso-numba: error: the cuda backend cannot run") and error.count("\n") == 1
    assert main(["bench", "--backend", "cuda", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == error
    assert not (tmp_path / "out").exists()
