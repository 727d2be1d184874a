"""A pass through a chain of layers.

Layers know nothing of each other. Most of what can be computed together is found while it happens, because a
BatchNorm, a ReLU and a mean pool are `Deferred` (see `activations.py`). Only how a convolution may round
depends on what follows it, and that is looked up here.
"""

from dataclasses import replace
from types import SimpleNamespace

from .. import plain
from .activations import add
from .convolution import conv2d_before_norm


def propagate(layers, x, run):
    """Return the output of a chain of layers; `run` is the `Pass`."""
    return _propagate(layers, x, run, [])


def _propagate(layers, x, run, behind):
    """Return the same of a chain, or a branch of a Residual, with layers of these kinds behind it."""
    kinds = [*(type(layer).__name__ for layer in layers), *behind]
    for i, layer in enumerate(layers):
        following = [kind for kind in kinds[i + 1 : i + 3] if kind != "AvgPool"]  # changes nothing in that
        kernels = BEFORE_NORM.get(kinds[i]) if following[:1] == ["BatchNorm"] else None
        x = layer.forward(x, replace(run, kernels=kernels(run)) if kernels else run)
    return x


# what a layer computes with if a BatchNorm is next; inside the branches of a Residual all is as it was
BEFORE_NORM = {
    "Conv2D": lambda run: SimpleNamespace(conv2d_forward=conv2d_before_norm),
    "Residual": lambda run: SimpleNamespace(
        add=add, propagate=lambda layers, x, _: _propagate(layers, x, run, ["BatchNorm"])),
}


def backpropagate(layers, dy, run):
    """Return the gradient with respect to the input of a chain, or None: see `plain.py`."""
    return plain.backpropagate(layers, dy, run)
