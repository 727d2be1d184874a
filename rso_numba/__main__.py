"""The command line: `rso-numba compare`, `bench` and `info` (or `python -m rso_numba ...`).

Numba, matplotlib and scikit-learn are imported where they are needed, so that `--help` is quick.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import warnings
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

from . import __version__, cifar10, datasets, kernels, mnist, models, mpi, presets, sources
from .arguments import whole_number
from .evaluators import MEMORY
from .files import make_folder, written_beside

# What suits each data set, where the command line says nothing else.
DEFAULTS = {
    "digits": dict(rounds=8, batch_size=1024, epochs=30),
    "digits28": dict(rounds=2, batch_size=512, epochs=30),
    "mnist": dict(rounds=10, batch_size=256, epochs=10),
    "cifar10": dict(rounds=10, batch_size=256, epochs=10),
}
DATA_HOME = dict(metavar="FOLDER", help="folder with the files of the data set, or to download them to; it "
                 "must exist (default: $RSO_NUMBA_DATA, or ./data if there is one)")
CHECKPOINT_SECONDS = 60.0  # from one to the next, where the command line asks for some and says no more
PACKAGES = ("numpy", "numba", "llvmlite", "matplotlib", "scikit-learn")


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
        be printed; 2 after an error of the user or a training that diverged; 130 after Ctrl-C.

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

    def names(choices):
        return f"one of {', '.join(choices)}"

    def by_data(key):
        return "default: " + ", ".join(f"{values[key]} for {name}" for name, values in DEFAULTS.items())

    option = run.add_argument
    option("--data", default="digits", metavar="NAME",
           help=f"data set, {names(datasets.LOADERS)} (default: %(default)s)")
    option("--data-home", **DATA_HOME)
    option("--model", default="one_conv", metavar="NAME",
           help=f"network, {names(models.MODELS)} (default: %(default)s)")
    option("--preset", default="paper", metavar="NAME",
           help=f"settings of RSO, {names(presets.PRESETS)} (default: %(default)s)")
    option("--rounds", type=int, metavar="N",
           help=f"how often RSO visits every weight ({by_data('rounds')})")
    option("--batch-size", type=int, metavar="N",
           help=f"images in a mini-batch of RSO ({by_data('batch_size')})")
    option("--epochs", type=int, metavar="N",
           help=f"how often SGD passes over the training set ({by_data('epochs')})")
    option("--sgd-batch-size", type=int, default=32, metavar="N",
           help="images in a mini-batch of SGD (default: %(default)s)")
    option("--learning-rate", type=float, default=0.1, metavar="X",
           help="of SGD: length of a step, as a multiple of the gradient (default: %(default)s)")
    option("--momentum", type=float, default=0.0, metavar="X",
           help="of SGD: part of the last step that is added to the next, 0 to 1 (default: %(default)s)")
    option("--seed", type=int, default=0, metavar="N",
           help="of all random numbers, 0 or larger (default: %(default)s)")
    option("--backend", default="cpu", metavar="NAME",
           help=f"what computes, {names(kernels.BACKEND_CHOICES)} (default: %(default)s)")
    option("--threads", type=int, metavar="N", help="threads of the cpu backend (default: all cores, "
           "divided among the processes that mpiexec has started)")
    option("--memory", type=float, default=MEMORY / 1e9, metavar="GB", help="what RSO may keep, beside the "
           "data, of mini-batches that come back; less is slower (default: %(default)s)")
    option("--out", default="rso-out", metavar="FOLDER", type=os.path.expanduser,
           help="folder for the files, made if need be (default: %(default)s)")
    option("--no-progress", action="store_true", help="show no progress bars")
    option("--checkpoint", type=float, nargs="?", const=CHECKPOINT_SECONDS, metavar="SECONDS",
           help="write rso.checkpoint.npz and sgd.checkpoint.npz to the folder, this often (default: "
           "%(const)g), so that an interrupted training can go on")
    option("--resume", action="store_true",
           help="go on from the checkpoints in the folder, if there are some, to the same result; the other "
           "arguments have to be the same")
    _add_bench(commands)
    return top


def _add_bench(commands):
    run = commands.add_parser(
        "bench", help="time a trial here and in PyTorch, side by side",
        description="Measure the seconds that RSO needs for one weight, with delta evaluation, with whole "
        "forward passes and in PyTorch; then SGD, and the rate of the convolution. Print a table, and write "
        "all figures as JSON. Nothing else should run on the machine.")
    run.set_defaults(command=bench)
    option = run.add_argument
    option("--model", default="all", choices=("one_conv", "two_conv", "paper_mnist", "paper_cifar10", "all"),
           help="network; all is those for MNIST (default: %(default)s)")
    option("--data", choices=("mnist", "cifar10", "digits28"),
           help="data set (default: mnist; cifar10 for paper_cifar10)")
    option("--data-home", **DATA_HOME)
    option("--batch-size", type=int, metavar="N", help="images in a mini-batch of RSO (default: 1024 for "
           "one_conv, 1000 for two_conv, 5000 for paper_mnist, 1000 for paper_cifar10; at most half of the "
           "training set)")
    option("--preset", metavar="NAME", help=f"settings of RSO, one of {', '.join(presets.PRESETS)} "
           "(default: notebook, authors for paper_mnist and paper_cifar10)")
    option("--backend", default="cpu", choices=("cpu", "cuda"),
           help="cuda: a GPU, beside the least time that its arithmetic and its memory would take "
           "(default: %(default)s)")
    option("--threads", type=int, metavar="N", help="threads of Numba and PyTorch (default: all cores)")
    option("--seed", type=int, default=0, metavar="N", help="of all random numbers (default: %(default)s)")
    option("--quick", action="store_true", help="few images and trials: does it run? The figures mean little")
    option("--out", default="rso-out/bench.json", metavar="FILE", type=os.path.expanduser,
           help="JSON file (default: %(default)s)")


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
        machine=dict(cpu=_cpu_model(), cores=os.cpu_count(), system=platform.platform(),
                     gpu=_gpu() if arguments.backend == "cuda" else None),
        versions={"rso_numba": __version__, "python": platform.python_version(),
                  **{package: _version(package) for package in (*PACKAGES, "torch")}},
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


def _cpu_model():
    # Linux says it in a file; elsewhere the name may be less telling
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


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
    chosen = dict(DEFAULTS[arguments.data])
    chosen.update({name: getattr(arguments, name) for name in chosen if getattr(arguments, name) is not None})
    failed, checkpoint = [], arguments.checkpoint
    if arguments.resume and checkpoint is None:
        checkpoint = CHECKPOINT_SECONDS
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


def info(arguments):
    """Run `rso-numba info`; return the exit status."""
    import numba

    lines = [("rso_numba", __version__), ("python", platform.python_version())]
    lines += [(package, _version(package)) for package in PACKAGES]
    lines += [
        ("CPU cores", os.cpu_count()),
        ("Numba threads", numba.get_num_threads()),
        ("threading layer", _threading_layer()),
        ("compiled code", _cache_folder()),
        ("CUDA", _gpu()),
    ]
    lines += [("data folder", line) for line in _data_folders()]
    return _show("\n".join(f"{name:<16}{value}" for name, value in lines))


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _threading_layer():
    # Numba chooses the layer when the first parallel function runs
    import numba

    @numba.njit(parallel=True)
    def count(n):
        total = 0
        for _ in numba.prange(n):
            total += 1
        return total

    try:
        count(2)
        return numba.threading_layer()
    except ValueError as error:  # NUMBA_THREADING_LAYER asks for one that is not there
        return f"none: {error}"


def _cache_folder():
    from .kernels.cpu.layout import pack_blocks  # one kernel of many: all are cached in the same place

    stats = getattr(pack_blocks, "stats", None)
    if stats is not None and stats.cache_path is not None:
        return stats.cache_path
    return "not kept: no folder can be written"


def _gpu():
    if problem := kernels.gpu_problem():
        return f"the cuda backend cannot run: {problem}"
    from .kernels.cuda.device import device_name

    return f"the cuda backend works: {device_name()}"


def _data_folders():
    try:
        homes = sources.data_homes()
    except OSError as error:
        yield str(error)
        return
    for home in homes:
        if not home.is_dir():
            yield f"{home} does not exist"
            continue
        found = [("MNIST", mnist.find_files(home), mnist.MNIST_FILES),  # those that the loaders would read
                 ("CIFAR-10", cifar10.find_files(home), cifar10.CIFAR10_FILES)]
        for title, paths, names in found:
            folder = next(iter(paths.values())).parent if paths else home
            yield f"{folder.resolve()} has {len(paths)} of the {len(names)} files of {title}"


if __name__ == "__main__":
    sys.exit(main())
