"""Several processes that search one network together, over MPI: each evaluates its share of every mini-batch.

A loss is a sum over images, and no draw of a search depends on a loss. So all processes, called *ranks*, have
the same network, the same data and the same random numbers, and run the same loop (`rso.py`). Only their
evaluators differ: each takes its share of the images (`evaluators/share.py`). Ranks exchange the sums of
their blocks of images, and each adds all of them in the same order. So all find the same losses, to the last
bit, and keep the same weights. What this costs, and when it pays: `evaluators/share.md`.
"""

import io
import os
import signal
import sys
import time
import traceback
import zlib
from contextlib import ExitStack, redirect_stderr, redirect_stdout

import numpy as np

# where mpiexec tells the processes how many they are: that of Open MPI; that of MPICH, Intel and Microsoft
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
GRACE = 1.0  # seconds in which rank 0 may report an error that all ranks have found, and end all
PASS_ON = 0.3  # seconds in which mpiexec passes on what was printed: it loses some when processes are aborted


class MpiError(RuntimeError):
    """The processes that were started together cannot work together."""


class Ranks:
    """Processes that search one network together.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        Such as `MPI.COMM_WORLD`.

    Attributes
    ----------
    rank : int
        Number of this process, from 0.
    n_ranks : int
    """

    def __init__(self, comm):
        self.comm, self.rank, self.n_ranks = comm, comm.Get_rank(), comm.Get_size()

    @property
    def leads(self):
        """Whether this is rank 0, the one that prints and writes files."""
        return self.rank == 0

    def gathered(self, rows, counts):
        """Return the rows of all ranks, in the order of the ranks; every rank gets the same.

        Parameters
        ----------
        rows : ndarray (counts[rank], ...), float64
        counts : list of int
            How many rows each rank has.
        """
        all_rows = np.empty((sum(counts), *rows.shape[1:]))
        size = all_rows[:1].size
        self.comm.Allgatherv(np.ascontiguousarray(rows), (all_rows, [count * size for count in counts]))
        return all_rows

    def require_same(self, things):
        """Raise a ValueError on every rank if one of them has another array or setting.

        Parameters
        ----------
        things : dict
            By name: arrays, or what its `repr` tells all about.
        """
        data = [np.ascontiguousarray(thing) if isinstance(thing, np.ndarray) else repr(thing).encode()
                for thing in things.values()]
        own = np.array([[zlib.crc32(thing) for thing in data]], np.float64)
        found = self.gathered(own, [1] * self.n_ranks)
        for name, numbers in zip(things, found.T, strict=True):
            others = np.flatnonzero(numbers != numbers[0])
            if len(others):
                raise ValueError(f"rank {others[0]} has not the {name} of rank 0; expected the same network, "
                                 "data, settings and rng on all ranks (rng=0, not None)")

    def share_cores(self):
        """Give this process its share of the machine's cores, unless NUMBA_NUM_THREADS says how many."""
        if "NUMBA_NUM_THREADS" in os.environ:
            return
        import numba
        from mpi4py import MPI

        node = self.comm.Split_type(MPI.COMM_TYPE_SHARED)  # the ranks on this machine
        # a launcher may have bound each rank to cores of its own, or to some that it shares
        own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count()))
        cores = set().union(*node.allgather(own))
        threads = min(len(own), len(cores) // node.Get_size())
        numba.set_num_threads(max(1, min(threads, numba.config.NUMBA_NUM_THREADS)))

    def run(self, command):
        """Return the exit status of a command that all ranks run; an error on one of them ends all.

        Only rank 0 is heard, unless another one fails alone. Ctrl-C is left to rank 0.
        """
        said = io.StringIO()
        with ExitStack() as stack:
            if not self.leads:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                stack.enter_context(redirect_stdout(said))
                stack.enter_context(redirect_stderr(said))
            try:
                status = command()
            except SystemExit as end:  # of the parser of arguments
                status = end.code
            except BaseException:
                traceback.print_exc()
                status = 1
        if status:
            if not self.leads:
                time.sleep(GRACE)
                lines = said.getvalue().splitlines()
                sys.stderr.write("".join(f"rank {self.rank}: {line}\n" for line in lines))
            sys.stdout.flush()
            sys.stderr.flush()
            time.sleep(PASS_ON)
            self.comm.Abort(status)
        return status


def start(environment=os.environ):
    """Return the Ranks that `mpiexec` has started, or None if this process works alone.

    mpi4py is imported only if a launcher's environment variable (`SIZES`) tells of more than one process.

    Raises
    ------
    MpiError
        If mpi4py or its MPI library is missing, or it is the library of another `mpiexec`.
    """
    n_started = max(int(environment.get(name, 1)) for name in SIZES)
    if n_started == 1:
        return None
    try:
        import mpi4py

        mpi4py.rc.thread_level = "funneled"  # threads compute, only one talks to other processes
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise MpiError(f"mpiexec has started {n_started} processes, which need mpi4py and its MPI library to "
                       f"work together: pip install 'rso_numba[mpi]' ({error})") from error
    ranks = Ranks(MPI.COMM_WORLD)
    if ranks.n_ranks != n_started:
        library = MPI.Get_library_version().split("\n")[0].strip("\0 ")
        raise MpiError(f"mpiexec has started {n_started} processes, of which mpi4py sees {ranks.n_ranks}: "
                       f"its MPI is another, {library}; use the mpiexec of that one")
    return ranks
