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
    Residual,
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


def paper_cifar10(n_classes):
    """Return the layers of the authors' residual network for CIFAR-10: 57,104 weights, no biases.

    Ten layers: nine 3x3 convolutions, and a dense one. A BatchNorm behind convolution 1, 3, 5 or 7 is added,
    before its ReLU, to the output of the next convolution but one, before the pool and BatchNorm of that.
    """

    def conv(n_filters, size=3):
        return Conv2D(n_filters, size, use_bias=False)

    def two_convs(n_filters, shortcut=None):
        return Residual([ReLU(), conv(n_filters), BatchNorm(), ReLU(), conv(n_filters)], shortcut)

    return [
        *(conv(16), BatchNorm()),
        *(two_convs(16), AvgPool(), BatchNorm()),
        *(two_convs(32, [conv(32, size=1), BatchNorm()]), AvgPool(), BatchNorm()),
        *(two_convs(32), BatchNorm()),
        *(two_convs(32), BatchNorm(), GlobalMaxPool()),
        Dense(n_classes, use_bias=False),
    ]


MODELS = {model.__name__: model for model in (one_conv, two_conv, original, paper_mnist, paper_cifar10)}


def build(name, image_shape=(1, 28, 28), n_classes=10, rng=None, preset="paper"):
    """Return a network with fresh weights.

    Parameters
    ----------
    name : {"one_conv", "two_conv", "original", "paper_mnist", "paper_cifar10"}
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
