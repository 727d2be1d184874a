"""A disk that is full: the error says where, the former file stays, and nothing half-written is left."""

import argparse
import builtins
import errno
import io
import os
import subprocess
import sys

import pytest

from rso_numba import bench, plots, results
from rso_numba.__main__ import _write_benchmark
from rso_numba.files import written_beside
from rso_numba.history import History, Round
from rso_numba.models import Network, build
from rso_numba.sweeps import COLUMNS, _add


def history():
    history = History("rso")
    history.rounds = [Round(i, 1.0, 2, 3, 4, 0.5, 0.5, 0.5, 0.5, {"conv1": 0.5}) for i in range(300)]
    return history


def write_benchmark(path):
    rows = [bench.Row("one_conv", "delta", 1e-3, "s/weight", "all", detail={"seconds": [1e-3] * 2000})]
    _write_benchmark(argparse.Namespace(out=str(path), backend="cpu", seed=0), None, 1, rows)


def add_rows(path):
    _add(path, [dict.fromkeys(COLUMNS, i) for i in range(100)])


# all that writes files
WRITERS = {
    "network.npz": lambda path: build("one_conv", (1, 8, 8), rng=0).save(path),
    "history.csv": lambda path: history().to_csv(path),
    "figure.png": lambda path: plots.save(plots.curves(history()), path),
    "bench.json": write_benchmark,
    "sweep.csv": add_rows,
    "results.csv": lambda path: results.add(path, dict.fromkeys(results.COLUMNS, "x" * 1000)),
}
FORMER = {"sweep.csv": ",".join(COLUMNS).encode() + b"\n",  # for these files are read first
          "results.csv": ",".join(results.COLUMNS).encode() + b"\n"}


class SmallDisk(io.FileIO):
    """A file on a disk that has room for `room` bytes more."""

    room = 0

    def write(self, content):
        content = memoryview(content).cast("B")
        if not SmallDisk.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        n = super().write(content[: SmallDisk.room])
        SmallDisk.room -= n
        return n


def open_on_small_disk(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None):
    raw = SmallDisk(file, mode.replace("b", ""))
    kind = io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter
    buffered = kind(raw)
    return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)


def check_refusal(write, path):
    """Check that `write` fails as it should: with what names the path, and with the former file intact."""
    former = FORMER.get(path.name, b"former")
    path.write_bytes(former)
    with pytest.raises(OSError, match="make room there, or name another place") as raised:
        write(path)
    assert f"{path} could not be written ({os.strerror(errno.ENOSPC)})" in str(raised.value)
    assert path.read_bytes() == former
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_at_any_write(name, tmp_path, monkeypatch):
    write, path = WRITERS[name], tmp_path / name
    write(path)
    size = path.stat().st_size
    for room in {0, 1, size // 3, size - size // 5, size - 30, size - 1}:
        with monkeypatch.context() as patch:
            for module in (builtins, io):
                patch.setattr(module, "open", open_on_small_disk)
            SmallDisk.room = len(FORMER.get(name, b"former")) + room
            check_refusal(write, path)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_says_later_that_it_is_full(name, step, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, fail)
    check_refusal(WRITERS[name], tmp_path / name)


def test_what_is_written_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    steps = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(number):
        steps.append(os.fstat(number).st_size)
        real_fsync(number)

    def replace(source, target):
        steps.append(target.name)
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with written_beside(tmp_path / "a.txt") as beside:
        beside.write_text("whole")
    assert steps == [5, "a.txt"]


# saves a network under a name that a smaller one has, in a process that may write files of 8 kB only
SAVE = """
import resource, sys
from rso_numba.models import build

build("one_conv", (1, 4, 4), rng=0).save(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
build("one_conv", (1, 28, 28), rng=0).save(sys.argv[1])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no files")
def test_a_file_that_may_not_be_so_large(tmp_path):
    path = tmp_path / "network.npz"
    shown = subprocess.run([sys.executable, "-c", SAVE, path], capture_output=True, text=True, timeout=60)
    assert shown.stderr.splitlines()[-1] == (
        f"OSError: [Errno {errno.EFBIG}] {path} could not be written ({os.strerror(errno.EFBIG)}); make room "
        "there, or name another place. A former file of this name stays as it was")
    assert Network.load(path).image_shape == (1, 4, 4)
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def full_disk(tmp_path):
    """A folder on a real disk of 8 kB, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", folder]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this process may not mount a disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_is_really_full(name, full_disk):
    check_refusal(WRITERS[name], full_disk / name)
