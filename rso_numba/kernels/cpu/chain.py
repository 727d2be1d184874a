"""A pass through a chain of layers.

Layers know nothing of each other. Most of what can be computed together is found while it happens, because a
BatchNorm, a ReLU and a mean pool are `Deferred` (see `activations.py`). Only how a convolution may round
depends on what follows it, and that is looked up here.
"""

from dataclasses import replace
from types import SimpleNamespace

from .. import plain
from .convolution import conv2d_before_norm

BEFORE_NORM = SimpleNamespace(conv2d_forward=conv2d_before_norm)


def propagate(layers, x, run):
    """Return the output of a chain of layers; `run` is the `Pass`."""
    kinds = [type(layer).__name__ for layer in layers]
    for i, layer in enumerate(layers):
        behind = [kind for kind in kinds[i + 1 : i + 3] if kind != "AvgPool"]  # which changes nothing in that
        before_norm = kinds[i] == "Conv2D" and behind[:1] == ["BatchNorm"]
        x = layer.forward(x, replace(run, kernels=BEFORE_NORM) if before_norm else run)
    return x


def backpropagate(layers, dy, run):
    """Return the gradient with respect to the input of a chain, or None: see `plain.py`."""
    return plain.backpropagate(layers, dy, run)
