"""Mini-batches of the last layer on the GPU, and trials that one launch decides.

The kernels are in `kernels/cuda/last_layer.py`.
"""

import numpy as np

from ..kernels.cuda.device import LANES, empty, gpu_errors, launch, launch_blocks, to_device
from ..kernels.cuda.last_layer import MANY_ROWS, last_layer_kernel, slot_kernel


class Slots:
    """Room for mini-batches in the last layer.

    Parameters
    ----------
    n_in, n_classes : int
        Of the last layer.
    n_log : int
        How many changes can be remembered.
    memory : float
        Bytes that all slots may take; one slot there always is. While they grow, the former ones are
        there as well.
    """

    def __init__(self, n_in, n_classes, n_log, memory):
        self.n_rows, self.memory, self.n_log = (n_in + 1, n_classes), memory, n_log
        self.log, self.amounts = empty((n_log, 2), np.int64), empty(n_log, np.float32)
        self.length = to_device(np.zeros(1, np.int64))
        self.of, self.n_slots, self.width = {}, 0, 0
        self.forget()

    def forget(self):
        """Free all slots: what they hold is not needed any more, or belongs to weights that have changed."""
        self.of.clear()
        self.n_logged = 0
        with gpu_errors():
            self.length.copy_to_device(np.zeros(1, np.int64))

    def has_room(self, key, n_blocks):
        """Return whether a mini-batch is here or can be added before all are forgotten."""
        return key in self.of or (n_blocks * LANES <= self.width and len(self.of) < self._most(self.width))

    def _most(self, width):
        return max(1, int(self.memory // (4 * (sum(self.n_rows) + 1) * width)))

    def add(self, key, x, z, labels):
        """Take x (n_blocks, n_in, LANES), its logits z (n_blocks, n_classes, LANES) and labels (N,)."""
        if len(self.of) == self.n_slots or len(x) * LANES > self.width:
            self._grow(max(len(x) * LANES, self.width))
        slot = self.of[key] = len(self.of)
        n_tasks = (sum(self.n_rows) + 1) * (self.width // LANES)
        launch(slot_kernel, n_tasks, x, z, labels, slot, *self.arrays[:3], self.length, self.arrays[3])

    def _grow(self, width):
        """Make twice as many slots, of `width` images."""
        if width > self.width:
            self.of.clear()
        n_slots = min(max(1, 2 * len(self.of)), self._most(width))
        before, (n_features, n_classes) = self.arrays if self.of else (), self.n_rows
        self.arrays = [
            empty((n_slots, n_features, width), np.float32), empty((n_slots, n_classes, width), np.float32),
            empty((n_slots, width), np.int32), empty(n_slots, np.int64)]
        with gpu_errors():
            for old, new in zip(before, self.arrays, strict=False):
                new[: len(old)].copy_to_device(old)
        self.n_slots, self.width = n_slots, width

    def decide(self, where, deltas, decay, wants_vertex, weights, records):
        """Decide trials, one after the other: NumPy arrays `where` (n, WHERE) and deltas (n,)."""
        self.n_logged += len(where)
        launch_blocks(last_layer_kernel, 1, to_device(where), to_device(deltas), (decay, wants_vertex),
                      *self.arrays, self.log, self.amounts, self.length, weights, records, rows=MANY_ROWS)
