"""What several ranks bring: seconds for a weight, reductions for a weight, and what one reduction costs.

    python -m rso_numba.bench_ranks --threads 2
    mpiexec -n 2 python -m rso_numba.bench_ranks --threads 1

Small networks are timed in whole rounds, of others some trials of each parameter, which are extrapolated to a
round as in `bench.py`. What the figures mean: `evaluators/share.md`.
"""

import argparse
from time import perf_counter

import numba
import numpy as np

from . import datasets, mpi
from .bench import BLOCK, CONFIGURATIONS, Effort, first_n, job_of, timed_visits

CALLS = 2000  # of a reduction, to be timed


class CountingRanks(mpi.Ranks):
    """Ranks that count how often, and how much, they exchange."""

    calls = n_bytes = 0

    def gathered(self, rows, counts):
        """Return the rows of all ranks; see `Ranks`."""
        all_rows = super().gathered(rows, counts)
        self.calls += 1
        self.n_bytes += all_rows.nbytes
        return all_rows


def seconds_of_reduction(ranks, n_bytes):
    """Return the mean seconds in which all ranks have gathered n_bytes."""
    counts = [max(1, round(n_bytes / 8 / ranks.n_ranks))] * ranks.n_ranks
    rows = np.zeros(counts[0])
    for _ in range(CALLS // 10):
        ranks.gathered(rows, counts)
    begin = perf_counter()
    for _ in range(CALLS):
        ranks.gathered(rows, counts)
    return (perf_counter() - begin) / CALLS


def means_of_round(job, n, rounds, ranks):
    """Return mean seconds, reductions and bytes of a trial, from n weights of each parameter, or all."""
    def count():
        return np.array([ranks.calls, ranks.n_bytes] if ranks else [0, 0])

    timed = timed_visits(job, first_n(n), rounds=rounds, count=count, ranks=ranks).values()
    n_first = len(job.data.train_images) // job.batch_size
    n_weights = sum(visit.n_weights for visit in timed)
    seconds = sum(visit.total(n_first, BLOCK) for visit in timed)
    means = sum(visit.n_weights * np.mean(visit.counted, axis=0) for visit in timed)
    return seconds / n_weights, *(means / n_weights)


def main():
    """Measure what the command line says; rank 0 prints a line for each configuration."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = parser.add_argument
    option("--model", default="one_conv", choices=CONFIGURATIONS, help="network (default: %(default)s)")
    option("--data", default="mnist", choices=("mnist", "digits28"), help="data set (default: %(default)s)")
    option("--batch-size", type=int, nargs="+", help="images in a mini-batch, one number or several")
    option("--preset", help="settings of RSO (default: as `rso-numba bench`)")
    option("--threads", type=int, default=1, help="of each rank (default: %(default)s)")
    option("--weights", type=int, default=96,
           help="of each parameter that are timed, if not all are (default: %(default)s)")
    arguments, ranks = parser.parse_args(), mpi.start()
    ranks = CountingRanks(ranks.comm) if ranks else None
    numba.set_num_threads(arguments.threads)
    data = datasets.load(arguments.data)
    for batch_size in arguments.batch_size or [None]:
        job = job_of(arguments.model, data, 0, batch_size, arguments.preset)
        means_of_round(job.small(), 2, 1, ranks)  # the first calls
        effort = Effort()
        how = (None, effort.rounds) if job.model in effort.whole else (arguments.weights, 1)
        seconds, calls, n_bytes = means_of_round(job, *how, ranks)
        line = f"{job}, {arguments.threads} threads, "
        if ranks is None:
            line += f"1 rank: {1e6 * seconds:.1f} us"
        else:
            each = 1e6 * seconds_of_reduction(ranks, n_bytes / calls)
            line += (f"{ranks.n_ranks} ranks: {1e6 * seconds:.1f} us, {calls:.2f} reductions of "
                     f"{n_bytes / calls:,.0f} bytes, {each:.1f} us each in a loop")
        if ranks is None or ranks.leads:
            print(line, flush=True)


if __name__ == "__main__":
    main()
