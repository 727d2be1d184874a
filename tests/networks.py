"""Small networks that tests share, and their logits by nested loops."""

import naive
import numpy as np

from rso_numba import models
from rso_numba.layers import (
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
from rso_numba.models import Network

IMAGE_SHAPE, N_CLASSES = (1, 6, 5), 3


def chains():
    """Return small versions of the models, and chains that no model has: layers by name."""
    return {
        "one_conv": [Conv2D(2), ReLU(), MaxPool(), Flatten(), Dense(3)],
        "two_conv": [Conv2D(2), ReLU(), MaxPool(), Conv2D(3), ReLU(), MaxPool(), Flatten(), Dense(3)],
        "original": [type(layer)(2) if isinstance(layer, Conv2D) else layer for layer in models.original(3)],
        "paper_mnist": [Conv2D(2, use_bias=False) if isinstance(layer, Conv2D) else layer
                        for layer in models.paper_mnist(3)],
        "two dense, 1x1, late BatchNorm": [
            Conv2D(2, size=1), ReLU(), BatchNorm(), Conv2D(2), Flatten(), Dense(4), ReLU(), Dense(3)],
        "wide input": [Conv2D(5), BatchNorm(), ReLU(), MaxPool(), Conv2D(2), ReLU(), Conv2D(2), Flatten(),
                       Dense(3)],
        "BatchNorm of features": [Conv2D(2), Flatten(), Dense(4), BatchNorm(), ReLU(), Dense(3)],
        "BatchNorm first": [BatchNorm(), Conv2D(2), ReLU(), Flatten(), Dense(3)],
        "flatten only": [Conv2D(2), Flatten(), Dense(3)],
    }


def residuals():
    """Return networks with skip connections: layers by name."""
    def conv(n, **arguments):
        return Conv2D(n, use_bias=False, **arguments)

    return {
        "identity": [
            conv(3), BatchNorm(), Residual([ReLU(), conv(3), BatchNorm(), ReLU(), conv(3)]), BatchNorm(),
            ReLU(), GlobalMaxPool(), Dense(3)],
        "projection": [
            Conv2D(2), BatchNorm(),
            Residual([ReLU(), Conv2D(4), BatchNorm(), ReLU(), conv(4)], [conv(4, size=1), BatchNorm()]),
            AvgPool(), BatchNorm(), ReLU(), GlobalMeanPool(), Dense(3)],
        "over a pool": [
            Conv2D(2), ReLU(), Residual([Conv2D(2), BatchNorm(), ReLU(), MaxPool()], [MaxPool()]),
            BatchNorm(), Flatten(), Dense(3)],
        "two at once": [
            Conv2D(2), BatchNorm(),
            Residual([ReLU(), Conv2D(2), Residual([BatchNorm(), ReLU(), Conv2D(2), BatchNorm()]), ReLU(),
                      Conv2D(2)]),
            AvgPool(), BatchNorm(), ReLU(), Flatten(), Dense(3)],
        "two branches of convolutions": [
            Conv2D(2), Residual([Conv2D(2)], [Conv2D(2, size=1), ReLU()]), BatchNorm(), ReLU(), Flatten(),
            Dense(3)],
        "logits are a sum": [
            Conv2D(2), ReLU(), GlobalMeanPool(), Residual([Dense(3)], [Dense(4), ReLU(), Dense(3)])],
        "paper_cifar10": narrow(models.paper_cifar10(3), 10),
        "late BatchNorms": [
            BatchNorm(), Residual([Conv2D(2), ReLU()], [Conv2D(2, size=1)]), ReLU(), BatchNorm(), MaxPool(),
            Residual([ReLU(), BatchNorm()]), Flatten(), Dense(3)],
    }


def narrow(layers, divisor, size=None):
    """Return layers of a model with so many times fewer filters, of another size if one is given."""
    def narrower(layer):
        if isinstance(layer, Residual):
            return Residual(*(narrow(branch, divisor, size) for branch in (layer.body, layer.shortcut)))
        if isinstance(layer, Conv2D):
            return Conv2D(layer.filters // divisor, size or layer.size, layer.use_bias)
        return layer

    return [narrower(layer) for layer in layers]


def small_network(name, rng=None, dtype=np.float32):
    """Return a network by the name of its layers; with a Generator, every parameter has values of its own."""
    network = Network([Standardize(), *(chains() | residuals())[name]], IMAGE_SHAPE, N_CLASSES, dtype=dtype)
    if rng is not None:  # biases, gamma and beta are all equal at first
        network.initialize("he", rng)
        network.weights += rng.normal(0, 0.1, network.n_weights).astype(dtype)
    return network


def naive_logits(network, images, batch_statistics):
    """Return logits by nested loops, from the weights of `network` and nothing else of it."""
    return _naive_chain(network.layers, network.state(), images, batch_statistics)


def _naive_chain(layers, state, x, batch_statistics):
    for layer in layers:
        own = {name.split(".")[1]: a for name, a in state.items() if name.split(".")[0] == layer.name}
        kind = type(layer).__name__
        if kind == "Residual":
            x = (_naive_chain(layer.body, state, x, batch_statistics)
                 + _naive_chain(layer.shortcut, state, x, batch_statistics))
        elif kind == "Standardize":
            x = naive.standardize(x, own["mean"], own["std"])
        elif kind == "Conv2D":
            x = naive.conv2d(x, own["weight"], own.get("bias"))
        elif kind == "Dense":
            x = naive.dense(x, own["weight"], own.get("bias"))
        elif kind == "BatchNorm":
            maps = x if x.ndim == 4 else x[:, :, None, None]
            statistics = own["running_mean"], own["running_variance"]
            if batch_statistics:
                statistics = naive.batch_statistics(maps)
            y = naive.batchnorm(maps, own["gamma"], own["beta"], *statistics, layer.epsilon)
            x = y.reshape(x.shape)
        else:
            x = {"ReLU": naive.relu, "MaxPool": naive.maxpool, "AvgPool": naive.avgpool,
                 "GlobalMaxPool": naive.global_max, "GlobalMeanPool": naive.global_mean,
                 "Flatten": naive.flatten}[kind](x)
    return x
