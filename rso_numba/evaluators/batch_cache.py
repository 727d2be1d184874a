"""Mini-batches that come back: what is kept of them, and which changes of weights they have missed."""

from dataclasses import dataclass, field

import numpy as np

from ..kernels.cpu.memory import Arena


@dataclass(eq=False)
class Batch:
    """A mini-batch, and what is known about it in the layer that is being searched."""

    images: np.ndarray  # those of our share
    labels: np.ndarray
    share: object
    x: object = None  # that layer's input, an array, Deferred or Rematerialized; in the last layer by feature
    values: object = None  # Values of the nodes with a channel that changes, and of those that follow
    epilogues: dict = field(default_factory=dict)  # of the edges from nodes of which one channel changes
    weights: tuple | None = None  # that the value of the searched node belongs to, if it is not kept
    loss: float | None = None  # of the weights as they were
    sums: np.ndarray | None = None  # of that loss, by block
    loss_applied: int | None = None  # when so many entries of the log were applied
    padded_labels: np.ndarray | None = None  # in the last layer: -1 in lanes without image
    applied: int = 0  # how many entries of the log are in the values
    is_held: bool = False  # all this waits for the batch to come back


class BatchCache:
    """Mini-batches by key, copies of their arrays in bounded memory, and a log of the changes of weights.

    Parameters
    ----------
    memory : float
        Bytes that the arrays may take.

    Attributes
    ----------
    n_logged : int
        Length of the log. Its entries are output channel, input channel, row and column of a weight, and by
        how much it changed.
    """

    def __init__(self, memory):
        self.arena = Arena(memory)
        self.forget()

    def forget(self):
        """Begin anew, with nothing remembered."""
        self.batches = {}
        self.arena.forget()
        self.places, self.amounts = np.empty((256, 4), np.int64), np.empty(256, np.float32)
        self.n_logged = 0

    def get(self, key, images, labels, share):
        """Return the mini-batch with this key, or a new one, of which only the `Share` is kept."""
        batch = self.batches.get(key) or Batch(images[share.own], labels[share.own], share)
        if key is not None:
            self.batches[key] = batch
        return batch

    def log(self, place, amount):
        """Take note of a change of a weight."""
        if self.n_logged == len(self.amounts):
            self.places = np.concatenate([self.places, self.places])
            self.amounts = np.concatenate([self.amounts, self.amounts])
        self.places[self.n_logged], self.amounts[self.n_logged] = place, amount
        self.n_logged += 1

    def missed(self, batch):
        """Return the entries of the log that a mini-batch has missed: places (n, 4) and amounts (n,)."""
        missed = slice(batch.applied, self.n_logged)
        return self.places[missed], self.amounts[missed]
