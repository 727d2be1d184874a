"""How sure a loss is: losses added up by blocks of images tell the standard error of an improvement.

The images of a mini-batch are a sample. What a step changes differs from image to image, so its mean over
the sample has an error. The losses before and after the step are of the same images: what varies most from
image to image, how difficult it is, is in both and cancels. Kernels add up losses by blocks anyway, and
blocks are samples, too: how much their sums differ says how much the mean of all may be off.
"""

from dataclasses import dataclass

import numpy as np

from ..kernels import formulas

BLOCK_IMAGES = 16  # as many as the CPU's kernels take at once


@dataclass(frozen=True)
class Blocks:
    """Losses of w, w + Delta and w - Delta, by blocks of images.

    Parameters
    ----------
    sums : ndarray (3, n_blocks), float64
        Of the losses of BLOCK_IMAGES images each, in nats; the last block may have fewer.
    n_images : int
    """

    sums: np.ndarray
    n_images: int

    def gain(self, step):
        """Return by how much a step lowers the mean loss, and the standard error of that.

        Parameters
        ----------
        step : float
            As a multiple of Delta. Every block has its own parabola through its three losses.

        Returns
        -------
        gain, error : float
            In nats. The error is infinite if there is only one block, which tells nothing about others.
        """
        gains = -formulas.parabola(*self.sums, step)  # (n_blocks,)
        n_blocks, gain = len(gains), gains.sum() / self.n_images
        if n_blocks == 1:
            return gain, np.inf
        sizes = np.full(n_blocks, BLOCK_IMAGES)
        sizes[-1] = self.n_images - BLOCK_IMAGES * (n_blocks - 1)
        deviations = gains - sizes * gain
        return gain, np.sqrt(deviations @ deviations * n_blocks / (n_blocks - 1)) / self.n_images


def sums_by_block(losses):
    """Return the sums of the losses (N,) of BLOCK_IMAGES images each, float64."""
    return np.add.reduceat(losses, range(0, len(losses), BLOCK_IMAGES), dtype=np.float64)
