"""The peer in the benchmark: the same networks, search and SGD in PyTorch, an optional package."""

import os
from functools import cache
from time import perf_counter

import numba
import numpy as np

from .evaluators import FullForward
from .kernels.threads import SPINS
from .layers import Layer, Residual

LEARNING_RATE = 0.01


def torch_or_none():
    """Return PyTorch, if it is installed. Its threads wait as PyTorch lets them."""
    numba.get_num_threads()  # loads Numba's, for which `threads` has said how they wait
    if os.environ.get("GOMP_SPINCOUNT") == str(SPINS):
        del os.environ["GOMP_SPINCOUNT"]
    try:
        import torch
    except ImportError:
        return None
    return torch


@cache
def torch_layers():
    """Return PyTorch's forward of each kind of layer: functions of (layer, weights by name, x)."""
    import torch
    from torch.nn import functional as f

    def standardize(layer, w, x):
        mean, std = (torch.from_numpy(a).reshape(-1, 1, 1) for a in (layer.mean, layer.std))
        return x if layer.scaling == "none" else (x - mean) / std

    return {
        "Standardize": standardize,
        "Conv2D": lambda layer, w, x: f.conv2d(x, w["weight"], w.get("bias"), padding=layer.size // 2),
        "Dense": lambda layer, w, x: f.linear(x, w["weight"], w.get("bias")),
        "BatchNorm": lambda layer, w, x, *fixed: f.batch_norm(
            x, *(map(torch.from_numpy, fixed) if fixed else (None, None)), w["gamma"], w["beta"],
            training=not fixed, eps=layer.epsilon),
        "ReLU": lambda layer, w, x: f.relu(x),
        "MaxPool": lambda layer, w, x: f.max_pool2d(x, 2),
        "AvgPool": lambda layer, w, x: f.avg_pool2d(x, 2),
        "GlobalMaxPool": lambda layer, w, x: x.amax((2, 3)),
        "GlobalMeanPool": lambda layer, w, x: x.mean((2, 3)),
        "Flatten": lambda layer, w, x: x.flatten(1),
    }


def steps(layers):
    """Yield what a network does, one after the other: its layers, and what a Residual does with a stack."""
    for layer in layers:
        if isinstance(layer, Residual):
            yield from ("copy", *steps(layer.body), "swap", *steps(layer.shortcut), "add")
        else:
            yield layer


class TorchForward(FullForward):
    """FullForward by PyTorch, on the same weights in memory: a change of one changes both.

    With `cached`, a pass starts at the layer of the weight, as in the authors' code; making the input of
    that layer takes `not_counted` seconds in all.
    """

    def __init__(self, network, fixed_images=None, cached=False):
        super().__init__(network, fixed_images=fixed_images)
        self.torch, self.cached, self.not_counted = torch_or_none(), cached, 0.0
        self.steps = [
            (step, {name: self.torch.from_numpy(getattr(step, name)) for name in step.parameter_names}
             if isinstance(step, Layer) else None)
            for step in steps(network.layers)]
        self.names = [getattr(step, "name", step) for step, _ in self.steps]

    def set_batch(self, images, labels, key=None):
        self.x, self.labels = map(self.torch.from_numpy, (np.asarray(images), labels))

    def propagate(self, stack, start=0, stop=None):
        """Return what the steps from `start` to before `stop` make of a stack: x, above what waits for it."""
        for step, weights in self.steps[start:stop]:
            *below, x = stack
            if step == "copy":
                stack = *stack, x
            elif step == "swap":
                stack = *below[:-1], x, below[-1]
            elif step == "add":
                stack = *below[:-1], below[-1] + x
            else:
                fixed = (step.running_mean, step.running_variance) if step.name in self.fixed else ()
                stack = *below, torch_layers()[type(step).__name__](step, weights, x, *fixed)
        return stack

    def losses(self, parameter, index, candidates):
        begin = perf_counter()
        self.fix_statistics(parameter.layer)
        self.not_counted += perf_counter() - begin
        before, losses = parameter.value[index].copy(), np.empty(len(candidates))
        start = self.names.index(parameter.layer) if self.cached else 0
        with self.torch.no_grad():
            begin = perf_counter()
            stack = self.propagate((self.x,), stop=start)
            self.not_counted += perf_counter() - begin
            for i, candidate in enumerate(candidates):
                parameter.value[index] = candidate
                (logits,) = self.propagate(stack, start)
                losses[i] = self.torch.nn.functional.cross_entropy(logits, self.labels).item()
        parameter.value[index] = before
        return losses


def torch_sgd(network, data, batch_size, rng):
    """Do what one epoch of `sgd.train` does, by PyTorch's autograd; return the seconds."""
    twin, torch, rng = TorchForward(network), torch_or_none(), np.random.default_rng(rng)
    network.fit_scaling(data.train_images)
    weights = [w.requires_grad_() for _, own in twin.steps if own for w in own.values()]
    order = rng.permutation(len(data.train_images))
    begin = perf_counter()
    order = rng.permutation(order)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        twin.set_batch(data.train_images[chosen], data.train_labels[chosen])
        (logits,) = twin.propagate((twin.x,))
        torch.nn.functional.cross_entropy(logits, twin.labels).backward()
        with torch.no_grad():
            for w in weights:
                w -= LEARNING_RATE * w.grad
                w.grad = None
    return perf_counter() - begin
