"""Every trial of a search in a file, written as the search goes on; the same search made again from it."""

import csv
from pathlib import Path

import numpy as np

COLUMNS = ("round", "layer", "parameter", "index", "delta", "loss_keep", "loss_plus", "loss_minus", "choice",
           "before", "after")


class TrialLog:
    """A CSV file with a row a trial; floats are written so that reading them gives the same bits.

    Parameters
    ----------
    path : str, path or None
        None: nothing is written.
    n_before : int
        Rows of the file that are kept, of trials before an interruption. Those behind them are made again.

    Raises
    ------
    ValueError
        If the file has fewer rows; or, with the first trial, if what it changes is no single weight.
    """

    def __init__(self, path, n_before=0):
        self.path, self.n_before, self.file = path and Path(path), n_before, None

    def __enter__(self):
        if self.path is None:
            return self
        if self.n_before:
            self._cut()
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(",".join(COLUMNS) + "\n")
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115  (a line is written when it ends)
        return self

    def __exit__(self, *error):
        if self.file is not None:
            self.file.close()

    def _cut(self):
        with open(self.path, "r+b") as file:
            n_lines = 0
            while n_lines <= self.n_before and file.readline():
                n_lines += 1
            if n_lines <= self.n_before:
                raise ValueError(f"{self.path} has {max(n_lines - 1, 0)} trials, and the search has made "
                                 f"{self.n_before}; give the log that it wrote")
            file.truncate(file.tell())

    def write(self, trial):
        """Write a trial."""
        if self.file is None:
            return
        if isinstance(trial.delta, np.ndarray):
            raise ValueError("a trial changes many weights at once, which a trial_log does not hold; use "
                             "unit='weight' with it")
        index = " ".join(map(str, trial.index))
        self.file.write(f"{trial.round},{trial.layer},{trial.parameter},{index},{trial.delta},"
                        f"{','.join(map(repr, trial.losses))},{trial.choice},{trial.before},{trial.after}\n")


def replay(network, path):
    """Give a network the weights that a search ended with, from its log and the initial weights.

    Parameters
    ----------
    network : Network
        With the weights that the search began with. Changed in place. (BatchNorm's statistics are no
        weights: see `Network.calibrate`.)
    path : str or path
        What `rso.train` wrote as its `trial_log`.

    Returns
    -------
    int
        The number of trials.

    Raises
    ------
    ValueError
        If the file is no such log, or belongs to other initial weights; the message names the line.
    """
    value, n_trials = {str(p): p.value for p in network.parameters()}, 0
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} is no log of trials; expected the columns {', '.join(COLUMNS)}")
        for row in reader:
            try:
                weights = value[f"{row['layer']}.{row['parameter']}"]
                index = tuple(map(int, row["index"].split()))
                found, before, after = weights[index], np.float32(row["before"]), np.float32(row["after"])
            except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: no trial of this network "
                                 f"({type(error).__name__}: {error})") from error
            if found != before:
                raise ValueError(f"{path}, line {reader.line_num}: the weight was {before}, and is {found}; "
                                 "expected the network with its initial weights")
            weights[index] = after
            n_trials += 1
    return n_trials
