"""A pass through a chain of layers: one after the other, as in `plain.py`."""

from .. import plain


def propagate(layers, x, run):
    """Return the output of a chain of layers; `run` is the `Pass`."""
    return plain.propagate(layers, x, run)


def backpropagate(layers, dy, run):
    """Return the gradient with respect to the input of a chain, or None: see `plain.py`."""
    return plain.backpropagate(layers, dy, run)
