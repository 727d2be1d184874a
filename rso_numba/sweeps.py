"""Sweeps: the same network trained with many settings, in processes or on machines that joblib chooses.

A sweep is a grid of configurations, and a CSV file in which each configuration gets its rows when it has
ended. Only the process that began the sweep writes there; a worker trains, and returns rows.
"""

import csv
import io
from contextlib import closing, suppress
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from threading import Lock

import numpy as np

from . import kernels, models, presets, rso, sgd
from .arguments import training_generator, whole_number
from .datasets import check_training
from .files import make_folder, written_beside
from .history import History, Round
from .progress import ProgressBar

# what every configuration says, and what it says if the grid does not
DEFAULTS = {"solver": "rso", "model": "one_conv", "preset": "paper", "rounds": 10, "batch_size": None,
            "seed": 0, "backend": "cpu"}
BATCH_SIZES = {"rso": 1024, "sgd": 32}
BUILD = ("scaling", "init", "epsilon")  # the settings that `models.build` reads
OF_SGD = ("learning_rate", "momentum", "weight_decay")
# what a grid may name besides, by solver
CHOICES = {"rso": [field.name for field in fields(presets.Preset)], "sgd": [*BUILD, *OF_SGD]}
EXTRAS = list(dict.fromkeys([*CHOICES["rso"], *CHOICES["sgd"]]))

DATA = ["data", "checksum"]
FIGURES = [field.name for field in fields(Round) if field.name != "acceptance"]
COLUMNS = [*DATA, *DEFAULTS, *EXTRAS, *FIGURES, "problem"]

_turn = Lock()  # jobs that share a process train one after the other: each uses all threads of the kernels


def sweep(grid, data, path, n_jobs=None, progress=False):
    """Train a network for every configuration of a grid; add the rows of each to a CSV when it ends.

    `joblib.parallel_config` says where: in processes of this machine (`backend="loky"`), or on the workers of
    a cluster (`backend="dask"`). A sweep that was interrupted, even by a crash, goes on where it stopped:
    configurations that are in the file are not computed again. One file may collect several grids.

    Parameters
    ----------
    grid : dict of lists, or a list of such dicts
        As of scikit-learn's `ParameterGrid`. Keys are "solver" ("rso" or "sgd"), "model", "preset" (a name),
        "rounds" (for SGD: epochs), "batch_size", "seed", "backend"; for RSO the fields of `presets.Preset`;
        for SGD "learning_rate", "momentum", "weight_decay", and "scaling", "init", "epsilon" of the preset.
        What is not named is as in `rso.train` and `sgd.train`, the seed is 0.
    data : Dataset
        It travels to each worker once.
    path : str or path
        The CSV file, made if need be. One sweep at a time may write there.
    n_jobs : int, optional
        Configurations at once; by default what `joblib.parallel_config` says, or else 1.
    progress : bool
        Show a progress bar with the time left.

    Returns
    -------
    list of dict
        The rows of this grid, in the order of the file; see `read_sweep`.

    Raises
    ------
    ValueError, TypeError
        Before anything is computed: if a configuration has an argument that is unknown, out of range or does
        not fit the data, or if `path` is not a file of a sweep.
    OSError
        If the file cannot be written.

    Notes
    -----
    The seed draws initial weights, steps and mini-batches, as in `rso-numba compare`: no result depends on
    the other configurations, on their order, or on where they are computed.

    A training that diverges ends in a row that says why, in the column "problem"; the others go on. Any other
    error of a worker ends the sweep, as Ctrl-C does; what was computed is in the file.

    Processes of joblib share the cores. The workers of a Dask cluster have to be told: start each with the
    environment variable NUMBA_NUM_THREADS.
    """
    from joblib import Parallel, delayed  # here, for joblib and scikit-learn take a second
    from sklearn.model_selection import ParameterGrid

    of_data = {"data": data.name, "checksum": data.checksum()}
    configurations = {}
    for settings in ParameterGrid(grid):
        configuration = of_data | _checked(settings, data)
        configurations[_key(configuration)] = configuration
    path = Path(path)
    make_folder(path.parent)
    finished = {_key(row) for row in _read(path)}
    jobs = [delayed(_train)(configuration, data)
            for key, configuration in configurations.items() if key not in finished]
    # one at a time, not a batch of short ones: a configuration that has ended is in the file at once
    parallel = Parallel(n_jobs, return_as="generator_unordered", batch_size=1)
    with (ProgressBar(len(jobs), "configuration", "sweep", progress) as bar,
          closing(parallel(jobs)) as results):
        for rows in results:
            _add(path, rows)
            bar.update()
    return [_typed(row) for row in _read(path) if _key(row) in configurations]


def read_sweep(path):
    """Return the rows of a file that `sweep` wrote, in its order: that in which the configurations ended.

    Parameters
    ----------
    path : str or path

    Returns
    -------
    list of dict
        One a round of a configuration, by column: the name of the data set and the checksum of its arrays;
        the settings; the figures of `history.Round`; and "problem", why a training ended early. Numbers are
        int or float, an empty field is None: a setting that the grid did not name, or a figure that there
        is none of.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a file of a sweep.
    """
    path = Path(path)
    path.stat()
    return [_typed(row) for row in _read(path)]


# ---- configurations ----


def _checked(settings, data):
    """Return a configuration with all that `settings` does not say, or complain of what cannot be."""
    settings = {name: value.item() if isinstance(value, np.generic) else value
                for name, value in settings.items()}
    configuration = DEFAULTS | settings
    try:
        solver = configuration["solver"]
        if solver not in CHOICES:
            raise ValueError(f"unknown solver {solver!r}; known solvers: {', '.join(CHOICES)}")
        if unknown := [name for name in settings if name not in (*DEFAULTS, *CHOICES[solver])]:
            raise ValueError(f"solver {solver!r} takes no {', '.join(unknown)}; expected some of "
                             f"{', '.join([*DEFAULTS, *CHOICES[solver]])} (two solvers: a list of two grids)")
        if not isinstance(configuration["preset"], str):
            raise TypeError(f"preset is {configuration['preset']!r}; expected a name, and in the grid the "
                            "fields that differ")
        if configuration["batch_size"] is None:
            configuration["batch_size"] = BATCH_SIZES[solver]
        whole_number(configuration["seed"], "seed", 0)
        if configuration["backend"] not in kernels.BACKENDS:  # "auto" is another one on another machine
            raise ValueError(f"backend is {configuration['backend']!r}; expected one of "
                             f"{', '.join(kernels.BACKENDS)}")
        network, _ = _network(configuration, data)
        check_training(network, data, configuration["rounds"], configuration["batch_size"], "rounds")
        if solver == "sgd":
            sgd.check_settings(**_chosen(configuration, OF_SGD))
    except (ValueError, TypeError) as error:
        raise type(error)(f"{error}. This is of the configuration {settings}") from None
    return configuration


def _chosen(configuration, names):
    return {name: configuration[name] for name in names if name in configuration}


def _network(configuration, data):
    """Return the network with its initial weights, and the settings of the search."""
    names = CHOICES["rso"] if configuration["solver"] == "rso" else BUILD
    settings = presets.resolve(configuration["preset"], **_chosen(configuration, names))
    network = models.build(configuration["model"], data.image_shape, data.n_classes, configuration["seed"],
                           settings)
    return network, settings


def _train(configuration, data):
    """Train by one configuration, in a worker; return its rows."""
    solver, problem = configuration["solver"], None
    history = History(solver)
    rounds, batch_size, backend = (configuration[name] for name in ("rounds", "batch_size", "backend"))
    rng = training_generator(configuration["seed"])
    with _turn:
        network, settings = _network(configuration, data)
        try:
            if solver == "rso":
                evaluation = "delta" if settings.unit == "weight" else "full"
                rso.train(network, data, rounds, batch_size, settings, evaluation=evaluation, backend=backend,
                          rng=rng, history=history)
            else:
                sgd.train(network, data, rounds, batch_size, **_chosen(configuration, OF_SGD),
                          backend=backend, rng=rng, history=history)
        except FloatingPointError as error:
            problem = " ".join(str(error).split())
    rows = [configuration | {name: getattr(row, name) for name in FIGURES} for row in history.rounds]
    if problem is not None:
        rows.append(configuration | {"round": len(rows), "problem": problem})
    return rows


# ---- the file ----


def _key(row):
    """Return what names the configuration of a row: its settings as the file has them."""
    return tuple(str(row.get(name, "")) for name in (*DATA, *DEFAULTS, *EXTRAS))


def _read(path):
    """Return the rows of the file, as dicts of text; none, if there is no file.

    What a crash or a full disk has left incomplete is left out: a last line that is cut off (none of ours,
    but the file may have been copied), and the rows of a configuration that did not end.
    """
    content = path.read_bytes() if path.exists() else b""
    if not content:
        return []
    try:
        whole = content[: content.rfind(b"\n") + 1].decode()
        columns, *lines = csv.reader(io.StringIO(whole or "\n", newline=""))
        if not set(COLUMNS) - set(EXTRAS) <= set(columns) <= set(COLUMNS) or len(set(columns)) < len(columns):
            raise ValueError(f"its columns are {', '.join(columns)}")
        if wrong := [i for i, line in enumerate(lines, 1) if len(line) != len(columns)]:
            raise ValueError(f"row {wrong[0]} has not one field for each of {len(columns)} columns")
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no file of a sweep ({error}); mend it, or name another") from error
    rows = []
    for _, group in groupby((dict(zip(columns, line, strict=True)) for line in lines), _key):
        group = list(group)
        if group[-1]["round"] == group[-1]["rounds"] or group[-1]["problem"]:
            rows += group
    return rows


def _add(path, rows):
    """Add the rows of a configuration to the file. At any time it is as it was before, or has all of them."""
    rows = _read(path) + rows
    named = set().union(*rows)
    columns = [name for name in COLUMNS if name in named or name not in EXTRAS]
    with written_beside(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([str(row.get(name, "")) for name in columns] for row in rows)


def _typed(row):
    return {name: _value(text) for name, text in row.items()}


def _value(text):
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text or None
