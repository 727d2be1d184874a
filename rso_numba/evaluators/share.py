"""What is evaluated here of a mini-batch: all of it, unless several ranks share it (`mpi.py`).

Kernels add up numbers over the images of a block. Here these sums become losses and statistics, so this is
where evaluation on the CPU meets other ranks, and the only place. A share is a run of whole blocks, and the
sums of all ranks are gathered and then added in their order: to the last bit as in one process.
"""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np

from ..kernels import cpu
from ..kernels.cpu.activations import computed
from ..kernels.cpu.lanes import LANES
from ..kernels.cpu.last_layer import CHUNK_IMAGES
from ..kernels.cpu.norms import all_statistics, mean_and_variance
from ..kernels.cpu.softmax import loss_sums
from .full import FullForward


class Share:
    """The images of a mini-batch that are evaluated here.

    Parameters
    ----------
    n_images : int
        Of the whole mini-batch.
    ranks : Ranks or None
        Those who share it.
    unit : int
        Images that stay together, a multiple of LANES.

    Attributes
    ----------
    own : slice
        Those of this rank. One that is left without images evaluates the first ones, to have something to do
        the same with, and its sums do not count.
    n_own : int
    """

    def __init__(self, n_images, ranks=None, unit=LANES):
        self.n_images, self.ranks = n_images, ranks
        self.own, self.n_own = slice(0, n_images), n_images
        if ranks is not None:
            n, n_units = ranks.n_ranks, _n_parts(n_images, unit)
            starts = [min(rank * n_units // n * unit, n_images) for rank in range(n + 1)]
            self.sizes = [stop - start for start, stop in zip(starts[:-1], starts[1:], strict=True)]
            self.own = slice(*starts[ranks.rank : ranks.rank + 2] if self.sizes[ranks.rank] else (0, LANES))
            self.n_own = len(range(n_images)[self.own])

    @property
    def times_larger(self):
        """How many times as many blocks as this share the mini-batch has, a Fraction."""
        return Fraction(_n_parts(self.n_images, LANES), _n_parts(self.n_own, LANES))

    def of_all(self, sums, axis=0, images=LANES):
        """Return the sums of all ranks' blocks, given those of our blocks; `images` are those of a sum."""
        if self.ranks is None:
            return sums
        counts = [_n_parts(size, images) for size in self.sizes]
        rows = np.moveaxis(sums, axis, 0)[: counts[self.ranks.rank]]
        return np.ascontiguousarray(np.moveaxis(self.ranks.gathered(rows, counts), 0, axis))

    def statistics(self, z):
        """Return mean and variance of each channel over all images, given z of ours."""
        z = computed(z)
        return self.mean_and_variance(all_statistics(z, self.n_own), z)

    def mean_and_variance(self, statistics, z):
        """Return the same from the statistics of our blocks, (2, n_blocks, C)."""
        return mean_and_variance(self.of_all(statistics, axis=1), self.n_images, z)

    def moments(self, sums, direction):
        """Return mean(direction), covariance(z, direction), variance(direction): see `channel_direction`."""
        n = self.n_images * direction.shape[2] * direction.shape[3]
        mean_d, mean_zd, mean_dd = self.of_all(sums, axis=1).sum(axis=1) / n
        return mean_d, mean_zd, mean_dd - mean_d**2

    def mean_losses(self, sums):
        """Return the mean losses of several networks, from the sums of our blocks of each, (n, n_blocks)."""
        return [float(of_blocks.sum()) / self.n_images for of_blocks in self.of_all(np.array(sums), axis=1)]

    def last_layer_losses(self, sums):
        """Return the mean losses (n_steps,) from the sums of our chunks: see `kernels/cpu/last_layer.py`."""
        return self.of_all(sums, images=CHUNK_IMAGES).sum(axis=0) / self.n_images


def _n_parts(n_images, size):
    return -(-n_images // size)


class SharedFullForward(FullForward):
    """Losses by whole forward passes, each rank with its share of the mini-batch. CPU.

    Parameters
    ----------
    network, momentum, fixed_images
        See `FullForward`.
    ranks : Ranks
    """

    def __init__(self, network, momentum, fixed_images, ranks):
        super().__init__(network, "cpu", momentum, fixed_images)
        self.ranks = ranks

    def set_batch(self, images, labels, key=None):
        """Take a mini-batch, the same on all ranks."""
        share = Share(len(labels), self.ranks)
        self.kernels = SimpleNamespace(**vars(cpu))
        self.kernels.batchnorm_statistics = lambda x, n_images: share.statistics(x)
        self.kernels.mean_loss = lambda logits, labels: share.mean_losses([loss_sums(logits, labels)])[0]
        super().set_batch(images[share.own], labels[share.own])
