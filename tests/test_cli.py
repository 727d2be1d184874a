"""The command line: what it prints and writes, how it fails, and what an interruption leaves."""

import csv
import functools
import io
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import rso_numba
from rso_numba import datasets, experiments, kernels, models, plots
from rso_numba.__main__ import main, parser
from rso_numba.evaluators import FullForward
from rso_numba.history import History

QUICK = ["compare", "--backend", "numpy", "--batch-size", "8", "--sgd-batch-size", "64", "--no-progress"]
N_WEIGHTS = 210  # of one_conv on 4 x 4 images
FILES = {"compare.png", "rso.csv", "sgd.csv", "rso.npz", "sgd.npz"}


@functools.cache
def small_digits():
    digits = datasets.load_digits().subset(300, 100, rng=0)
    train, test = (images[:, :, ::2, ::2] for images in (digits.train_images, digits.test_images))
    return datasets.Dataset(train, digits.train_labels, test, digits.test_labels, n_classes=10, name="digits")


@pytest.fixture(scope="module", autouse=True)
def quick_data():
    """Let the command line find small digits, and every other data set where it is."""
    load = datasets.load

    def small(name, data_home):
        return small_digits() if name == "digits" else load(name, data_home)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", small)
        yield


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def interrupt_after(monkeypatch, method, n_calls):
    """Let History.add_trial or History.add_step raise KeyboardInterrupt at the end of its n-th call."""
    original, calls = getattr(History, method), []

    def interrupted(*arguments):
        original(*arguments)
        calls.append(arguments)
        if len(calls) == n_calls:
            raise KeyboardInterrupt

    monkeypatch.setattr(History, method, interrupted)


# ---- compare ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick_data):
    """Folder and output of one small comparison."""
    out = tmp_path_factory.mktemp("compare") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(words)))
        assert main([*QUICK, "--rounds", "1", "--epochs", "2", "--seed", "3", "--out", str(out)]) == 0
    return out, printed


def test_compare_writes_five_files(finished):
    out, printed = finished
    assert {path.name for path in out.iterdir()} == FILES
    assert printed[-1].startswith("wrote ") and all(str(out / name) in printed[-1] for name in FILES)
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_compare_counts_what_was_done(finished):
    out, _ = finished
    rso, sgd = rows_of(out / "rso.csv"), rows_of(out / "sgd.csv")
    assert [row["round"] for row in rso] == ["0", "1"] and [row["round"] for row in sgd] == ["0", "1", "2"]
    assert int(rso[-1]["weights_visited"]) == N_WEIGHTS
    assert int(rso[-1]["images_forwarded"]) == 3 * 8 * N_WEIGHTS
    assert int(sgd[-1]["images_forwarded"]) == 2 * 300
    assert float(rso[0]["seconds"]) == 0 < float(rso[1]["seconds"])
    assert 0 < float(rso[-1]["acceptance_conv1"]) <= 1


def test_compare_gives_both_the_same_start(finished):
    rso, sgd = (rows_of(finished[0] / f"{solver}.csv")[0] for solver in ("rso", "sgd"))
    assert rso["test_loss"] == sgd["test_loss"] and rso["train_loss"] == sgd["train_loss"]


@pytest.mark.parametrize("solver", ["rso", "sgd"])
def test_compare_saves_the_network_of_the_last_row(finished, solver):
    out, _ = finished
    data, last = small_digits(), rows_of(out / f"{solver}.csv")[-1]
    network = models.Network.load(out / f"{solver}.npz")
    loss, accuracy = network.evaluate(data.test_images, data.test_labels, backend="numpy")
    assert loss == float(last["test_loss"]) and accuracy == float(last["test_accuracy"])


def test_compare_prints_a_table(finished):
    out, printed = finished
    lines = printed[0].splitlines()
    assert len({len(line) for line in lines}) == 1  # aligned
    header, _, rso, sgd = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    last = rows_of(out / "rso.csv")[-1]
    expected = {"solver": "RSO", "rounds or epochs": "1",
                "test accuracy": f"{float(last['test_accuracy']):.4f}",
                "train loss": f"{float(last['train_loss']):.4f}", "images forwarded": "5,040",
                "weight visits": "210", "accepted %": f"{100 * int(last['accepted']) / N_WEIGHTS:.1f}"}
    table = dict(zip(header, rso, strict=True))
    assert {name: table[name] for name in expected} == expected
    assert sgd[:2] == ["SGD", "2"] and sgd[-1] == "-"


def test_compare_uses_its_seed(finished, monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "save", lambda *_: None)  # drawing takes longest
    arguments = [*QUICK, "--rounds", "1", "--epochs", "1", "--out", str(tmp_path)]
    assert main([*arguments, "--seed", "3"]) == 0
    again, former = rows_of(tmp_path / "rso.csv"), rows_of(finished[0] / "rso.csv")
    assert [row["test_loss"] for row in again] == [row["test_loss"] for row in former]
    assert main([*arguments, "--seed", "4"]) == 0
    assert rows_of(tmp_path / "rso.csv")[0]["test_loss"] != former[0]["test_loss"]


# ---- Ctrl-C ----


def test_interrupted_search_keeps_what_was_learnt(monkeypatch, capsys, tmp_path):
    interrupt_after(monkeypatch, "add_trial", N_WEIGHTS + 10)
    assert main([*QUICK, "--rounds", "3", "--epochs", "1", "--out", str(tmp_path)]) == 130
    out, err = capsys.readouterr()
    assert "interrupted in round 2 of RSO" in err and "the first 10 weight visits of that round" in err
    assert out.startswith("| solver") and "rso.npz" in out
    assert {path.name for path in tmp_path.iterdir()} == FILES
    rows = rows_of(tmp_path / "rso.csv")
    assert [row["round"] for row in rows] == ["0", "1"]
    # the saved network is ahead of the last row by those visits
    data, network = small_digits(), models.Network.load(tmp_path / "rso.npz")
    loss, _ = network.evaluate(data.test_images, data.test_labels, backend="numpy")
    assert loss != float(rows[-1]["test_loss"])
    assert loss == pytest.approx(float(rows[-1]["test_loss"]), rel=0.2)


def test_interrupted_sgd_writes_no_search(monkeypatch, capsys, tmp_path):
    interrupt_after(monkeypatch, "add_step", 3)
    assert main([*QUICK, "--rounds", "1", "--out", str(tmp_path)]) == 130
    err = capsys.readouterr().err
    assert "interrupted in epoch 1 of SGD; the saved network includes the first 3 steps of that epoch" in err
    assert {path.name for path in tmp_path.iterdir()} == {"compare.png", "sgd.csv", "sgd.npz"}


@pytest.mark.parametrize("method, n_calls, place", [
    ("add_step", 7, "epoch 2 of SGD"),
    ("add_trial", 20, "round 1 of RSO"),
    ("add_trial", 400, "round 2 of RSO"),
])
def test_interrupted_comparison_goes_on(finished, monkeypatch, capsys, tmp_path, method, n_calls, place):
    arguments = [*QUICK, "--rounds", "2", "--epochs", "2", "--seed", "3", "--out"]
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    original, calls, folder = getattr(History, method), [], tmp_path / "parts"

    def interrupting(*details):
        original(*details)
        calls.append(details)
        if len(calls) == n_calls:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(History, method, interrupting)
        assert main([*arguments, str(folder), "--checkpoint", "0"]) == 130
    err = capsys.readouterr().err
    assert f"interrupted in {place}" in err and "to go on, give the same command with --resume" in err
    assert main([*arguments, str(folder), "--checkpoint"]) == 2
    assert "of a training that was interrupted" in capsys.readouterr().err
    assert main([*arguments, str(folder), "--model", "two_conv", "--resume"]) == 2
    assert "is the checkpoint of another training: network was" in capsys.readouterr().err
    assert main([*arguments, str(folder), "--resume"]) == 0
    for solver in ("rso", "sgd"):
        assert (folder / f"{solver}.npz").read_bytes() == (tmp_path / "whole" / f"{solver}.npz").read_bytes()
        rows, others = (rows_of(path / f"{solver}.csv") for path in (folder, tmp_path / "whole"))
        assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in others]


def test_interrupted_before_the_training_writes_nothing(monkeypatch, capsys, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "example_trial", interrupted)
    assert main([*QUICK, "--out", str(tmp_path)]) == 130
    assert "nothing more was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_failing_gpu_leaves_the_network_so_far(monkeypatch, capsys, tmp_path):
    def fail(*_):
        raise kernels.GpuError("the memory of the GPU is full")

    original = History.add_trial
    monkeypatch.setattr(History, "add_trial", lambda history, *arguments: (
        fail() if history.weights_visited == N_WEIGHTS + 5 else original(history, *arguments)))
    assert main([*QUICK, "--rounds", "2", "--epochs", "1", "--out", str(tmp_path)]) == 2
    assert "interrupted in round 2 of RSO; the saved network includes the first 5" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == FILES


# ---- errors ----


def test_a_solver_that_diverges_leaves_the_other_its_result(finished, capsys, tmp_path):
    arguments = ["--rounds", "1", "--epochs", "2", "--seed", "3", "--learning-rate", "1e20"]
    assert main([*QUICK, *arguments, "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("rso-numba: error: SGD, epoch 1, step ")
    assert "the loss is not finite" in err and "smaller learning_rate" in err
    assert out.startswith("| solver") and {path.name for path in tmp_path.iterdir()} == FILES
    assert [row["round"] for row in rows_of(tmp_path / "sgd.csv")] == ["0"]
    assert np.isfinite(models.Network.load(tmp_path / "sgd.npz").weights).all()
    rows, expected = rows_of(tmp_path / "rso.csv"), rows_of(finished[0] / "rso.csv")
    assert [row["test_loss"] for row in rows] == [row["test_loss"] for row in expected]


@pytest.mark.parametrize("arguments, named", [
    (["--data", "letters"], "'letters'"),
    (["--model", "alexnet"], "'alexnet'"),
    (["--preset", "mine"], "'mine'"),
    (["--backend", "abacus"], "'abacus'"),
    (["--rounds", "0"], "rounds is 0"),
    (["--batch-size", "5000"], "batch_size is 5000"),
    (["--epochs", "-1"], "epochs is -1"),
    (["--sgd-batch-size", "0"], "sgd_batch_size is 0"),
    (["--learning-rate", "-0.5"], "learning_rate is -0.5"),
    (["--momentum", "1"], "momentum is 1.0"),
    (["--seed", "-2"], "seed is -2"),
    (["--threads", "1000"], "--threads is 1000"),
])
def test_errors_are_one_line_that_names_the_value(arguments, named, capsys, tmp_path):
    assert main([*QUICK, "--out", str(tmp_path / "out"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("rso-numba: error: ") and named in err
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("command", ["bench", "compare"])
def test_what_is_not_finite_is_one_line(command, monkeypatch, capsys, tmp_path):
    def load(*_):
        raise FloatingPointError("conv1.weight holds\nNaN")

    monkeypatch.setattr(datasets, "load", load)
    assert main([command, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "rso-numba: error: conv1.weight holds NaN\n"


def test_a_missing_data_set_is_one_line(monkeypatch, capsys):
    def missing(*_):
        raise FileNotFoundError("put the files\n  a\ninto\n  b")

    monkeypatch.setattr(datasets, "load", missing)
    assert main([*QUICK, "--data", "mnist"]) == 2
    assert capsys.readouterr().err == "rso-numba: error: put the files a into b\n"


def test_a_folder_that_cannot_be_made_fails_before_the_training(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(experiments, "example_trial", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    assert main([*QUICK, "--out", str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is a folder of Linux where nobody can write")
def test_a_folder_that_cannot_be_written_to_fails_before_the_training(monkeypatch, capsys):
    monkeypatch.setattr(experiments, "example_trial", lambda *_: pytest.fail("trained"))
    assert main([*QUICK, "--out", "/proc"]) == 2
    assert "/proc" in capsys.readouterr().err


def test_threads_that_numba_was_not_given(monkeypatch, capsys):
    import numba

    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 1)
    monkeypatch.setattr(numba.config, "NUMBA_DEFAULT_NUM_THREADS", 8)
    assert main([*QUICK, "--threads", "2"]) == 2
    assert "expected 1 to 1: the environment variable NUMBA_NUM_THREADS allows" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compare", "bench"])
def test_out_may_begin_with_the_home_folder(command, monkeypatch, tmp_path):
    for variable in ("HOME", "USERPROFILE"):  # the second on Windows
        monkeypatch.setenv(variable, str(tmp_path))
    assert parser().parse_args([command, "--out=~/x"]).out == os.path.join(str(tmp_path), "x")


# ---- what can neither be printed nor drawn ----


class Broken(io.StringIO):
    """A stream that writes nothing."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


def quick_compare(monkeypatch, out):
    monkeypatch.setattr(plots, "save", lambda figure, path: path.write_text("drawn"))  # drawing takes longest
    arguments = [word for word in QUICK if word != "--no-progress"]
    return main([*arguments, "--rounds", "1", "--epochs", "1", "--out", str(out)])


@pytest.mark.parametrize("stream, error, status, said", [
    ("stdout", BrokenPipeError(32, "Broken pipe"), 0, None),
    ("stdout", OSError(28, "No space left on device"), 1, "warning: the output could not be printed"),
    ("stderr", BrokenPipeError(32, "Broken pipe"), 0, None),
    ("stderr", ValueError("I/O operation on closed file"), 0, None),
    ("stdout", None, 0, None),
    ("stderr", None, 0, None),
], ids=repr)
def test_what_cannot_be_printed_loses_nothing_else(monkeypatch, capsys, tmp_path, stream, error, status,
                                                   said):
    monkeypatch.setattr(sys, stream, error and Broken(error))
    assert quick_compare(monkeypatch, tmp_path) == status
    out, err = capsys.readouterr()
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert said is None or said in err
    assert "Broken" not in err and (stream == "stdout" or out.startswith("| solver"))


def test_a_path_that_the_terminal_cannot_show_is_escaped(monkeypatch, tmp_path):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    assert quick_compare(monkeypatch, tmp_path / "o ü") == 0
    assert rb"o \xfc" in shown.getvalue().splitlines()[-1]


def test_a_picture_that_cannot_be_drawn_loses_nothing_else(monkeypatch, capsys, tmp_path):
    def fail(*_):
        assert capsys.readouterr().out.startswith("| solver")  # printed before
        assert {path.name for path in tmp_path.iterdir()} == FILES
        raise RuntimeError("latex could\nnot be found")

    (tmp_path / "compare.png").write_text("former")
    monkeypatch.setattr(plots, "save", fail)
    assert main([*QUICK, "--rounds", "1", "--epochs", "1", "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert err == (f"rso-numba: warning: {tmp_path / 'compare.png'} could not be drawn (latex could not be "
                   "found); the file there is of a former run\n")
    assert out.startswith("wrote ") and "rso.npz" in out and "compare.png" not in out


def test_a_disk_that_is_full_loses_no_table(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(models.Network, "save", Broken(OSError(28, "No space left on device")).write)
    assert main([*QUICK, "--rounds", "1", "--epochs", "1", "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("| solver") and "No space left" in err


def test_a_reader_who_leaves_early_is_no_error():
    with subprocess.Popen([sys.executable, "-m", "rso_numba", "info"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_no_window_is_needed():
    run = subprocess.run([sys.executable, "-m", "rso_numba", "compare", "--rounds", "0"],
                         env=os.environ | {"MPLBACKEND": "absent"}, capture_output=True, text=True)
    assert run.stderr == "rso-numba: error: rounds is 0; expected a positive whole number\n"


# ---- info and help ----


def test_info_prints_versions_and_folders(monkeypatch, capsys, tmp_path):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").write_text("")
    monkeypatch.setenv("RSO_NUMBA_DATA", str(tmp_path))
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    lines = {line[:16].strip(): line[16:] for line in out.splitlines()}
    assert lines["numpy"] == np.__version__ and lines["rso_numba"] == rso_numba.__version__
    assert {"rso_numba", "python", "numba", "llvmlite", "matplotlib", "scikit-learn"} <= set(lines)
    assert int(lines["Numba threads"]) >= 1
    assert lines["threading layer"] in ("omp", "tbb", "workqueue")
    works, problem = lines["CUDA"].startswith("the cuda backend works: "), kernels.gpu_problem()
    assert works if problem is None else lines["CUDA"] == f"the cuda backend cannot run: {problem}"
    assert f"{tmp_path / 'mnist'} has 1 of the 4 files of MNIST\n" in out


def test_help_is_quick_and_names_every_option():
    run = [sys.executable, "-m", "rso_numba"]
    shown = subprocess.run([*run, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(f"    {command} " in shown for command in ("info", "compare", "table", "bench"))
    code = ("import sys; from rso_numba.__main__ import parser; parser().format_help(); "
            "print([name for name in ('numba', 'matplotlib', 'sklearn') if name in sys.modules])")
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"
    shown = subprocess.run([*run, "compare", "--help"], capture_output=True, text=True, check=True).stdout
    table = subprocess.run([*run, "table", "--help"], capture_output=True, text=True, check=True).stdout
    for option in ("seeds", "quick", "rounds", "only", "data-home", "backend", "threads", "memory", "out",
                   "no-progress"):
        assert f"--{option} " in table
    for option in ("data", "data-home", "model", "preset", "rounds", "batch-size", "epochs", "sgd-batch-size",
                   "learning-rate", "momentum", "seed", "backend", "threads", "out", "no-progress"):
        assert f"--{option} " in shown


# ---- the picture of one trial ----


def test_scanned_curve_goes_through_the_losses_of_the_trial():
    data = small_digits()
    network = models.build("one_conv", data.image_shape, rng=0)
    values, losses, trial = experiments.example_trial(network, data, 64, backend="numpy")
    assert len(values) == 41 and trial.accepted and trial.layer == "conv1"
    assert np.array_equal(network.weights, models.build("one_conv", data.image_shape, rng=0).weights)
    up = 10 if trial.delta > 0 else -10  # from w - 2 |Delta| to w + 2 |Delta| in steps of |Delta| / 10
    np.testing.assert_allclose(losses[[20, 20 + up, 20 - up]], trial.losses, rtol=1e-5)


def test_scan_weight_leaves_the_network_alone():
    data = small_digits()
    network = models.build("original", data.image_shape, rng=0)
    before = {name: array.copy() for name, array in network.state().items()}
    images, labels = data.train_images[:50], data.train_labels[:50]
    parameter = network.parameters()[0]
    values = [-1.0, 0.0, 1.0]
    losses = experiments.scan_weight(network, parameter, (0, 0, 1, 1), values, images, labels, "numpy")
    assert all(np.array_equal(before[name], array) for name, array in network.state().items())
    evaluator = FullForward(network, "numpy")
    evaluator.set_batch(images, labels)
    parameter.value[0, 0, 1, 1] = -1.0
    assert evaluator.losses(parameter, (0, 0, 1, 1), [parameter.value[0, 0, 1, 1]])[0] == losses[0]
