"""Several ranks decide as one process, to the last bit; and what ends one of them ends all."""

import csv
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks as script

from rso_numba import build, evaluators, mpi, rso
from rso_numba.__main__ import main
from rso_numba.evaluators.share import Share

MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
FOUND = {"mpi4py": importlib.util.find_spec("mpi4py"), "mpiexec": MPIEXEC}
MISSING = " and ".join(name for name, found in FOUND.items() if found is None)
needs_mpi = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} missing: pip install -e '.[mpi]' mpich")
TOP = Path(__file__).parents[1]
SECONDS = 300  # that nothing here takes, unless ranks wait for each other for ever
# what Open MPI wants, to be started by root and with more processes than cores; MPICH needs nothing
ALLOWED = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}


def start(n, *command, **environment):
    """Start Python n times by mpiexec; return the Popen of mpiexec."""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "1", "PYTHONPATH": str(TOP), **ALLOWED, **environment}
    return subprocess.Popen(
        [MPIEXEC, "-n", str(n), sys.executable, *map(str, command)], cwd=TOP, text=True,
        env={name: value for name, value in environment.items() if value is not None},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    """Return exit status, stdout and stderr of a process."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, out, err


def run(*arguments, **environment):
    return finish(start(*arguments, **environment))


# ---- the same decisions ----


@pytest.fixture(scope="module")
def alone():
    return script.searches(None)


@needs_mpi
@pytest.mark.parametrize("n", [2, 3])
def test_searches_of_several_ranks_are_those_of_one_process(n, alone, tmp_path):
    status, _, err = run(n, script.__file__, "search", tmp_path / "found.npz")
    assert status == 0, err
    with np.load(tmp_path / "found.npz") as found:
        assert set(found) == set(alone)
        for name, expected in alone.items():
            np.testing.assert_array_equal(found[name], expected, err_msg=f"{name} of {script.SEARCHES}")


@needs_mpi
def test_compare_writes_what_one_process_writes(tmp_path):
    arguments = ["compare", "--rounds", "1", "--epochs", "1", "--batch-size", "600", "--no-progress", "--out"]
    status, out, err = run(2, "-m", "rso_numba", *arguments, tmp_path / "2")
    assert status == 0 and err == ""
    assert out.count("| solver") == out.count("wrote ") == 1
    assert main([*arguments, str(tmp_path / "1")]) == 0
    rows = []
    for n in "12":
        with open(tmp_path / n / "rso.csv", newline="") as file:
            rows.append([row | {"seconds": None} for row in csv.DictReader(file)])
    assert rows[0] == rows[1] and len(rows[0]) == 2
    with np.load(tmp_path / "1" / "rso.npz") as one, np.load(tmp_path / "2" / "rso.npz") as two:
        for name in one:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@pytest.mark.parametrize("n_images", [1, 16, 17, 100, 1000])
@pytest.mark.parametrize("unit", [16, 256])
@pytest.mark.parametrize("n", [1, 2, 3, 70])
def test_shares_are_runs_of_units_and_make_up_the_mini_batch(n_images, unit, n):
    shares = [Share(n_images, SimpleNamespace(rank=rank, n_ranks=n), unit) for rank in range(n)]
    images = np.arange(n_images)
    for share in shares:
        assert 0 < share.n_own == len(images[share.own])
    own = [images[share.own] for rank, share in enumerate(shares) if share.sizes[rank]]
    np.testing.assert_array_equal(np.concatenate(own), images)
    assert all(first % unit == 0 for first, *_ in own)
    sizes = [-(-len(images) // unit) for images in own]
    assert max(sizes) - min(sizes) <= 1 or n > len(own)


def test_what_ranks_cannot_do_is_said(small):
    network, ranks = build("one_conv", small.image_shape, 10, rng=0), object()
    with pytest.raises(ValueError, match="backend is 'numpy'; expected 'cpu'"):
        evaluators.make_evaluator("delta", network, "numpy", ranks=ranks)
    ranks = SimpleNamespace(require_same=lambda things: None)
    with pytest.raises(ValueError, match="evaluator and ranks are both given"):
        rso.trials(network, small, 1, 10, evaluator=object(), ranks=ranks)


# ---- how they start ----


def test_a_process_that_was_not_started_by_mpiexec_is_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # importing it would fail
    for environment in {}, {"PMI_SIZE": "1"}, {"OMPI_COMM_WORLD_SIZE": "1"}:
        assert mpi.start(environment) is None


@pytest.mark.parametrize("name", mpi.SIZES)
def test_without_mpi4py_the_error_says_how_to_install_it(name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setenv(name, "4")
    assert main(["info"]) == 2
    err = capsys.readouterr().err
    assert "mpiexec has started 4 processes" in err and "pip install 'rso_numba[mpi]'" in err


@needs_mpi
def test_the_mpiexec_of_another_mpi_is_noticed():
    # one process, which is told that it is one of many
    status, _, err = run(1, "-m", "rso_numba", "info", **dict.fromkeys(mpi.SIZES, "7"))
    assert status != 0 and "mpiexec has started 7 processes, of which mpi4py sees 1" in err


@needs_mpi
def test_ranks_share_the_cores_of_a_machine():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    status, out, err = run(2, script.__file__, "threads", NUMBA_NUM_THREADS=None)
    assert status == 0, err
    assert out.split() == [f"threads={max(1, cores // 2)}"] * 2


@needs_mpi
def test_other_commands_are_left_to_rank_0():
    status, out, err = run(2, "-m", "rso_numba", "info")
    assert status == 0 and out.count("Numba threads") == 1 and err == ""


# ---- how they end ----


@needs_mpi
def test_ranks_with_other_random_numbers_are_refused(tmp_path):
    status, _, err = run(2, script.__file__, "differ", tmp_path)
    assert status == 0, err
    for rank in "01":
        assert (tmp_path / rank).read_text().startswith("rank 1 has not the rng of rank 0; expected the same")


@needs_mpi
@pytest.mark.parametrize("arguments, said", [
    (["--rounds", "0"], "rso-numba: error: rounds is 0"), (["--rounds", "x"], "invalid int value: 'x'"),
    (["--backend", "numpy"], "rso-numba: error: backend is 'numpy'; expected 'cpu'")])
def test_an_error_of_all_ranks_is_told_once(arguments, said, tmp_path):
    status, out, err = run(2, "-m", "rso_numba", "compare", *arguments, "--out", tmp_path / "out")
    assert status != 0 and err.count(said) == 1 and "Traceback" not in err
    assert not (tmp_path / "out").exists()


@needs_mpi
@pytest.mark.parametrize("how, said", [("raise", "rank 1: RuntimeError: this rank has failed"), ("kill", "")])
def test_what_ends_one_rank_ends_all(how, said):
    status, _, err = run(2, script.__file__, "fail", how)
    assert status != 0 and said in err


@needs_mpi
def test_ctrl_c_keeps_what_was_learnt(tmp_path):
    process = start(2, "-m", "rso_numba", "compare", "--rounds", "100000", "--epochs", "1", "--out", tmp_path)
    for line in process.stderr:  # bars end in \r, which counts as the end of a line
        if "RSO:" in line:
            break
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert status != 0 and "interrupted in round 1 of RSO" in err, (out, err)
    assert out.count("| solver") == 1 and (tmp_path / "rso.npz").exists()
