"""How kernels are compiled: three decorators, so that the policy stands in one place.

Compiled code is cached on disk, where Numba looks for it under the name of the function. Numba notices an
edit of the file that defines the function, but not of the files it takes formulas from; so the name under
which we cache carries a digest of every file below this folder, and any edit here compiles anew.
"""

import contextlib
import functools
import hashlib
import pathlib

import numba
from numba import types

from . import threads

FOLDER = pathlib.Path(__file__).parent


def digest(folder):
    """Return a short text that changes with every edit of a Python file in `folder` or below."""
    sources = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))
    return hashlib.sha256(sources).hexdigest()[:12]


DIGEST = digest(FOLDER)

# A product and a sum may become one instruction (contract), the compiler may choose the order of a sum
# (reassoc), and 0 needs no sign (nsz). Flags that assume no NaN or infinity stay off: a loss must show them.
FASTMATH = {"contract", "reassoc", "nsz"}


def formula(function):
    """Compile scalar maths, to be inlined where it is called."""
    return numba.njit(inline="always", fastmath=FASTMATH)(function)


def kernel(function):
    """Compile a function that works in one thread, usually on one block of images.

    A kernel that calls another contains a copy of it, but a process that has compiled both may run the other
    itself. The compiler may have ordered a sum differently in the two: a loop that adds up numbers and is
    called from several kernels is better a `formula`, which gives the same bits in every process.

    Loops are better than an assignment to a slice, for which Numba also compiles how an error prints the
    shapes: in two kernels that was a tenth of all compiling.

    Numba counts who uses an array, in a count that all threads share. A kernel that makes no array need not
    count, which leaves out two calls wherever it passes one to a formula with branches.
    """
    return _compile(function, parallel=False, counts=False)


def allocating_kernel(function):
    """Compile the same, for a function that makes an array, or calls one that does."""
    return _compile(function, parallel=False)


def parallel_kernel(function):
    """Compile a function whose `prange` loop is shared among the threads."""
    return threads.one_at_a_time(_compile(function, parallel=True))


def _compile(function, parallel, counts=True):
    options = dict(fastmath=FASTMATH, error_model="numpy", nogil=True, parallel=parallel, _nrt=counts)
    name = function.__qualname__
    function.__qualname__ = f"{name}_{'parallel' if parallel else 'serial'}_{DIGEST}"  # names the cache files
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder can be written: compile in each process
        compiled = numba.njit(**options)(function)
    finally:
        function.__qualname__ = name
    if hasattr(compiled, "stats"):  # with NUMBA_DISABLE_JIT=1 it is the plain Python function
        _remove_stale(compiled.stats.cache_path)
        _treat_integers_alike(compiled)
    return compiled


def _treat_integers_alike(compiled):
    """Compile a kernel once for all kernels that call it, whichever integers they pass.

    Numba would compile it once more for a literal 0, for a literal 1, and for an index of `prange`, which is
    unsigned: a fifth of all compilations.
    """
    call_template = compiled.get_call_template

    def of_any_integer(arguments, keywords):
        arguments = map(types.unliteral, arguments)
        return call_template(tuple(types.int64 if isinstance(kind, types.Integer) else kind
                                   for kind in arguments), keywords)

    compiled.get_call_template = of_any_integer


@functools.cache
def _remove_stale(folder):
    """Delete what was cached before the last edit; `folder` is None without a cache."""
    for path in pathlib.Path(folder).glob("*.nb[ic]") if folder else ():
        if DIGEST not in path.name:
            with contextlib.suppress(OSError):  # gone already, or not ours to delete: it does no harm
                path.unlink()
