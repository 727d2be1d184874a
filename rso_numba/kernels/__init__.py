"""The arithmetic, once for every backend: `plain.py` (numpy) and `cpu.py` (Numba) are twins."""

BACKENDS = ("cpu", "numpy")


def backend(name):
    """Return the module of kernels called `name`, importing (and compiling) nothing else.

    Raises
    ------
    ValueError
        If there is no such backend.
    """
    if name == "cpu":
        from . import cpu

        return cpu
    if name == "numpy":
        from . import plain

        return plain
    raise ValueError(f"unknown backend {name!r}; known backends: {', '.join(BACKENDS)}")
