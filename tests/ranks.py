"""What `test_mpi.py` lets several ranks do: `mpiexec -n 2 python ranks.py search out.npz`."""

import os
import signal
import sys
from pathlib import Path

import numpy as np

from rso_numba import build, datasets, mpi, rso
from rso_numba.evaluators import DeltaForward
from rso_numba.visits import visits

# model, preset, mini-batch, evaluation, how many weights of a parameter are visited, settings
SEARCHES = [
    *(("one_conv", preset, 600, "delta", 60, {"hold": hold})
      for preset in ("paper", "authors", "notebook") for hold in ("weight", "filter")),
    *(("paper_mnist", preset, 300, "delta", 8, {"hold": hold})
      for preset in ("paper", "authors", "notebook") for hold in ("weight", "filter")),
    ("paper_mnist", "notebook", 300, "full", 2, {}),
    ("paper_mnist", "authors", 300, "full", 2, {}),
    ("two_conv", "paper", 600, "delta", 20, {"unit": "filter"}),
    ("one_conv", "paper", 10, "delta", 20, {}),  # fewer images than a block has
]


def some(n):
    """Return visits of n weights of each parameter, at equal distances."""
    def chosen(*arguments):
        return [(parameter, list(indices)[:: -(-len(indices) // n)], sigma)
                for parameter, indices, sigma in visits(*arguments)]
    return chosen


def search(ranks, evaluator_of=None, case=SEARCHES[0]):
    """Return the losses of all trials of a search of the digits, and the weights and buffers after it."""
    model, preset, batch_size, evaluation, n, settings = case
    data = datasets.load_digits()
    network = build(model, data.image_shape, 10, rng=0, preset=preset)
    how = dict(ranks=ranks) if evaluator_of is None else dict(evaluator=evaluator_of(network))
    trials = rso.trials(network, data, 1, batch_size, preset, evaluation=evaluation, visits=some(n), rng=1,
                        **how, **settings)
    losses = np.array([trial.losses for trial in trials])
    return losses, np.concatenate([array.ravel() for array in network.state().values()])


def searches(ranks):
    """Return the results of all `SEARCHES`, and of one whose cache is soon full, as a dict of arrays."""
    results = [search(ranks, case=case) for case in SEARCHES]
    results.append(search(ranks, lambda network: DeltaForward(network, memory=3e5, ranks=ranks), SEARCHES[4]))
    return {f"{name}{i}": array for i, result in enumerate(results)
            for name, array in zip(("losses", "state"), result, strict=True)}


def fail(ranks, how):
    """End one of the ranks while the others wait for it."""
    def failing(*arguments):
        if ranks.rank == 1 and how == "raise":
            raise RuntimeError("this rank has failed")
        if ranks.rank == 1 and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return visits(*arguments)

    data = datasets.load_digits()
    network = build("one_conv", data.image_shape, 10, rng=0)
    for _ in rso.trials(network, data, 1, 600, ranks=ranks, visits=failing, rng=0):
        pass


def differ(ranks, folder):
    """Begin a search without an rng; write what each rank is told to a file of its own: they share stderr."""
    data = datasets.load_digits()
    try:
        rso.trials(build("one_conv", data.image_shape, 10, rng=0), data, ranks=ranks)
    except ValueError as error:
        Path(folder, str(ranks.rank)).write_text(str(error))


def main(what, *arguments):
    """Do what the command line says."""
    ranks = mpi.start()
    if what == "search":
        results = searches(ranks)
        if ranks.leads:
            np.savez(arguments[0], **results)
    elif what == "fail":
        ranks.run(lambda: fail(ranks, *arguments))
    elif what == "differ":
        differ(ranks, *arguments)
    elif what == "threads":
        import numba

        ranks.share_cores()
        print(f"threads={numba.get_num_threads()}\n", end="", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
