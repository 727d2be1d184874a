"""One whole forward pass for every candidate: slow, obvious, and the judge of faster ways."""

import numpy as np

from .. import kernels
from ..layers import Pass


class FullForward:
    """Losses by whole forward passes, with the mini-batch's own statistics in BatchNorm.

    Parameters
    ----------
    network : Network
    backend : {"cpu", "numpy", "cuda", "auto"}
    momentum : float
        How far each mini-batch moves BatchNorm's running statistics, in the pass of its first
        candidate.
    """

    def __init__(self, network, backend="cpu", momentum=0.0):
        self.network, self.kernels, self.momentum = network, kernels.backend(backend), momentum

    def set_batch(self, images, labels, key=None):
        """Take a mini-batch: images (N, C, H, W) float32, labels (N,) int64; `key` is not needed."""
        self.x, self.labels, self.is_new = self.kernels.pack(images), labels, True

    def losses(self, parameter, index, candidates):
        """Return the mean loss for each candidate value of `parameter.value[index]`, float64."""
        before = np.copy(parameter.value[index])
        losses = np.empty(len(candidates))
        try:
            for i, candidate in enumerate(candidates):
                parameter.value[index] = candidate
                momentum, self.is_new = self.momentum if self.is_new else 0.0, False
                run = Pass(self.kernels, len(self.labels), batch_statistics=True, momentum=momentum)
                losses[i] = self.kernels.mean_loss(self.network.propagate(self.x, run), self.labels)
        finally:
            parameter.value[index] = before  # also when interrupted
        return losses

    def keep(self, parameter, index, value):
        """Store the winning value."""
        parameter.value[index] = value
