"""Sweeps: the same rows wherever they are computed, and none of them twice."""

import csv
import subprocess
import sys
import time

import joblib
import numpy as np
import pytest
from distributed import Client, LocalCluster

from rso_numba import build, datasets, presets, rso, sgd, sweeps
from rso_numba.experiments import read_sweep, sweep

GRID = [
    {"rounds": [1], "batch_size": [20], "seed": [0, 1], "preset": ["paper", "notebook"]},
    {"solver": ["sgd"], "rounds": [2], "seed": np.arange(2), "learning_rate": [0.1]},
]
# takes milliseconds: a round is one trial
QUICK = {"unit": ["network"], "backend": ["numpy"], "rounds": [3], "batch_size": [20], "seed": [0, 1, 2, 3]}


def without_seconds(rows):
    return sorted(([value for name, value in row.items() if name != "seconds"] for row in rows), key=str)


@pytest.fixture(scope="module")
def rows_here(small, tmp_path_factory):
    """The rows of GRID, computed in this process."""
    return sweep(GRID, small, tmp_path_factory.mktemp("sweep") / "here.csv")


@pytest.fixture
def calls(monkeypatch):
    """The seeds of the configurations that are trained."""
    seeds, train = [], sweeps._train

    def counted(configuration, data):
        rows = train(configuration, data)
        seeds.append(configuration["seed"])
        return rows

    monkeypatch.setattr(sweeps, "_train", counted)
    return seeds


# ---- the rows ----


def test_a_row_has_the_figures_of_the_training(rows_here, small):
    assert len(rows_here) == 4 * 2 + 2 * 3
    for solver, preset, seed in (("rso", "notebook", 1), ("sgd", "paper", 0)):
        network = build("one_conv", (1, 8, 8), rng=seed, preset=preset)
        rng = np.random.default_rng([seed, 1])
        if solver == "rso":
            history = rso.train(network, small, 1, 20, preset, rng=rng)
        else:
            history = sgd.train(network, small, 2, learning_rate=0.1, rng=rng)
        rows = [row for row in rows_here
                if (row["solver"], row["preset"], row["seed"]) == (solver, preset, seed)]
        for name in sweeps.FIGURES:
            if name != "seconds":
                assert [row[name] for row in rows] == history[name]
        assert {row["problem"] for row in rows} == {None}
        assert {row["learning_rate"] for row in rows} == {None if solver == "rso" else 0.1}
        assert {row["batch_size"] for row in rows} == {20 if solver == "rso" else 32}


def test_settings_of_a_preset_reach_the_network_and_the_search(small, tmp_path):
    grid = {"scaling": ["none"], "init": ["glorot"], "sigma": [0.25], "trained": [["bias"]], "rounds": [1],
            "batch_size": [20]}
    rows = sweep(grid, small, tmp_path / "a.csv")
    settings = presets.resolve("paper", scaling="none", init="glorot", sigma=0.25, trained=["bias"])
    network = build("one_conv", (1, 8, 8), rng=0, preset=settings)
    history = rso.train(network, small, 1, 20, settings, rng=np.random.default_rng([0, 1]))
    assert [row["test_loss"] for row in rows] == history["test_loss"]
    assert rows[1]["sigma"] == 0.25 and rows[1]["trained"] == "['bias']" and rows[1]["weights_visited"] == 14


def test_processes_compute_the_same_rows(rows_here, small, tmp_path):
    with joblib.parallel_config(backend="loky", n_jobs=2):
        rows = sweep(GRID, small, tmp_path / "a.csv")
    assert without_seconds(rows) == without_seconds(rows_here)


def test_threads_that_share_a_process_take_turns(small, tmp_path, monkeypatch):
    at_once, most, train = [], [], rso.train

    def counted(*arguments, **named):
        at_once.append(None)
        most.append(len(at_once))
        time.sleep(0.01)
        train(*arguments, **named)
        at_once.pop()

    monkeypatch.setattr(rso, "train", counted)
    with joblib.parallel_config(backend="threading", n_jobs=3):
        assert len(sweep(QUICK, small, tmp_path / "a.csv")) == 16
    assert most == [1] * 4


def test_a_dask_cluster_computes_the_same_rows_and_gets_data_once(rows_here, small, tmp_path, monkeypatch):
    sent = []

    def state(data):
        sent.append(data)
        return vars(data)

    monkeypatch.setattr(datasets.Dataset, "__getstate__", state, raising=False)
    with (LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None,
                       env={"NUMBA_NUM_THREADS": "1"}) as cluster,
          Client(cluster), joblib.parallel_config(backend="dask")):
        rows = sweep(GRID, small, tmp_path / "a.csv")
    assert without_seconds(rows) == without_seconds(rows_here)
    assert len(sent) == 1


def n_threads():
    import numba

    return numba.get_num_threads()


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    with joblib.parallel_config(backend="loky", n_jobs=2):
        shares = joblib.Parallel()(joblib.delayed(n_threads)() for _ in range(2))
    assert shares == [max(1, joblib.cpu_count() // 2)] * 2


def test_a_training_that_diverges_ends_in_a_row_that_says_so(small, tmp_path):
    grid = [{"solver": ["sgd"], "rounds": [2], "learning_rate": [1e30, 0.1]},
            {"rounds": [1], "sigma": [1e38, 0.1], "batch_size": [20]}]
    rows = sweep(grid, small, tmp_path / "a.csv")
    problems = [row for row in rows if row["problem"]]
    assert [(row["solver"], row["round"], row["test_loss"]) for row in problems] == [
        ("sgd", 1, None), ("rso", 1, None)]
    assert problems[0]["problem"].startswith("SGD, epoch 1, step") and "sigma" in problems[1]["problem"]
    assert len(rows) == 2 + 3 + 2 + 2
    assert sweep(grid, small, tmp_path / "a.csv") == rows  # they are not tried again


# ---- what is refused ----


@pytest.mark.parametrize("grid, named", [
    ({"solver": ["adam"]}, "unknown solver 'adam'; known solvers: rso, sgd"),
    ({"model": ["no_conv"]}, "unknown model 'no_conv'"),
    ({"preset": ["mine"]}, "unknown preset 'mine'"),
    ({"preset": [presets.Preset()]}, "preset is Preset.*; expected a name"),
    ({"epochs": [3]}, "solver 'rso' takes no epochs; expected some of solver, model"),
    ({"solver": ["rso", "sgd"], "learning_rate": [0.1]}, "solver 'rso' takes no learning_rate.* two grids"),
    ({"rounds": [0]}, "rounds is 0"), ({"batch_size": [71]}, "batch_size is 71, larger than"),
    ({"batch_size": [20.0]}, "batch_size is 20.0"), ({"seed": [-1]}, "seed is -1"),
    ({"backend": ["auto"]}, "backend is 'auto'; expected one of cpu, numpy, cuda"),
    ({"sigma": [-1.0]}, "sigma is -1.0"), ({"hold": ["filter"], "unit": ["layer"]}, "hold is 'filter'"),
    ({"solver": ["sgd"], "momentum": [1.5]}, "momentum is 1.5"),
    ({"seed": 0}, "seed"), ({"seed": []}, "seed"), ("seed", "grid"),
])
def test_one_bad_configuration_stops_all_before_anything_runs(small, tmp_path, calls, grid, named):
    if isinstance(grid, dict):
        grid = [QUICK, {"batch_size": [20]} | grid]
    with pytest.raises((ValueError, TypeError), match=named):
        sweep(grid, small, tmp_path / "a.csv")
    assert calls == [] and not (tmp_path / "a.csv").exists()


@pytest.mark.parametrize("content", [
    b"a,b\n1,2\n", b"no line", b"\n", b"\x89PNG\r\n\x1a\n\0\0", "é".encode("latin-1") + b"\n",
    ",".join(sweeps.COLUMNS).encode() + b"\n1,2\n", b"round," + ",".join(sweeps.COLUMNS).encode() + b"\n",
])
def test_a_file_of_something_else_stays_as_it_is(small, tmp_path, calls, content):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    for use in (lambda: sweep(QUICK, small, path), lambda: read_sweep(path)):
        with pytest.raises(ValueError, match="a.csv is no file of a sweep .*; mend it, or name another"):
            use()
    assert path.read_bytes() == content and calls == []


def test_a_file_that_does_not_exist_is_not_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="typo.csv"):
        read_sweep(tmp_path / "typo.csv")


# ---- going on ----


def test_what_is_in_the_file_is_not_computed_again(small, tmp_path, calls):
    path = tmp_path / "new" / "a.csv"
    rows = sweep(QUICK | {"seed": [2, 0]}, small, path)
    assert calls == [2, 0] and len(rows) == 8
    assert sweep(QUICK | {"seed": [0, 1, 2, 1]}, small, path)[:8] == rows
    assert calls == [2, 0, 1]
    assert sweep(QUICK | {"seed": [0]}, small, path) == rows[4:]
    assert sweep(QUICK | {"seed": [0], "model": ["one_conv"], "solver": ["rso"]}, small, path) == rows[4:]
    assert calls == [2, 0, 1] and len(read_sweep(path)) == 12


def test_one_file_collects_several_grids_but_no_data_set_is_taken_for_another(small, digits, tmp_path, calls):
    path = tmp_path / "a.csv"
    first = sweep(QUICK | {"seed": [0]}, small, path)
    assert "step" not in first[0]
    others = sweep(QUICK | {"seed": [0], "step": ["fixed", "uniform"]}, small, path)
    assert calls == [0] * 3 and {row["step"] for row in others} == {"fixed", "uniform"}
    assert sweep(QUICK | {"seed": [0]}, small, path) == [row | {"step": None} for row in first]
    assert calls == [0] * 3
    sweep(QUICK | {"seed": [0]}, digits.subset(70, 30, rng=1), path)  # of the same name
    assert calls == [0] * 4


def test_a_file_that_was_cut_anywhere_is_completed(small, tmp_path, calls):
    path = tmp_path / "a.csv"
    rows = sweep(QUICK, small, path)
    content = path.read_bytes()
    header = content.index(b"\n") + 1
    for end in range(header, len(content), 83):
        path.write_bytes(content[:end])
        n_whole = (content[:end].count(b"\n") - 1) // 4  # configurations
        assert read_sweep(path) == rows[: 4 * n_whole]
        del calls[:]
        assert without_seconds(sweep(QUICK, small, path)) == without_seconds(rows)
        assert calls == [0, 1, 2, 3][n_whole:]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError("No space left")])
@pytest.mark.parametrize("place", ["training", "file"])
def test_what_ends_a_sweep_keeps_what_was_computed(small, tmp_path, calls, monkeypatch, place, error):
    def fail_third(function):
        def failing(*arguments):
            if len(calls) == 2 + (place == "file"):
                raise error
            return function(*arguments)
        return failing

    path = tmp_path / "a.csv"
    name = {"training": "_train", "file": "_add"}[place]
    with monkeypatch.context() as patch:
        patch.setattr(sweeps, name, fail_third(getattr(sweeps, name)))
        with pytest.raises(error if isinstance(error, type) else OSError):
            sweep(QUICK, small, path)
    assert [row["seed"] for row in read_sweep(path)] == [0] * 4 + [1] * 4
    del calls[:]
    assert len(sweep(QUICK, small, path)) == 16 and calls == [2, 3]


def fail(configuration, data):
    raise MemoryError("in a worker")


def test_a_worker_that_fails_ends_the_sweep(small, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "_train", fail)
    with joblib.parallel_config(backend="loky", n_jobs=2), pytest.raises(MemoryError, match="in a worker"):
        sweep(QUICK, small, tmp_path / "a.csv")


KILLED = """
import sys
from rso_numba import datasets, experiments

data = datasets.load_digits().subset(70, 30, rng=0)
grid = {"unit": ["filter"], "backend": ["numpy"], "rounds": [3], "batch_size": [20], "seed": list(range(30))}
experiments.sweep(grid, data, sys.argv[1])
"""


def test_a_process_that_is_killed_leaves_whole_configurations(tmp_path):
    path, most = tmp_path / "a.csv", 0
    for wanted in (1, 5, 9):  # configurations in the file
        with subprocess.Popen([sys.executable, "-W", "ignore", "-c", KILLED, path]) as process:
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline and process.poll() is None:
                if path.exists() and path.read_bytes().count(b"\n") > 4 * wanted:
                    break
                time.sleep(0.001)
            process.kill()
        content = path.read_bytes()
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        assert content.endswith(b"\r\n") and len(rows) % 4 == 0 and len(rows) >= 4 * wanted
        assert [row["round"] for row in rows] == ["0", "1", "2", "3"] * (len(rows) // 4)
        assert all(None not in row and None not in row.values() for row in rows)
        assert len({row["seed"] for row in rows}) == len(rows) // 4 > most
        most = len(rows) // 4
    assert process.returncode != 0  # it was not at its end
