"""Threads of the `cpu` backend: how they wait, who may use them, and what becomes of them after a fork.

Numba shares a `prange` loop among the threads of OpenMP, where there is one. GNU's OpenMP (Linux) lets a
thread that waits for the others turn in a loop for milliseconds before it sleeps. That is the fastest where
every thread has a core of its own; but as soon as another program runs, the one that turns takes the core
of the one that it waits for, and all takes two to ten times longer.
"""

import os
import sys
import threading

# Turns of the waiting loop: long enough for most gaps between two kernels, no longer. Measured on two cores,
# rounds of `one_conv`, batch 1024 (medians; how often a thread went to sleep, a round):
#
#     turns              idle machine          beside a busy process    two searches at once
#     300,000 (GNU's)    1.48 s      5 times   3.19 s  (2.2 times)      3.79 s  (2.6 times)
#     3,000              1.59 s  1,100 times   2.21 s  (1.4 times)      2.22 s  (1.4 times)
#
# (The first column varies by a tenth from set to set of runs. With 0 turns a thread sleeps 2,100 times.)
SPINS = 3000

_lost = []  # the threading layer, if this process was forked from one that had threads


def wait_politely(environment=os.environ):
    """Let threads sleep that wait, unless the user has said how. OpenMP reads it when it is loaded."""
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", str(SPINS))


def require_threads():
    """Raise an error, where Numba would end the process or hang, if a fork has left the threads behind.

    Raises
    ------
    RuntimeError
        If this process was forked (`os.fork`, or `multiprocessing` with "fork") after the threads had begun.
    """
    if _lost:
        raise RuntimeError(
            "this process was forked from one that had used the cpu backend, and a fork does not copy its "
            f"threads (layer {_lost[0]}): start processes by multiprocessing.get_context('spawn') or by "
            "joblib, or use backend='numpy' here, or use the cpu backend only after the fork")


def one_at_a_time(kernel):
    """Return a parallel kernel that any thread of Python may call while another one is running.

    OpenMP ("omp") and "tbb" can do this. With "workqueue", Numba would end the process: there the kernels of
    two trainings take turns, and each training comes to the same weights as alone.
    """
    import numba  # not by `import rso_numba`

    numba.get_num_threads()  # begins the threads: now their layer is known
    return _OneAtATime(kernel) if numba.threading_layer() == "workqueue" else kernel


class _OneAtATime:
    turn = threading.Lock()

    def __init__(self, kernel):
        self.kernel = kernel

    def __call__(self, *arguments):
        with self.turn:
            return self.kernel(*arguments)

    def __getattr__(self, name):  # such as `stats`
        return getattr(self.kernel, name)


def _note_fork():
    # in the child; Numba has begun its threads if it can say which layer they are of
    numba = sys.modules.get("numba")
    try:
        layer = numba and numba.threading_layer()
    except ValueError:
        return
    if layer and layer != "tbb":  # which begins new threads
        _lost.append(layer)


wait_politely()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
