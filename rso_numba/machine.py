"""The machine that computes, and the software on it: what `rso-numba info` shows, and results name."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from . import __version__, cifar10, kernels, mnist, sources

PACKAGES = ("numpy", "numba", "llvmlite", "matplotlib", "scikit-learn")


def description():
    """Return what `rso-numba info` shows, a list of (name, value)."""
    import numba

    lines = [("rso_numba", __version__), ("python", platform.python_version())]
    lines += [(package, version(package)) for package in PACKAGES]
    lines += [
        ("CPU cores", os.cpu_count()),
        ("Numba threads", numba.get_num_threads()),
        ("threading layer", _threading_layer()),
        ("compiled code", _cache_folder()),
        ("CUDA", gpu()),
    ]
    return lines + [("data folder", line) for line in _data_folders()]


def version(package):
    """Return the version of an installed package, as text, or that it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_model():
    """Return the name of the processor, as text."""
    # Linux says it in a file; elsewhere the name may be less telling
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def processor(backend):
    """Return the name of what computes with a backend, the processor or the GPU, as text."""
    if kernels.resolve(backend) != "cuda":
        return cpu_model()
    from .kernels.cuda.device import device_name

    return device_name()


def gpu():
    """Return whether the cuda backend works, and on which GPU or why not, as text."""
    if problem := kernels.gpu_problem():
        return f"the cuda backend cannot run: {problem}"
    from .kernels.cuda.device import device_name

    return f"the cuda backend works: {device_name()}"


def commit():
    """Return the commit of the checkout that this package stands in, as text; "" if it stands in none."""
    folder = Path(__file__).parents[1]
    if not (folder / ".git").exists():  # installed: a repository further up would be another one's
        return ""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # there is no git, or it does not trust the folder
        return ""
    return done.stdout.strip()


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
