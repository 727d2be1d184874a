"""The history of a run and its CSV file."""

import csv

import pytest

from rso_numba import rso, sgd
from rso_numba.history import History
from rso_numba.models import build


def test_csv_holds_every_row(tmp_path, small):
    network = build("one_conv", (1, 8, 8), rng=0)
    history = rso.train(network, small, rounds=2, batch_size=20, rng=0, backend="numpy", unit="filter")
    history.to_csv(tmp_path / "new folder" / "rso.csv")
    with open(tmp_path / "new folder" / "rso.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows] == ["0", "1", "2"]
    assert {row["solver"] for row in rows} == {"rso"}
    assert float(rows[2]["test_loss"]) == history.rounds[2].test_loss
    assert rows[0]["acceptance_conv1"] == ""
    assert float(rows[1]["acceptance_conv1"]) == history.rounds[1].acceptance["conv1"]


def test_a_failed_write_leaves_the_former_file(tmp_path, small, monkeypatch):
    history = sgd.train(build("one_conv", (1, 8, 8), rng=0), small, epochs=1, rng=0, backend="numpy")
    path = tmp_path / "sgd.csv"
    history.to_csv(path)
    former = path.read_text()

    def broken(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(csv, "writer", broken)
    with pytest.raises(OSError, match="disk full"):
        history.to_csv(path)
    assert path.read_text() == former
    assert [p.name for p in tmp_path.iterdir()] == ["sgd.csv"]


def test_unknown_columns_are_named():
    assert repr(History("rso")) == "History('rso', empty)"
    with pytest.raises(KeyError, match="unknown column 'speed'; known columns: round, seconds"):
        History("rso")["speed"]
