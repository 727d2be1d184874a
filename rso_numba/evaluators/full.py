"""One whole forward pass for every candidate: slow, obvious, and what faster ways are compared with."""

import numpy as np

from .. import kernels
from ..passes import Pass
from .blocks import Blocks, sums_by_block
from .graph import Graph, NoDelta


class FullForward:
    """Losses by whole forward passes, with the mini-batch's own statistics in BatchNorm.

    Parameters
    ----------
    network : Network
    backend : {"cpu", "numpy", "cuda", "auto"}
    momentum : float
        How far each mini-batch moves BatchNorm's running statistics, in the pass of its first
        candidate.
    fixed_images : ndarray (N, C, H, W) or None
        If given, BatchNorms before the layer that is being searched use the statistics of these images.
    by_block : bool
        Whether `losses` leaves them by blocks of images, too, in `blocks`.
    """

    def __init__(self, network, backend="cpu", momentum=0.0, fixed_images=None, by_block=False):
        self.by_block, self.blocks = by_block, None
        self.network, self.kernels, self.momentum = network, kernels.backend(backend), momentum
        self.backend, self.fixed_images, self.fixed = backend, fixed_images, frozenset()
        self.graph = self.node = None
        if fixed_images is not None:
            try:
                self.graph = Graph(network)
            except NoDelta as reason:
                raise ValueError(f"what stands before a layer is not known, because {reason}; use "
                                 "search_statistics='batch'") from reason

    def set_batch(self, images, labels, key=None):
        """Take a mini-batch: images (N, C, H, W) float32, labels (N,) int64; `key` is not needed."""
        self.x, self.labels, self.is_new = self.kernels.pack(images), labels, True

    def losses(self, parameter, index, candidates):
        """Return the mean loss for each candidate value of `parameter.value[index]`, float64."""
        self.fix_statistics(parameter.layer)
        before = np.copy(parameter.value[index])
        losses, sums = np.empty(len(candidates)), []
        try:
            for i, candidate in enumerate(candidates):
                parameter.value[index] = candidate
                momentum, self.is_new = self.momentum if self.is_new else 0.0, False
                run = Pass(self.kernels, len(self.labels), True, self.fixed, momentum)
                logits = self.network.propagate(self.x, run)
                losses[i] = self.kernels.mean_loss(logits, self.labels)
                if self.by_block:
                    sums.append(sums_by_block(self.kernels.cross_entropy(logits, self.labels)))
        finally:
            parameter.value[index] = before  # also when interrupted
        if self.by_block:
            self.blocks = Blocks(np.array(sums), len(self.labels))
        return losses

    def fix_statistics(self, layer):
        """Compute the fixed statistics, if there are any, when the search of a layer begins."""
        if self.graph and layer in self.graph.node_of and self.graph.node_of[layer] is not self.node:
            self.network.calibrate(self.fixed_images, self.backend)
            self.node, self.fixed = self.graph.node_of[layer], self.graph.norms_before(layer)

    def keep(self, parameter, index, value):
        """Store the winning value."""
        parameter.value[index] = value
