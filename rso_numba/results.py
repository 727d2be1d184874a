"""What the trainings of a table have reached: a CSV file with a line for every row and seed."""

import csv
import datetime
import io
import json
import platform
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from . import __version__, kernels, machine
from .arguments import whole_number
from .evaluators import MEMORY
from .files import make_folder, written_beside
from .rows import train

SETTINGS = ("row", "model", "solver", "preset", "overrides", "batch_size", "schedule", "rounds", "seed")
FIGURES = ("final_test_accuracy", "best_test_accuracy", "train_loss", "test_loss", "seconds",
           "images_forwarded", "weights_visited", "accepted", "test_accuracy_by_round")
ORIGIN = ("rso_numba", "python", "numpy", "numba", "machine", "threads", "backend", "commit", "date")
COLUMNS = SETTINGS + FIGURES + ORIGIN


def run(rows, path, data, seeds=3, *, n_jobs=1, rounds=None, backend="cpu", memory=MEMORY, progress=False):
    """Train every row with every seed that the file does not have yet; yield each line when it is there.

    Parameters
    ----------
    rows : sequence of Row
    path : str or path
        The CSV file, made if need be. Checkpoints of a training that was interrupted stand beside it, from
        which the same call goes on.
    data : Dataset
    seeds : int
        How many: 0..seeds - 1, all rows with the first before any with the second.
    n_jobs : int
        Trainings at once, in processes that share the cores; each has the whole `memory`.
    rounds : int or None
        RSO ends after so many, though its annealing is made for those of the row.
    backend, memory
        See `rso.train`.
    progress : bool
        Show a progress bar of each training, if they come one after the other.

    Yields
    ------
    dict
        The line by column, as text.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range, the file is not one of results, or has a row of the same name and
        other settings.
    """
    from joblib import Parallel, delayed  # here, for joblib takes a second

    path, rows = Path(path), [shortened(row, rounds) for row in rows]
    whole_number(seeds, "seeds")
    whole_number(n_jobs, "n_jobs")
    make_folder(path.parent)
    missing = [(row, seed) for seed in range(seeds) for row in rows if not is_done(path, row, seed)]
    how = dict(backend=backend, memory=memory, progress=progress and n_jobs == 1)
    jobs = [delayed(_trained)(row, seed, data, checkpoint_of(path, row, seed), how) for row, seed in missing]
    # one at a time, not a batch of short ones: a training that has ended is in the file at once
    parallel = Parallel(n_jobs, return_as="generator_unordered", batch_size=1)
    with closing(parallel(jobs)) as lines:
        for line, checkpoint in lines:
            add(path, line)
            for file in path.parent.glob(f"{checkpoint.stem}*.npz"):  # the one before it, too
                file.unlink()
            yield line


def checkpoint_of(path, row, seed):
    """Return the file beside `path` from which the training of a row and a seed can go on."""
    name = re.sub(r"\W+", "-", row.name).strip("-")
    return path.with_name(f"{path.stem}-{name}-{row.rounds}-{seed}.checkpoint.npz")


def _trained(row, seed, data, checkpoint, how):
    """Train, perhaps in a process of its own; return the line, and the checkpoint that nobody needs then."""
    history = train(row, data, seed, checkpoint=checkpoint, **how)
    return measured(row, seed, history, origin(how["backend"])), checkpoint


def shortened(row, rounds):
    """Return a row of RSO that ends after `rounds`, though made for more; any other row as it is."""
    if rounds is None or row.solver == "sgd":
        return row
    made_for = row.schedule or row.rounds
    if whole_number(rounds, "rounds") > made_for:
        raise ValueError(f"rounds is {rounds}; expected at most {made_for}, for which the row "
                         f"{row.name!r} is made")
    return replace(row, rounds=rounds, schedule=made_for)


def measured(row, seed, history, made_by):
    """Return the line of a training, by column, as text.

    Parameters
    ----------
    row : Row
    seed : int
    history : History
    made_by : dict
        See `origin`.

    Returns
    -------
    dict
        The best test accuracy is the highest after any round. (It chooses nothing, but is chosen by the
        test set itself: the final one is what the training has reached.)
    """
    accuracies, last = history["test_accuracy"], history.rounds[-1]
    if last.round != row.rounds:
        raise ValueError(f"the history has {last.round} rounds, and the row {row.name!r} {row.rounds}; "
                         "expected as many")
    return of_row(row, seed) | {
        "final_test_accuracy": f"{last.test_accuracy:.6g}",
        "best_test_accuracy": f"{max(accuracies[1:]):.6g}",
        "train_loss": f"{last.train_loss:.6f}", "test_loss": f"{last.test_loss:.6f}",
        "seconds": f"{last.seconds:.2f}", "images_forwarded": str(last.images_forwarded),
        "weights_visited": str(last.weights_visited), "accepted": str(last.accepted),
        "test_accuracy_by_round": " ".join(f"{accuracy:.6g}" for accuracy in accuracies)} | made_by


def of_row(row, seed):
    """Return what a line says of its row and seed, by column, as text."""
    return {"row": row.name, "model": row.model, "solver": row.solver, "preset": row.preset,
            "overrides": json.dumps(row.overrides), "batch_size": str(row.batch_size),
            "schedule": str(row.schedule or row.rounds), "rounds": str(row.rounds), "seed": str(seed)}


def origin(backend="cpu"):
    """Return what computes here and now, by column, as text.

    Parameters
    ----------
    backend : {"cpu", "numpy", "cuda", "auto"}

    Returns
    -------
    dict
        Versions; the processor, or the GPU; Numba's threads; the commit, or "" without a checkout; the date.
    """
    import numba

    backend = kernels.resolve(backend)
    return {"rso_numba": __version__, "python": platform.python_version(), "numpy": machine.version("numpy"),
            "numba": machine.version("numba"), "machine": machine.processor(backend),
            "threads": str(numba.get_num_threads()) if backend == "cpu" else "", "backend": backend,
            "commit": machine.commit(), "date": datetime.date.today().isoformat()}


def is_done(path, row, seed):
    """Return whether the file has the line of a row and a seed; complain if it was made otherwise."""
    expected = of_row(row, seed)
    for line in read(path):
        if all(line[name] == expected[name] for name in ("row", "rounds", "seed")):
            for name in SETTINGS:
                if line[name] != expected[name]:
                    raise ValueError(f"{path} has the row {row.name!r} with {name} {line[name]!r}, expected "
                                     f"{expected[name]!r}; delete its lines, or write to another folder")
            return True
    return False


def add(path, line):
    """Add a line to the file. At any time it is as it was before, or has the whole line."""
    lines = [*read(path), line]
    with written_beside(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def read(path):
    """Return the lines of the file, dicts of text by column; none, if there is no file.

    Raises
    ------
    ValueError
        If it is not a file of results.
    """
    path = Path(path)
    if not path.exists():
        return []
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""), strict=True)
        lines = list(reader)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"its columns are {', '.join(reader.fieldnames or ())}")
        if wrong := [i for i, line in enumerate(lines, 1) if None in line or None in line.values()]:
            raise ValueError(f"line {wrong[0]} has not one field for each of {len(COLUMNS)} columns")
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no file of results ({error}); mend it, or write to another "
                         "folder") from error
    return lines
