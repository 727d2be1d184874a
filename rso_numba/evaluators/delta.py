"""Exact losses from what one weight changes, on the CPU. The reasons, with a picture, are in `delta.md`.

Read `delta_plain.py` first, which does the same in NumPy. A network is a `Graph`. Changes of weights of a
node change one channel of its value by a *direction*, a sum of shifted input channels; `reach.py` says what
that makes of the loss. In the last layer the loss has a closed form.

For each mini-batch that comes back, the input of the node and the bases behind it are kept, and a log of the
changes of weights that were kept brings them up to date when it does (`batch_cache.py`).
"""

from collections import namedtuple

import numpy as np

from ..kernels import cpu
from ..kernels.cpu.activations import computed
from ..kernels.cpu.delta import channel_direction
from ..kernels.cpu.fusion import Deferred, apply_epilogue, of_channels
from ..kernels.cpu.lanes import LANES
from ..kernels.cpu.last_layer import CHUNK_IMAGES, LARGE, by_feature, last_layer_losses
from ..kernels.cpu.layout import as_maps
from ..kernels.cpu.memory import copy, empty
from ..kernels.formulas import NO_POOL
from ..layers import Conv2D
from ..passes import Pass
from . import MEMORY
from .batch_cache import BatchCache
from .blocks import BLOCK_IMAGES, Blocks
from .graph import Graph
from .nodes import Values, apply_linear
from .reach import Change, Reach
from .share import Share

MANY_CHANNELS = 5  # each costs a convolution about a sixth of its time, to read and write all its output
FEW_TAPS = 27  # weights of a filter, 3 channels of 3x3: so quickly applied that the value need not be kept
BIAS, NO_TAP = -1, -2  # instead of an input channel: gamma and beta change no value of a node

# the input of the second convolution, made channel by channel from x, the input of the first
Rematerialized = namedtuple("Rematerialized", "x epilogue")


class DeltaForward:
    """Losses of changed weights, by computing only what changes. CPU, float32.

    Parameters
    ----------
    network : Network
    momentum : float
        How far each mini-batch moves BatchNorm's running statistics.
    fixed_images : ndarray (N, C, H, W) or None
        If given, BatchNorms before the layer that is being searched use the statistics of these images.
    memory : float
        Bytes that may hold activations of mini-batches that come back (those that `set_batch` gets
        with a key). What does not fit is computed anew at each visit.
    ranks : Ranks or None
        Those who share every mini-batch (and this `memory`, as if they were one process).
    by_block : bool
        Whether `losses` leaves them by blocks of images, too, in `blocks`. Not with ranks.

    Raises
    ------
    NoDelta
        If the network is none that delta evaluation can take: see `Graph`.
    """

    def __init__(self, network, momentum=0.0, fixed_images=None, memory=MEMORY, ranks=None, by_block=False):
        self.ranks, self.by_block, self.blocks = ranks, by_block, None
        self.network, self.momentum, self.fixed_images = network, momentum, fixed_images
        self.graph, self.cache = Graph(network), BatchCache(memory)
        self.last = self.graph.nodes[-1]
        self.batch, self.key = None, None
        self.known = network.weights.copy()  # the weights that everything remembered belongs to
        self.equal = np.empty(network.n_weights, np.bool_)
        self.known_value = network.views(self.known)
        self._enter(None)

    # ---- what every evaluator can do ----

    def set_batch(self, images, labels, key=None):
        """Take a mini-batch: images (N, C, H, W) float32, labels (N,) int64.

        Two calls with the same `key` promise the same images and labels.
        """
        if self.batch is not None and not self.batch.is_held:
            self.batch.x = self.batch.values = None
        self.tried, self.is_new, self.key = [], True, key
        self.given = images, labels
        self._take()

    def losses(self, parameter, index, candidates):
        """Return the mean loss for each candidate value of `parameter.value[index]`, float64."""
        node = self.graph.node_of[parameter.layer]
        if node is not self.node or not self._knows_all():
            self._enter(node, parameter.layer)
        before = parameter.value[index]
        try:
            if candidates[0] != before and node is not self.last:
                # weight decay: the decayed weight is what both other candidates start from
                parameter.value[index] = candidates[0]
                self._note(parameter, index, candidates[0])
            steps = np.array([float(c) - float(parameter.value[index]) for c in candidates], np.float32)
            if node is self.last:
                return self._last_losses(self.batch, parameter, index, steps)
            return self._losses(self.batch, parameter, index, candidates, steps)
        finally:
            parameter.value[index] = before

    def keep(self, parameter, index, value):
        """Store the winning value."""
        parameter.value[index] = value
        if self.known_value[str(parameter)][index] == value:
            return
        self._note(parameter, index, value)
        for candidate, loss, sums, statistics in self.tried:
            if candidate == value:
                self.batch.loss, self.batch.loss_applied = loss, self.cache.n_logged
                self.batch.sums = sums
                self.batch.values.statistics.update(statistics)
                break
        self.tried = []

    # ---- weights and mini-batches ----

    def _enter(self, node, layer=None):
        """Begin to search a node, with nothing remembered."""
        self.node, self.tried, self.fixed = node, [], frozenset()
        self.reach = Reach(self.graph, node) if node else None
        self.cache.forget()
        self.known[:] = self.network.weights
        if node and self.fixed_images is not None:
            self.network.calibrate(self.fixed_images)
            self.fixed = self.graph.norms_before(layer)
        if self.batch is not None:
            self._take()

    def _take(self):
        # in the last layer losses are added by chunks
        unit = CHUNK_IMAGES if self.node is self.last else LANES
        share = Share(len(self.given[1]), self.ranks, unit)
        self.batch, self.made = self.cache.get(self.key, *self.given, share), None

    def _knows_all(self):
        """Return whether nobody else has changed a weight."""
        return np.equal(self.known, self.network.weights, out=self.equal).all()

    def _note(self, parameter, index, value):
        """Take note that a weight is `value` now."""
        known = self.known_value[str(parameter)]
        amount, known[index] = np.float32(value) - known[index], value
        self.cache.log(_place_of(parameter, index), amount)

    def _follow(self, batch):
        """Let the running averages follow the statistics of a new mini-batch."""
        if self.is_new and self.momentum:
            for node, statistics in batch.values.statistics.items():
                for norm in node.norms:
                    norm.follow(*statistics, self.momentum)
        self.is_new = False

    # ---- losses ----

    def _last_losses(self, batch, parameter, index, steps):
        """Return the losses in the last layer, where the node's value are the logits."""
        if batch.values is None:
            batch.x, _, values = self._input(batch)
            self._compute_searched(batch.x, values)
            logits = values.z[self.last]
            batch.x = by_feature(batch.x.reshape(len(batch.x), -1, LANES), n_ones=1)
            values.z = {self.last: by_feature(logits.reshape(len(logits), -1, LANES))}
            batch.padded_labels = np.full(batch.x.shape[1], -1)
            batch.padded_labels[: len(batch.labels)] = batch.labels
            batch.values, batch.applied = values, self.cache.n_logged
            self._hold(batch)
        self._follow(batch)
        missed, amounts = self.cache.missed(batch)
        batch.applied = self.cache.n_logged
        k, j, _, _ = _place_of(parameter, index)
        sums = last_layer_losses(batch.values.z[self.last], batch.x, missed, amounts, k, j, steps,
                                 batch.padded_labels, batch.share.n_images > LARGE,
                                 BLOCK_IMAGES if self.by_block else CHUNK_IMAGES)
        if self.by_block:
            self.blocks = Blocks(sums.T, batch.share.n_images)
        return batch.share.last_layer_losses(sums)

    def _losses(self, batch, parameter, index, candidates, steps):
        """Return the losses in any other layer."""
        places, n_logged = np.array([_place_of(parameter, index)]), self.cache.n_logged
        channel = places[0, 0]
        if batch.values is None or self._is_far_behind(batch):
            self._compute(batch)
        self._catch_up(batch)
        sums, statistics, changed = [], [], np.flatnonzero(steps)
        if batch.loss_applied != n_logged:
            as_is, statistics_as_is = self.reach.loss_sums(batch.values, batch.labels)
            batch.values.statistics.update(statistics_as_is)
            sums.append(as_is)
        self._follow(batch)
        if len(changed):
            z, k = self._stored(batch, channel)
            direction, moments = self._direction(batch, z, k, channel, places, np.ones(1, np.float32))
        for i in changed:
            parameter.value[index] = candidates[i]
            amount = steps[i] if places[0, 1] != NO_TAP else np.float32(0)
            changes = self._changes(batch, z, k, channel, direction, moments, amount)
            found = self.reach.loss_sums(batch.values, batch.labels, batch.epilogues, changes, channel)
            sums.append(found[0])
            statistics.append(found[1])
        found = batch.share.mean_losses(sums) if sums else []  # all at once: ranks wait for each other here
        if batch.loss_applied != n_logged:
            batch.loss, batch.loss_applied, batch.sums = found.pop(0), n_logged, sums.pop(0)
        losses = np.full(len(candidates), batch.loss)
        losses[changed] = found
        self.tried = list(zip([candidates[i] for i in changed], found, sums, statistics, strict=True))
        if self.by_block:
            of_all = np.tile(batch.sums, (len(candidates), 1))
            of_all[changed] = sums
            self.blocks = Blocks(of_all, batch.share.n_images)
        return losses

    def _changes(self, batch, z, k, channel, direction, moments, amount):
        """Return the changes of a channel of the searched node, and of others through additions."""
        statistics = None
        if self.node.norms:
            known = (array[channel : channel + 1] for array in batch.values.statistics[self.node])
            statistics = _moved(*known, moments, amount)
        first = Change(z, k, direction, amount, statistics)
        return self.reach.changes(batch.values, batch.epilogues, first, channel)

    def _direction(self, batch, z, k, channel, places, amounts):
        """Return what weights of an output channel add to it, and its moments if a BatchNorm is next."""
        node, taps = self.node, places[:, 1] != NO_TAP
        mean = float(batch.values.statistics[node][0][channel]) if node.norms else None
        x, taps_in_x = self._channels(batch.x, places[taps, 1:]) if node.linear else (z, places[:0, 1:])
        size = node.linear.size if isinstance(node.linear, Conv2D) else 1
        direction, sums = channel_direction(x, taps_in_x, amounts[taps], size, node.step, z, k, mean,
                                            len(batch.labels))
        return direction, batch.share.moments(sums, direction) if node.norms else None

    def _channels(self, x, taps):
        """Return the node's input and taps in it, (n, 3); of a Rematerialized only the channels needed."""
        if not isinstance(x, Rematerialized):
            return x, taps
        source, taps, is_weight = self.node.input.source, taps.copy(), taps[:, 0] >= 0
        channels = np.unique(taps[is_weight, 0])
        if self.made is None or not np.isin(channels, self.made[0]).all():
            z = empty((len(x.x), len(channels), *source.shape[1:], LANES), x.x.dtype)
            for k, c in enumerate(channels):
                _output_channel(source, x.x, source.linear.weight[c], source.linear.bias[c], z, k)
            # for the next call too, which often needs the same
            self.made = channels, Deferred(z, of_channels(x.epilogue, channels))
        taps[is_weight, 0] = np.searchsorted(self.made[0], taps[is_weight, 0])
        return self.made[1], taps

    def _stored(self, batch, channel):
        """Return (z, k) such that z[:, k] is a channel of the searched node."""
        if self.node in batch.values.z:
            return batch.values.z[self.node], channel
        weight, bias = (w[channel] for w in batch.weights)
        return _output_channel(self.node, batch.x, weight, bias), 0

    # ---- what is kept of a mini-batch ----

    def _is_far_behind(self, batch):
        """Return whether so many channels have changed that it is less work to compute the bases anew."""
        changed = np.unique(self.cache.missed(batch)[0][:, 0])
        return len(changed) > MANY_CHANNELS and not all(node.is_dense for node in self.reach.spread)

    def _catch_up(self, batch):
        """Bring a mini-batch up to date with the changes of weights that it has missed."""
        places, amounts = self.cache.missed(batch)
        batch.applied = self.cache.n_logged
        for channel in np.unique(places[:, 0]):
            own = places[:, 0] == channel
            z, k = self._stored(batch, channel)
            direction, moments = self._direction(batch, z, k, channel, places[own], amounts[own])
            changes = self._changes(batch, z, k, channel, direction, moments, np.float32(1))
            self.reach.adopt(batch.values, batch.epilogues, changes, channel)
            if batch.weights is not None:
                weight, bias = batch.weights
                weight[channel], bias[channel] = (w[channel] for w in (
                    self.node.linear.weight, self.node.linear.bias))

    def _input(self, batch):
        """Return the input of the searched node, how to make it again (or None), and the nodes before."""
        values, node = Values(batch.share, self.fixed), self.node
        x = computed(cpu.propagate(self.graph.head, cpu.pack(batch.images), Pass(cpu, len(batch.labels))))
        values.put(self.graph.nodes[0], as_maps(x))
        for before in self.graph.nodes[1 : node.index]:
            if before in self.reach.needed:
                values.compute(before)
            for done in [z for z in values.z if z.last_reader <= before.index]:
                del values.z[done]
        if node.input is None:
            return None, None, values
        left, source, remade = values.along(node.input), node.input.source, None
        if not node.is_dense and self._is_first(source) and not self._keeps_value(source):
            remade = Rematerialized(x, left.epilogue)
        x = left if left.epilogue.pool == NO_POOL and not node.is_dense else apply_epilogue(*left)
        return as_maps(x.reshape(len(x), -1, LANES)) if node.is_dense else x, remade, values

    def _is_first(self, node):
        """Return whether a node is made of the images alone, by a convolution."""
        return (isinstance(node.linear, Conv2D) and not node.addends and not node.input.layers
                and node.input.source is self.graph.nodes[0])

    def _keeps_value(self, node):
        """Return whether the value of a node is kept, and not computed by channel when it is needed."""
        few = isinstance(node.linear, Conv2D) and node.linear.weight[0].size <= FEW_TAPS
        return not few or bool(node.addends)

    def _compute_searched(self, x, values):
        """Compute the value of the searched node from its input."""
        node = self.node
        if node.addends or node.linear is None:
            values.compute(node)
        else:
            values.z[node], values.statistics[node] = apply_linear(node, x, None, values.share)

    def _compute(self, batch):
        """Compute the bases for a mini-batch, and keep them if there is room."""
        reach, node, x, remade = self.reach, self.node, batch.x, None
        held = batch.values if batch.is_held else None
        if x is None or isinstance(x, Rematerialized) or not reach.by_input:
            x, remade, values = self._input(batch)
        else:
            values = Values(batch.share, self.fixed)
        if node.index > 0:
            self._compute_searched(x, values)
        for later in self.graph.nodes[node.index + 1 :]:
            if later in reach.base_edges and reach.base_edges[later]:
                values.compute(later, reach.base_edges[later], y=held and held.z[later])
            elif later in reach.needed:
                values.compute(later)
        keeps_value = self._keeps_value(node)
        batch.epilogues = {edge: values.epilogue(edge) for one in reach.one for edge in one.outputs}
        batch.weights = None if keeps_value else (node.linear.weight.copy(), node.linear.bias.copy())
        values.z = {kept: z for kept, z in values.z.items()
                    if reach.base_edges.get(kept) or (kept is node and node.index == 0)}
        if not keeps_value:
            del values.z[node]
        batch.loss_applied, batch.applied = None, self.cache.n_logged
        if held:
            for kept, z in values.z.items():
                if z is not held.z[kept]:
                    copy(z, held.z[kept])
            held.statistics.update(values.statistics)
        else:
            batch.x, batch.values = x, values
            self._hold(batch, remade if keeps_value else None)

    def _hold(self, batch, remade=None):
        """Keep a mini-batch until it comes back, if it does and there is room."""
        if self.key is None:
            return
        z, x = batch.values.z, batch.x
        if remade and _array(x).nbytes > sum(array.nbytes for array in z.values()):
            x = remade  # instead of what would be most of the memory
        arrays = [*z.values()] if x is None else [_array(x), *z.values()]
        copies = self.cache.arena.hold(arrays, batch.share.times_larger)
        if copies is not None:
            batch.is_held = True
            batch.values.z = dict(zip(z, copies[len(copies) - len(z) :], strict=True))
            if x is not None:
                batch.x = type(x)(copies[0], x.epilogue) if isinstance(x, tuple) else copies[0]


def _place_of(parameter, index):
    """Return output channel, input channel (or BIAS, NO_TAP), row and column of a weight."""
    if parameter.name in ("gamma", "beta"):
        return index[0], NO_TAP, 0, 0
    if parameter.name == "bias":
        return index[0], BIAS, 0, 0
    return index if parameter.value.ndim == 4 else (*index, 0, 0)


def _array(x):
    """Return the array in the input of a node: Deferred and Rematerialized are (array, epilogue)."""
    return x[0] if isinstance(x, tuple) else x


def _output_channel(node, x, weight, bias, z=None, k=0):
    """Return one output channel of a node's convolution, (n_blocks, 1, h, w, LANES) or as channel k of z."""
    taps = np.array([(BIAS, 0, 0), *np.ndindex(weight.shape)])
    return channel_direction(x, taps, np.append(bias, weight), node.linear.size, node.step, direction=z,
                             k_out=k)[0]


def _moved(mean, variance, moments, amount):
    """Return mean and variance (1,) of z + amount * direction, in closed form."""
    mean_d, covariance, variance_d = moments
    mean, variance, amount = float(mean[0]), float(variance[0]), float(amount)
    variance += 2 * amount * covariance + amount * amount * variance_d
    return np.array([mean + amount * mean_d]), np.array([max(variance, 0.0)])
