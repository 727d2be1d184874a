"""The options of the command line, one function a command; each is given the command's parser.

Numba, matplotlib and scikit-learn are not imported here, so that `--help` is quick.
"""

import os

from . import datasets, kernels, models, presets
from .evaluators import MEMORY

# What suits each data set, where the command line says nothing else.
DEFAULTS = {
    "digits": dict(rounds=8, batch_size=1024, epochs=30),
    "digits28": dict(rounds=2, batch_size=512, epochs=30),
    "mnist": dict(rounds=10, batch_size=256, epochs=10),
    "cifar10": dict(rounds=10, batch_size=256, epochs=10),
}
DATA_HOME = dict(metavar="FOLDER", help="folder with the files of the data set, or to download them to; it "
                 "must exist (default: $RSO_NUMBA_DATA, or ./data if there is one)")
MEMORY_GB = dict(type=float, default=MEMORY / 1e9, metavar="GB", help="what RSO may keep, beside the data, "
                 "of mini-batches that come back; less is slower (default: %(default)s)")
CHECKPOINT_SECONDS = 60.0  # from one to the next, where the command line asks for some and says no more


def add_compare(parser):
    """Add the options of `rso-numba compare`."""

    def names(choices):
        return f"one of {', '.join(choices)}"

    def by_data(key):
        return "default: " + ", ".join(f"{values[key]} for {name}" for name, values in DEFAULTS.items())

    option = parser.add_argument
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
    option("--memory", **MEMORY_GB)
    option("--out", default="rso-out", metavar="FOLDER", type=os.path.expanduser,
           help="folder for the files, made if need be (default: %(default)s)")
    option("--no-progress", action="store_true", help="show no progress bars")
    option("--checkpoint", type=float, nargs="?", const=CHECKPOINT_SECONDS, metavar="SECONDS",
           help="write rso.checkpoint.npz and sgd.checkpoint.npz to the folder, this often (default: "
           "%(const)g), so that an interrupted training can go on")
    option("--resume", action="store_true",
           help="go on from the checkpoints in the folder, if there are some, to the same result; the other "
           "arguments have to be the same")


def add_table(parser):
    """Add the options of `rso-numba table`."""
    option = parser.add_argument
    option("name", metavar="TABLE", help="notebook (what the course notebook reports), paper (what the paper "
           "reports), ablations (one setting changed at a time) or better (than the paper)")
    option("--seeds", type=int, default=3, metavar="N",
           help="trainings of every row, with the seeds 0 to N - 1 (default: %(default)s)")
    option("--quick", action="store_true", help="the same as --seeds 1")
    option("--rounds", type=int, metavar="N", help="end RSO after N rounds; what the rows plan for all of "
           "theirs, the annealing, stays (default: what the rows say)")
    option("--only", nargs="+", default=[""], metavar="TEXT",
           help="only rows with one of these texts in their names")
    option("--data-home", **DATA_HOME)
    option("--backend", default="cpu", metavar="NAME",
           help=f"what computes, one of {', '.join(kernels.BACKEND_CHOICES)} (default: %(default)s)")
    option("--threads", type=int, metavar="N", help="threads of the cpu backend (default: all cores)")
    option("--jobs", type=int, default=1, metavar="N", help="trainings at once, in processes that share the "
           "cores, which is faster than one after the other with all of them; each takes the memory "
           "(default: %(default)s)")
    option("--memory", **MEMORY_GB)
    option("--out", metavar="FOLDER", type=os.path.expanduser, help="folder for TABLE.csv, and for the "
           "checkpoint of a training that was interrupted (default: data/results if there is one, else "
           "rso-out)")
    option("--no-progress", action="store_true", help="show no progress bars")


def add_bench(parser):
    """Add the options of `rso-numba bench`."""
    option = parser.add_argument
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
