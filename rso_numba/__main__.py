"""The command line: `rso-numba compare`, `table`, `bench` and `info` (or `python -m rso_numba ...`).

Numba, matplotlib and scikit-learn are imported where they are needed, so that `--help` is quick.
"""

import argparse
import json
import os
import platform
import shlex
import signal
import sys
import warnings
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

from . import __version__, datasets, kernels, machine, mpi, options
from .arguments import whole_number
from .files import make_folder, written_beside


def main(argv=None):
    """Run the command line.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; by default those the program was started with.

    Returns
    -------
    int
        Exit status: 0; 1 if all was computed and written, but a picture could not be drawn or the output not
        be printed; 2 after an error of the user or a training that diverged; 130 after Ctrl-C (of `table`
        also after SIGTERM).

    Notes
    -----
    Processes that `mpiexec` has started search together in `compare`; the other commands are left to rank 0.
    """
    try:
        ranks = mpi.start()
    except mpi.MpiError as error:
        _note(f"error: {error}")
        return 2
    return _run(argv) if ranks is None else ranks.run(partial(_run, argv, ranks))


def _run(argv, ranks=None):
    arguments = parser().parse_args(argv)
    if arguments.command is compare:
        arguments.ranks = ranks
    elif ranks is not None and not ranks.leads:
        return 0
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _note(f"warning: {message}")
        try:
            return arguments.command(arguments)
        except KeyboardInterrupt:
            _note("interrupted; nothing more was written")
            return 130
        except (ValueError, TypeError, OSError, FloatingPointError, kernels.GpuError) as error:
            _note(f"error: {error}")
            return 2


def _note(text):
    """Print one line on stderr; where that cannot be, do without."""
    with suppress(OSError, ValueError):
        print("rso-numba:", " ".join(text.split()), file=sys.stderr, flush=True)


def _show(text):
    """Print `text`, return the exit status. What it says is in files already, so no failure is an error."""
    try:
        print(text, flush=True)
    except UnicodeEncodeError:  # a path, in a terminal that is told to be ASCII
        return _show(text.encode(sys.stdout.encoding, "backslashreplace").decode(sys.stdout.encoding))
    except OSError as error:
        with suppress(OSError):  # or Python tries once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # whose reader has seen enough: `rso-numba info | head`
            _note(f"warning: the output could not be printed ({error})")
            return 1
    return 0


def parser():
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(
        prog="rso-numba", description="Train a small CNN one weight at a time, without gradients.")
    top.add_argument("--version", action="version", version=f"rso-numba {__version__}")
    commands = top.add_subparsers(required=True, metavar="command")
    info_parser = commands.add_parser("info", help="show versions, threads, GPU and folders")
    info_parser.set_defaults(command=info)
    run = commands.add_parser(
        "compare", help="train a network by RSO and its twin by SGD, and draw both",
        description="Train a network by RSO, and its twin with the same initial weights by SGD. Print a "
        "table, and write a picture, both histories and both networks to a folder. Ctrl-C ends the training "
        "early and keeps what was learnt. Exit status 1: all else is written, but the picture could not be "
        "drawn, or the table not be printed.")
    run.set_defaults(command=compare)
    options.add_compare(run)
    run = commands.add_parser(
        "table", help="make a table of published results again, with several seeds",
        description="Train the networks of a table with several seeds, and print what was reached beside "
        "what was published. Every training adds a line to a CSV file when it ends. Those that are there are "
        "not trained again: after an interruption the same command goes on.")
    run.set_defaults(command=table)
    options.add_table(run)
    run = commands.add_parser(
        "bench", help="time a trial here and in PyTorch, side by side",
        description="Measure the seconds that RSO needs for one weight, with delta evaluation, with whole "
        "forward passes and in PyTorch; then SGD, and the rate of the convolution. Print a table, and write "
        "all figures as JSON. Nothing else should run on the machine.")
    run.set_defaults(command=bench)
    options.add_bench(run)
    return top


def bench(arguments):
    """Run `rso-numba bench`; return the exit status."""
    import numba

    from . import bench as benchmark
    from . import bench_gpu

    kernels.backend(arguments.backend)  # says what a GPU lacks, if anything
    whole_number(arguments.seed, "seed", 0)
    if arguments.threads is not None:
        _set_threads(arguments.threads)
    if Path(arguments.out).is_dir():
        raise ValueError(f"--out is {arguments.out}, a folder; expected a file, such as bench.json in it")
    make_folder(Path(arguments.out).parent)
    if arguments.data is None:
        arguments.data = "cifar10" if arguments.model == "paper_cifar10" else "mnist"
    data = datasets.load(arguments.data, arguments.data_home)
    if arguments.quick:
        data = data.subset(512, 64, arguments.seed)
    chosen = list(benchmark.FOR_MNIST) if arguments.model == "all" else [arguments.model]
    effort = benchmark.QUICK if arguments.quick else benchmark.Effort()
    threads, rows, status = numba.get_num_threads(), [], 0
    own = arguments.seed, arguments.batch_size, arguments.preset
    if arguments.backend == "cuda":
        groups = bench_gpu.run(chosen, data, effort, *own)
    else:
        groups = benchmark.run(chosen, data, threads, effort, *own)
    try:
        for group in groups:
            rows += group
            _note(f"measured {group[-1].configuration}")
    finally:  # an interrupted benchmark keeps what it has measured
        if rows:
            status = _write_benchmark(arguments, data, threads, rows)
    return status


def _write_benchmark(arguments, data, threads, rows):
    result = dict(
        command=shlex.join(["rso-numba", *sys.argv[1:]]), arguments={
            name: value for name, value in vars(arguments).items() if name != "command"},
        machine=dict(cpu=machine.cpu_model(), cores=os.cpu_count(), system=platform.platform(),
                     gpu=machine.gpu() if arguments.backend == "cuda" else None),
        versions={"rso_numba": __version__, "python": platform.python_version(),
                  **{package: machine.version(package) for package in (*machine.PACKAGES, "torch")}},
        threads=threads, seed=arguments.seed, data=repr(data), rows=[asdict(row) for row in rows])
    try:
        with written_beside(arguments.out) as beside:
            beside.write_text(json.dumps(result, indent=1) + "\n")
    finally:  # what a full disk cannot hold can still be read
        status = _show(benchmark_table(rows))
    return max(status, _show(f"wrote {arguments.out}"))


def benchmark_table(rows):
    """Return the rows of a benchmark as a plain table, aligned."""
    cells = [("configuration", "what", "measured", "", "speed", "peak MiB", "how")]
    for row in rows:
        cells.append((
            row.configuration, row.what, "-" if row.value is None else f"{row.value:#.4g}", row.unit,
            "-" if row.relative is None else f"{row.relative:#.3g} x {row.against}",
            "-" if row.peak_mib is None else f"{row.peak_mib:.0f}", row.measured))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(f"{cell:{'>' if i in (2, 5) else '<'}{width}}"
                       for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
             for row in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def compare(arguments):
    """Run `rso-numba compare`; return the exit status."""
    # the picture goes to a file: it needs no window, and no backend that opens one
    os.environ["MPLBACKEND"] = "agg"
    from . import experiments

    ranks = arguments.ranks
    leads = ranks is None or ranks.leads
    if arguments.threads is not None:
        _set_threads(arguments.threads)
    elif ranks is not None:
        ranks.share_cores()
    data = datasets.load(arguments.data, arguments.data_home)
    chosen = dict(options.DEFAULTS[arguments.data])
    chosen.update({name: getattr(arguments, name) for name in chosen if getattr(arguments, name) is not None})
    failed, checkpoint = [], arguments.checkpoint
    if arguments.resume and checkpoint is None:
        checkpoint = options.CHECKPOINT_SECONDS
    result = experiments.compare(
        data, arguments.model, chosen["rounds"], chosen["batch_size"], arguments.preset,
        sgd_epochs=chosen["epochs"], sgd_batch_size=arguments.sgd_batch_size,
        learning_rate=arguments.learning_rate, momentum=arguments.momentum, backend=arguments.backend,
        memory=arguments.memory * 1e9, seed=arguments.seed, out=arguments.out, ranks=ranks,
        progress=leads and not arguments.no_progress, checkpoint_every=checkpoint, resume=arguments.resume,
        report=lambda result: failed.append(_show(experiments.table(result.histories.values()))))
    if not leads:
        return 0
    failed.append(_show(f"wrote {', '.join(map(str, result.files)) or 'nothing'}"))
    if result.diverged:
        _note(f"error: {'; '.join(result.diverged.values())}")
    if result.interrupted is not None:
        goes_on = "" if checkpoint is None else "; to go on, give the same command with --resume"
        _note(result.interrupted + goes_on)
        return 130
    if result.diverged:
        return 2
    failed.append(Path(arguments.out, "compare.png") not in result.files)
    return int(any(failed))


def _set_threads(threads):
    import numba

    most = numba.config.NUMBA_NUM_THREADS
    if not 1 <= threads <= most:
        limit = ("this machine has no more" if most == numba.config.NUMBA_DEFAULT_NUM_THREADS
                 else "the environment variable NUMBA_NUM_THREADS allows no more")
        raise ValueError(f"--threads is {threads}; expected 1 to {most}: {limit}")
    numba.set_num_threads(threads)


def table(arguments):
    """Run `rso-numba table`; return the exit status."""
    from . import pages, results, tables

    rows = tables.chosen(arguments.name, arguments.only)
    if arguments.threads is not None:
        if arguments.jobs != 1:
            raise ValueError(f"--threads is {arguments.threads} and --jobs {arguments.jobs}; expected one of "
                             "them: jobs share the cores")
        _set_threads(arguments.threads)
    out = arguments.out or ("data/results" if Path("data/results").is_dir() else "rso-out")
    path, seeds = Path(out, f"{arguments.name}.csv"), 1 if arguments.quick else arguments.seeds
    lines = results.run(
        rows, path, datasets.load("mnist", arguments.data_home), seeds, n_jobs=arguments.jobs,
        rounds=arguments.rounds, backend=arguments.backend, memory=arguments.memory * 1e9,
        progress=not arguments.no_progress)
    interrupted = False
    # as Ctrl-C, which ends the processes of jobs: else they would go on alone, and what they reach be lost
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for line in lines:
            _note(f"{line['row']}, seed {line['seed']}: test accuracy {line['final_test_accuracy']} in "
                  f"{line['seconds']} s")
    except KeyboardInterrupt:
        interrupted = True
    finally:
        signal.signal(signal.SIGTERM, former or signal.SIG_DFL)
    status = _show(pages.render(arguments.name, results.read(path)))
    if interrupted:
        _note(f"interrupted; what has ended is in {path}, and the same command goes on")
        return 130
    return status


def info(arguments):
    """Run `rso-numba info`; return the exit status."""
    return _show("\n".join(f"{name:<16}{value}" for name, value in machine.description()))


if __name__ == "__main__":
    sys.exit(main())
