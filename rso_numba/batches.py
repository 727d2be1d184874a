"""Where the mini-batch of a trial comes from: three policies, which differ in `begin` and `draw`.

`draw` returns images, labels and a key: the same key means the same images, so that an evaluator may
use again what it computed for them; None means images that will not come again. Those that may come again
are `LazyImages`. `batch_size` may be changed before a visit begins.
"""

import numpy as np


def size_of_round(batch_size, growth, c, rounds, n_images):
    """Return how many images a mini-batch has in round c = 1..rounds, see `Preset.growth`."""
    progress = (c - 1) / max(rounds - 1, 1)
    return min(max(1, round(batch_size * growth**progress)), n_images)


class LazyImages:
    """Images of a mini-batch, copied from the training set when `np.asarray` makes an array of them.

    An evaluator that remembers a mini-batch never asks for its images again: a copy of all the shuffled
    training set would be as large as the data, for nothing.

    Parameters
    ----------
    images : ndarray (N, C, H, W), float32
        The training set.
    chosen : ndarray (n,), int
        Which of them, in order.
    """

    def __init__(self, images, chosen):
        self.images, self.chosen = images, chosen

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, part):
        return LazyImages(self.images, self.chosen[part])

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.images[self.chosen], dtype)


class Batches:
    """What the policies share: how long a mini-batch is used.

    Parameters
    ----------
    data : Dataset
    batch_size : int
    rng : Generator
    hold : {"weight", "filter"}
        See `Preset.hold`.
    """

    def __init__(self, data, batch_size, rng, hold="weight"):
        self.data, self.batch_size, self.rng, self.hold = data, batch_size, rng, hold

    def begin(self, parameter):
        """Tell the policy that the visit of `parameter` begins."""
        self.held_for = None  # output channel that the mini-batch is held for

    def state(self):
        """Return what `set_state` needs at the beginning of a visit, a dict of arrays."""
        return {}

    def set_state(self, state):
        """Go on from a state of the same batches, with which the next visit begins."""

    def arrange(self, order):
        """Bring the training set into an order, from which `part` takes mini-batches."""
        self.order, self.labels = order, self.data.train_labels[order]

    def part(self, i):
        """Return images, labels and place of mini-batch i; the last one may be short."""
        own = slice(i * self.batch_size, (i + 1) * self.batch_size)
        images = LazyImages(self.data.train_images, self.order[own])
        return images, self.labels[own], (own.start, own.stop)

    def is_due(self, index):
        """Return whether the trial of the weight at `index` needs a mini-batch of its own."""
        if self.hold == "filter" and index[0] == self.held_for:
            return False
        self.held_for = index[0] if self.hold == "filter" else None
        return True


class Fresh(Batches):
    """Algorithm 1: a random sample of the training set, drawn anew for every trial."""

    def draw(self):
        """Return images, labels and key of the next mini-batch."""
        images, labels = self.data.train_images, self.data.train_labels
        chosen = self.rng.choice(len(images), self.batch_size, replace=False, shuffle=False)
        return images[chosen], labels[chosen], None


class Slices(Batches):
    """The authors' code: consecutive slices of a shuffled set, cycled.

    The set is shuffled when the visit of a layer's weights begins; gamma and beta of the layer
    start again at its first slice. Images that fill no whole slice wait for the next shuffle.
    """

    def __init__(self, data, batch_size, rng, hold="weight"):
        super().__init__(data, batch_size, rng, hold)
        self.n_shuffles = 0

    def begin(self, parameter):
        super().begin(parameter)
        if self.n_shuffles == 0 or parameter.name not in ("gamma", "beta"):
            self.arrange(self.rng.permutation(len(self.data.train_images)))
            self.n_shuffles += 1
        self.next = 0

    def state(self):
        return {"order": self.order, "n_shuffles": np.array(self.n_shuffles)} if self.n_shuffles else {}

    def set_state(self, state):
        if state:
            self.arrange(state["order"])
            self.n_shuffles = int(state["n_shuffles"])

    def draw(self):
        images, labels, place = self.part(self.next)
        self.next = (self.next + 1) % (len(self.order) // self.batch_size)
        return images, labels, (self.n_shuffles, *place)


class Partition(Batches):
    """The notebook: the set is split once, one part is drawn with replacement for every trial.

    The last part may be short.
    """

    def __init__(self, data, batch_size, rng, hold="weight"):
        super().__init__(data, batch_size, rng, hold)
        self.arrange(rng.permutation(len(data.train_images)))

    def draw(self):
        return self.part(int(self.rng.integers(-(-len(self.order) // self.batch_size))))


POLICIES = {"fresh": Fresh, "slices": Slices, "partition": Partition}
