"""The models by name: lists of layers, and `build`, which makes networks of them."""

from . import presets
from .arguments import whole_number
from .layers import (
    AvgPool,
    BatchNorm,
    Conv2D,
    Dense,
    Flatten,
    GlobalMaxPool,
    GlobalMeanPool,
    MaxPool,
    ReLU,
    Standardize,
)
from .network import Network


def one_conv(n_classes):
    """Return the layers of the notebook's OneConv: 7,890 weights on 28x28 images."""
    return [Conv2D(4), ReLU(), MaxPool(), Flatten(), Dense(n_classes)]


def two_conv(n_classes):
    """Return the layers of the notebook's TwoConv."""
    return [
        *(Conv2D(16), ReLU(), MaxPool()),
        *(Conv2D(16), ReLU(), MaxPool()),
        *(Flatten(), Dense(n_classes)),
    ]


def original(n_classes):
    """Return the layers of the notebook's reading of the paper's network, ending in logits."""

    def block():
        return Conv2D(16), BatchNorm(), ReLU()

    return [
        *(*block(), *block(), AvgPool()),
        *(*block(), *block(), AvgPool()),
        *(*block(), *block(), GlobalMeanPool()),
        Dense(n_classes),
    ]


def paper_mnist(n_classes):
    """Return the layers of the authors' network for MNIST: 12,016 weights, no biases.

    A block is conv, average pool (the second and fourth), BatchNorm, ReLU (not the last).
    """

    def conv():
        return Conv2D(16, use_bias=False)

    return [
        *(conv(), BatchNorm(), ReLU()),
        *(conv(), AvgPool(), BatchNorm(), ReLU()),
        *(conv(), BatchNorm(), ReLU()),
        *(conv(), AvgPool(), BatchNorm(), ReLU()),
        *(conv(), BatchNorm(), ReLU()),
        *(conv(), BatchNorm(), GlobalMaxPool()),
        Dense(n_classes, use_bias=False),
    ]


MODELS = {model.__name__: model for model in (one_conv, two_conv, original, paper_mnist)}


def build(name, image_shape=(1, 28, 28), n_classes=10, rng=None, preset="paper"):
    """Return a network with fresh weights.

    Parameters
    ----------
    name : {"one_conv", "two_conv", "original", "paper_mnist"}
    image_shape : tuple of int
        (C, H, W).
    n_classes : int
    rng : None, int or Generator
        Draws the initial weights.
    preset : str or Preset
        Its `scaling` is the first layer, its `init` draws the weights, its `epsilon` is BatchNorm's.

    Returns
    -------
    Network

    Raises
    ------
    ValueError, TypeError
        If the name is unknown, a number is out of range, or the images are too small for the model.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known models: {', '.join(MODELS)}")
    settings = presets.resolve(preset)
    layers = [Standardize(settings.scaling), *MODELS[name](whole_number(n_classes, "n_classes"))]
    network = Network(layers, image_shape, n_classes, name)
    for leaf in network.leaves:
        if isinstance(leaf, BatchNorm):
            leaf.epsilon = settings.epsilon
    network.initialize(settings.init, rng)
    return network
