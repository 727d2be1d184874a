"""Exact losses from what one weight changes, in NumPy: to be read. The reasons, with a picture: `delta.md`.

What travels through the network is a `Change`: which channels of a tensor differ from what they were, and by
how much. A weight changes one channel. Layers that treat every channel by itself keep it there; an addition
unites the channels that its terms change; a convolution or dense layer changes all of them, but costs only as
much as the channels that changed in its input.
"""

from dataclasses import dataclass

import numpy as np

from ..kernels import plain
from ..layers import AvgPool, BatchNorm, Conv2D, Dense, Flatten, Residual
from ..passes import Pass
from .blocks import Blocks, sums_by_block
from .graph import Graph


@dataclass
class Change:
    """Some channels of a tensor, and what was added to them.

    Parameters
    ----------
    channels : ndarray (n,), int
    amount : ndarray (N, n, H, W) or (N, n)
    is_direction : bool
        Whether amount is still step * u, with a u that does not depend on the step.
    """

    channels: np.ndarray
    amount: np.ndarray
    is_direction: bool = False


class PlainDeltaForward:
    """Losses of changed weights, by computing only what changes. NumPy.

    Parameters
    ----------
    network : Network
    momentum : float
        How far each mini-batch moves BatchNorm's running statistics.
    fixed_images : ndarray (N, C, H, W) or None
        If given, BatchNorms before the layer that is being searched use the statistics of these images.
    by_block : bool
        Whether `losses` leaves them by blocks of images, too, in `blocks`.

    Raises
    ------
    NoDelta
        If the network is none that delta evaluation can take: see `Graph`.
    """

    def __init__(self, network, momentum=0.0, fixed_images=None, by_block=False):
        self.by_block, self.blocks = by_block, None
        self.network, self.momentum, self.fixed_images = network, momentum, fixed_images
        self.graph, self.node, self.fixed = Graph(network), None, frozenset()

    def set_batch(self, images, labels, key=None):
        """Take a mini-batch: images (N, C, H, W) float32, labels (N,) int64; `key` is not needed."""
        self.images, self.labels, self.known, self.is_new = images, labels, None, True

    def losses(self, parameter, index, candidates):
        """Return the mean loss for each candidate value of `parameter.value[index]`, float64."""
        node = self.graph.node_of[parameter.layer]
        if self.fixed_images is not None and node is not self.node:
            self.network.calibrate(self.fixed_images, "numpy")
            self.node, self.fixed = node, self.graph.norms_before(parameter.layer)
            self.known = None
        if self.known is None or not np.array_equal(self.known, self.network.weights):
            self._remember()
        layer, before = self._leaf(parameter.layer), parameter.value[index]
        by_image = []
        for candidate in candidates:
            step = np.float32(candidate - before)
            if layer is self.network.layers[-1]:
                by_image.append(self._last_losses(layer, index, step))
            else:
                parameter.value[index] = candidate
                change = self._of_output(layer, parameter.name, index, step)
                change = self._from(self.network.layers, layer, change)
                parameter.value[index] = before
                logits = self.logits.copy()
                logits[:, change.channels] += change.amount
                by_image.append(plain.cross_entropy(logits, self.labels))
        if self.by_block:
            self.blocks = Blocks(np.array([sums_by_block(losses) for losses in by_image]), len(self.labels))
        return np.array([losses.sum(dtype=np.float64) / len(losses) for losses in by_image])

    def keep(self, parameter, index, value):
        """Store the winning value."""
        parameter.value[index] = value

    # ---- the network as it is ----

    def _remember(self):
        """Compute input and output of every layer, with the weights as they are."""
        momentum, self.is_new = self.momentum if self.is_new else 0.0, False
        self.run = Pass(plain, len(self.labels), True, self.fixed, momentum)
        self.x, self.y = {}, {}
        self.logits = self._forward(self.network.layers, plain.pack(self.images))
        self.known = self.network.weights.copy()

    def _forward(self, layers, x):
        for layer in layers:
            self.x[layer] = x
            if isinstance(layer, Residual):
                x = self._forward(layer.body, x) + self._forward(layer.shortcut, x)
            else:
                x = layer.forward(x, self.run)
            self.y[layer] = x
        return x

    def _leaf(self, name):
        return next(leaf for leaf in self.network.leaves if leaf.name == name)

    # ---- where a change begins ----

    def _of_output(self, layer, name, index, step):
        """Return the change of a layer's output when `step` is added to one of its weights."""
        channel = np.array(index[:1])
        if isinstance(layer, BatchNorm):  # gamma or beta: the output of a channel is computed anew
            return self._batchnorm(layer, Change(channel, np.zeros_like(self.x[layer][:, channel])))
        return Change(channel, step * self._direction(layer, name, index), is_direction=True)

    def _direction(self, layer, name, index):
        """Return u, what a weight of a linear layer multiplies: the output changes by step * u."""
        x, y = self.x[layer], self.y[layer]
        if name == "bias":
            return np.ones_like(y[:, :1])
        if isinstance(layer, Dense):
            return x[:, index[1], None]
        # the input channel, shifted by the place of the weight in its filter
        _, c, i, j = index
        height, width, pad = *x.shape[2:], layer.size // 2
        padded = np.pad(x[:, c], ((0, 0), (pad, pad), (pad, pad)))
        return padded[:, None, i : i + height, j : j + width]

    # ---- where it goes ----

    def _from(self, layers, layer, change):
        """Return the change of a chain's output when the output of a layer in it, or in a branch, changes."""
        for i, other in enumerate(layers):
            if other is layer:
                return self._through(layers[i + 1 :], change)
            if isinstance(other, Residual):
                for branch in (other.body, other.shortcut):
                    inside = self._from(branch, layer, change)
                    if inside is not None:  # the other branch does not change
                        return self._through(layers[i + 1 :], inside)
        return None

    def _through(self, layers, change):
        """Return the change of the output of a chain when its input changes."""
        for layer in layers:
            if isinstance(layer, Residual):
                change = united(self._through(layer.body, change), self._through(layer.shortcut, change))
            elif layer.is_linear:
                change = self._linear(layer, change)
            elif isinstance(layer, BatchNorm):
                change = self._batchnorm(layer, change)
            elif isinstance(layer, Flatten):
                pixels = self.x[layer][0, 0].size
                features = change.channels[:, None] * pixels + np.arange(pixels)
                change = Change(features.ravel(), change.amount.reshape(len(self.labels), -1))
            else:  # ReLU, pools: each channel by itself
                new = layer.forward(self.x[layer][:, change.channels] + change.amount, self.run)
                is_direction = change.is_direction and isinstance(layer, AvgPool)
                change = Change(change.channels, new - self.y[layer][:, change.channels], is_direction)
        return change

    def _linear(self, layer, change):
        """Return the change of a linear layer's output: W[:, channels] times that of these inputs."""
        weight = layer.weight[:, change.channels]
        forward = plain.conv2d_forward if isinstance(layer, Conv2D) else plain.dense_forward
        amount = forward(change.amount, weight, np.zeros(len(weight), np.float32))
        return Change(np.arange(len(weight)), amount)

    def _batchnorm(self, layer, change):
        """BatchNorm of the channels that change. Along a direction their statistics move in closed form.

        mean(z + d) = mean(z) + mean(d), var(z + d) = var(z) + 2 cov(z, d) + var(d). Here d is +-Delta u: the
        fast evaluators sum up over u once for both candidates.
        """
        channels, z, d = change.channels, self.x[layer][:, change.channels], change.amount
        mean, variance = (s[channels] for s in self.run.statistics[layer.name])
        if layer.name not in self.fixed and change.is_direction:
            mean_d, variance_d = plain.batchnorm_statistics(d, len(d))
            centred = plain.scale_shift(z, np.ones_like(mean), -mean)
            covariance, _ = plain.batchnorm_statistics(centred * d, len(d))
            mean, variance = mean + mean_d, np.maximum(variance + 2 * covariance + variance_d, 0)
        elif layer.name not in self.fixed:  # where much cancels, the sums would not be exact
            mean, variance = plain.batchnorm_statistics(z + d, len(d))
        new = plain.scale_shift(z + d, *layer.scale_and_shift(mean, variance, channels))
        return Change(channels, new - self.y[layer][:, channels])

    # ---- the last layer ----

    def _last_losses(self, layer, index, step):
        """Return the losses (N,) when a weight of the last layer changes: one logit moves by step * a_j.

        With R, the sum of exp(z_m) over the other classes, it is log(R + exp(z_k + step a_j)) - z_label.
        """
        k, a = index[0], self.x[layer][:, index[1]] if len(index) == 2 else 1
        logits = self.logits.astype(np.float64)
        logits[:, k] += step * a
        others = np.delete(logits, k, axis=1)
        log_rest = np.log(np.exp(others - others.max(axis=1, keepdims=True)).sum(axis=1)) + others.max(axis=1)
        labelled = logits[np.arange(len(logits)), self.labels]
        return np.logaddexp(log_rest, logits[:, k]) - labelled


def united(a, b):
    """Return the change of a sum whose terms change by a and by b."""
    channels = np.union1d(a.channels, b.channels)
    amount = np.zeros((len(a.amount), len(channels), *a.amount.shape[2:]), a.amount.dtype)
    for change in (a, b):
        amount[:, np.searchsorted(channels, change.channels)] += change.amount
    return Change(channels, amount)
