"""Exact losses from what one weight changes. The reasons, with a picture, are in `delta.md`.

A network is cut into *stages*: a layer that mixes channels (convolution, dense) and the layers up to
the next one, which treat every channel by itself (`stages.py`). Changes of weights of a stage change one
channel k of its output z by u, a sum of shifted input channels. The stage's other layers keep the change in
channel k; the next stage adds what that channel contributes to its output z_next; what follows is computed
in full. In the last stage z are the logits, and the loss has a closed form.

For each mini-batch that comes back, x, z and z_next of the stage that is being searched are kept, and a log
of the changes of weights that were kept brings them up to date in the same way when it does.
"""

from collections import namedtuple
from dataclasses import dataclass, field

import numpy as np

from ..kernels import changes, cpu
from ..kernels.lanes import LANES
from ..kernels.memory import Arena, copy, empty
from ..kernels.tails import KEEP, Pending, no_tail
from ..layers import Dense
from .stages import cut, forward, new_pass, onward

MANY = 100  # weights in a stage: with fewer, only a batch that came back once is expected again
MANY_CHANNELS = 5  # each costs a convolution about a sixth of its time, to read and write all its output
FEW_TAPS = 27  # weights of a filter, three channels of 3x3: so quickly applied that z need not be kept
BIAS, NO_TAP = -1, -2  # instead of an input channel: gamma and beta change a channel, but not z

Remade = namedtuple("Remade", "x tail")  # input of stage 1, made channel by channel from x, that of stage 0


@dataclass(eq=False)
class Batch:
    """A mini-batch, and what is known about it in the stage that is being searched."""

    images: np.ndarray
    labels: np.ndarray
    x: np.ndarray | Pending | Remade | None = None  # input of the stage, packed; in the last stage by feature
    z: np.ndarray | None = None  # output of its mixing layer, likewise; None if it is computed when needed
    z_weights: tuple | None = None  # weight and bias that z belongs to, if it is not kept
    tail: tuple | None = None  # what z passes before the next stage
    a: np.ndarray | None = None  # what comes before that tail, if layers of the stage run apart: else it is z
    z_next: np.ndarray | None = None  # output of the next stage's mixing layer
    next_statistics: tuple | None = None  # mean and variance of z_next, if a BatchNorm needs them
    loss: float | None = None  # of the weights as they were
    loss_applied: int | None = None  # when so many entries of the log were applied
    statistics: dict = field(default_factory=dict)  # mean and variance that every BatchNorm took
    padded_labels: np.ndarray | None = None  # in the last stage: -1 in lanes without image
    applied: int = 0  # how many entries of the log are in z and z_next
    visits: int = 0
    is_held: bool = False  # all this waits for the batch to come back


@dataclass(eq=False)
class Change:
    """What becomes of one channel of a stage, and of the next stage."""

    channels: slice  # of what comes before the tail (a Flatten makes many of one)
    a: np.ndarray | None  # what they become, if layers of the stage run apart
    tail: tuple  # of these channels
    statistics: dict  # their mean and variance in every BatchNorm of the stage
    z_next: np.ndarray
    next_statistics: tuple | None


class DeltaForward:
    """Losses of changed weights, by computing only what changes. CPU, float32.

    Parameters
    ----------
    network : Network
    momentum : float
        How far each mini-batch moves BatchNorm's running statistics.
    memory : float
        Bytes that may hold activations of mini-batches that come back (those that `set_batch` gets
        with a key). What does not fit is computed anew at each visit.

    Raises
    ------
    ValueError
        If the network is no chain of mixing and channelwise layers that ends in a dense layer.
    """

    def __init__(self, network, momentum=0.0, memory=3.5e9):
        self.network, self.momentum, self.arena = network, momentum, Arena(memory)
        self.head, self.stages = cut(network)
        self.stage_of = {layer.name: d for d, stage in enumerate(self.stages)
                         for layer in (stage.mixing, *stage.layers)}
        self.batch, self.key = None, None
        self.known = network.weights.copy()  # the weights that everything remembered belongs to
        self.equal = np.empty(network.n_weights, np.bool_)
        self.known_value = network.views(self.known)
        self._forget(None)

    def _forget(self, d):
        """Begin to search stage d, with nothing remembered."""
        self.d, self.tried = d, []
        self.batches = {}
        self.arena.forget()
        self.log_where, self.log_amount = np.empty((256, 4), np.int64), np.empty(256, np.float32)
        self.log_length = 0
        self.known[:] = self.network.weights
        if self.batch is not None:
            self._take(self.batch.images, self.batch.labels)

    def set_batch(self, images, labels, key=None):
        """Take a mini-batch: images (N, C, H, W) float32, labels (N,) int64.

        Two calls with the same `key` promise the same images and labels.
        """
        if self.batch is not None and not self.batch.is_held:
            self.batch.x = self.batch.z = self.batch.a = self.batch.z_next = None
        self.tried, self.is_new, self.key = [], True, key
        self._take(images, labels)

    def _take(self, images, labels):
        self.batch, self.made = self.batches.get(self.key) or Batch(images, labels), None
        self.batch.visits += 1
        if self.key is not None:
            self.batches[self.key] = self.batch

    def losses(self, parameter, index, candidates):
        """Return the mean loss for each candidate value of `parameter.value[index]`, float64."""
        d = self.stage_of[parameter.layer]
        if d != self.d or not self._knows_all():
            self._forget(d)
        before = parameter.value[index]
        try:
            if candidates[0] != before and d < len(self.stages) - 1:
                # weight decay: the decayed weight is what both other candidates start from
                parameter.value[index] = candidates[0]
                self._note(parameter, index, candidates[0])
            steps = np.array([float(c) - float(parameter.value[index]) for c in candidates], np.float32)
            if d == len(self.stages) - 1:
                return self._last_losses(self.batch, parameter, index, steps)
            return self._losses(self.batch, parameter, index, candidates, steps)
        finally:
            parameter.value[index] = before

    def _knows_all(self):
        """Return whether nobody else has changed a weight."""
        return np.equal(self.known, self.network.weights, out=self.equal).all()

    def keep(self, parameter, index, value):
        """Store the winning value."""
        parameter.value[index] = value
        if self.known_value[str(parameter)][index] == value:
            return
        self._note(parameter, index, value)
        for candidate, loss, statistics in self.tried:
            if candidate == value:
                self.batch.loss, self.batch.loss_applied = loss, self.log_length
                self.batch.statistics.update(statistics)
                break
        self.tried = []

    def _note(self, parameter, index, value):
        """Take note that a weight is `value` now."""
        known = self.known_value[str(parameter)]
        amount, known[index] = np.float32(value) - known[index], value
        if self.log_length == len(self.log_amount):
            self.log_where = np.concatenate([self.log_where, self.log_where])
            self.log_amount = np.concatenate([self.log_amount, self.log_amount])
        self.log_where[self.log_length] = self._where(parameter, index)
        self.log_amount[self.log_length] = amount
        self.log_length += 1

    def _where(self, parameter, index):
        """Return output channel, input channel (or BIAS, NO_TAP), row and column of a weight."""
        if parameter.name in ("gamma", "beta"):  # a Flatten before the BatchNorm makes many of one channel
            n_channels = len(self.stages[self.d].mixing.weight)
            return index[0] * n_channels // len(parameter.value), NO_TAP, 0, 0
        if parameter.name == "bias":
            return index[0], BIAS, 0, 0
        if parameter.value.ndim == 2:
            return *index, 0, 0
        return index

    def _last_losses(self, batch, parameter, index, steps):
        """Return the losses in the last stage, where z are the logits."""
        if batch.z is None:
            run, stage = new_pass(len(batch.labels)), self.stages[-1]
            batch.x, _ = self._input(batch, run)
            batch.z, _ = stage.mix(batch.x, None, run.n_images)
            batch.x = changes.by_feature(batch.x.reshape(len(batch.x), -1, LANES), n_ones=1)
            batch.z = changes.by_feature(batch.z.reshape(len(batch.z), -1, LANES))
            batch.padded_labels = np.full(batch.z.shape[1], -1)
            batch.padded_labels[: len(batch.labels)] = batch.labels
            batch.statistics, batch.applied = run.statistics, self.log_length
            self._hold(batch, stage)
        self._follow(batch)
        missed = slice(batch.applied, self.log_length)
        batch.applied = self.log_length
        k, j, _, _ = self._where(parameter, index)
        sums = changes.dense_trial(batch.z, batch.x, self.log_where[missed], self.log_amount[missed], k, j,
                                   steps, batch.padded_labels)
        return sums / len(batch.labels)

    def _losses(self, batch, parameter, index, candidates, steps):
        """Return the losses in any other stage."""
        where, n = np.array([self._where(parameter, index)]), len(batch.labels)
        channel = where[0, 0]
        if batch.z_next is None or self._is_far_behind(batch):
            self._compute(batch)
        self._catch_up(batch)
        if batch.loss_applied != self.log_length:
            batch.loss, statistics = self._finish(batch.z_next, batch.next_statistics, n)
            batch.loss_applied = self.log_length
            batch.statistics.update(statistics)
        self._follow(batch)
        self.tried, losses = [], np.full(len(candidates), batch.loss)
        if not steps.any():
            return losses
        place = self._place(batch, channel)
        u, moments = self._u(batch, place, channel, where, np.ones(1, np.float32))
        for i in np.flatnonzero(steps):
            parameter.value[index] = candidates[i]
            amount = steps[i] if where[0, 1] != NO_TAP else np.float32(0)
            change = self._change(batch, place, channel, u, moments, amount)
            losses[i], statistics = self._finish(change.z_next, change.next_statistics, n)
            self.tried.append((candidates[i], losses[i], statistics))
        return losses

    def _input(self, batch, run):
        """Return the input of the stage that is being searched, and how to remake it (or None)."""
        x = cpu.pack(batch.images)
        for layer in self.head:
            x = layer.forward(x, run)
        is_dense, remade = isinstance(self.stages[self.d].mixing, Dense), None  # its features are pixels
        if self.d > 0:
            z, statistics = forward(self.stages[: self.d], x, None, run)
            left = Pending(*self.stages[self.d - 1].leave(z, statistics, run))
            if self.d == 1 and not is_dense and not self.stages[0].apart and not self._keeps_z(0):
                remade = Remade(x, left.tail)
            x = left if left.tail.pool == KEEP and not is_dense else cpu.apply_tail(*left)
        return cpu.as_maps(x.reshape(len(x), -1, LANES)) if is_dense else x, remade

    def _keeps_z(self, d):
        """Return whether the output of stage d is kept, and not computed when it is needed."""
        return self.stages[d].mixing.weight[0].size > FEW_TAPS

    def _compute(self, batch):
        """Compute a mini-batch up to z_next, and keep it if there is room."""
        run, stage, following = new_pass(len(batch.labels)), *self.stages[self.d : self.d + 2]
        x, remade = batch.x, None
        if x is None or isinstance(x, Remade):
            x, remade = self._input(batch, run)
        z, statistics = stage.mix(x, None, run.n_images)
        a, batch.tail = stage.leave(z, statistics, run)
        y = batch.z_next if batch.is_held else None
        batch.z_next, batch.next_statistics = following.mix(a, batch.tail, run.n_images, y=y)
        batch.statistics.update(run.statistics)
        batch.loss_applied, batch.applied = None, self.log_length
        keeps_z = self._keeps_z(self.d)
        batch.z_weights = None if keeps_z else (stage.mixing.weight.copy(), stage.mixing.bias.copy())
        if batch.is_held:
            if keeps_z:
                copy(z, batch.z)
            if stage.apart:
                copy(a, batch.a)
        else:
            batch.x, batch.z, batch.a = x, z if keeps_z else None, a if stage.apart else None
            self._hold(batch, stage, remade if keeps_z else None)

    def _hold(self, batch, stage, remade=None):
        """Keep a mini-batch until it comes back, if that is likely and there is room."""
        if self.key is None or (batch.visits == 1 and stage.mixing.weight.size <= MANY):
            return
        names = [name for name in ("z", "a", "z_next") if getattr(batch, name) is not None]
        arrays, x = [getattr(batch, name) for name in names], batch.x
        if remade and _array(x).nbytes > sum(array.nbytes for array in arrays):
            x = remade  # instead of what would be most of the memory
        copies = self.arena.hold([_array(x), *arrays])
        if copies is not None:
            batch.is_held = True
            batch.x = type(x)(copies[0], x.tail) if isinstance(x, tuple) else copies[0]
            for name, array in zip(names, copies[1:], strict=True):
                setattr(batch, name, array)

    def _follow(self, batch):
        """Let the running averages follow the statistics of a new mini-batch."""
        if self.is_new and self.momentum:
            for layer in self.network.layers:
                if layer.name in batch.statistics:
                    layer.follow(*batch.statistics[layer.name], self.momentum)
        self.is_new = False

    def _is_far_behind(self, batch):
        """Return whether so many channels have changed that it is less work to compute z_next anew."""
        changed = np.unique(self.log_where[batch.applied : self.log_length, 0])
        return len(changed) > MANY_CHANNELS and not isinstance(self.stages[self.d + 1].mixing, Dense)

    def _catch_up(self, batch):
        """Bring a mini-batch up to date with the changes of weights that it has missed."""
        missed = slice(batch.applied, self.log_length)
        where, amounts, batch.applied = self.log_where[missed], self.log_amount[missed], self.log_length
        for channel in np.unique(where[:, 0]):
            own = where[:, 0] == channel
            place = self._place(batch, channel)
            u, moments = self._u(batch, place, channel, where[own], amounts[own])
            change = self._change(batch, place, channel, u, moments, np.float32(1), batch.z_next)
            batch.next_statistics = change.next_statistics
            self._adopt(batch, channel, u, change)

    def _adopt(self, batch, channel, u, change):
        """Make a change of z[channel] by u the state of a mini-batch."""
        if batch.z is not None:
            changes.add_to_channel(batch.z, channel, u, np.float32(1))
        else:
            mixing = self.stages[self.d].mixing
            for kept, weights in zip(batch.z_weights, (mixing.weight, mixing.bias), strict=True):
                kept[channel] = weights[channel]
        for name, statistics in change.statistics.items():
            for array, values in zip(batch.statistics[name], statistics, strict=True):
                array[change.channels] = values
        for array, values in zip(batch.tail[:2], change.tail[:2], strict=True):
            array[change.channels] = values
        if change.a is not None:
            batch.a[:, change.channels] = change.a

    def _place(self, batch, channel):
        """Return (z, k) such that z[:, k] is a channel of the stage's output."""
        if batch.z is not None:
            return batch.z, channel
        weight, bias = (w[channel] for w in batch.z_weights)
        return _output(self.stages[self.d], batch.x, weight, bias), 0

    def _channels(self, x, taps):
        """Return the input of the stage and taps in it, (n, 3); of a Remade only the channels they need."""
        if not isinstance(x, Remade):
            return x, taps
        stage, taps, is_weight = self.stages[0], taps.copy(), taps[:, 0] >= 0
        channels = np.unique(taps[is_weight, 0])
        if self.made is None or not np.isin(channels, self.made[0]).all():
            z = empty((len(x.x), len(channels), *(n // stage.step for n in x.x.shape[2:4]), LANES), x.x.dtype)
            for k, c in enumerate(channels):
                _output(stage, x.x, stage.mixing.weight[c], stage.mixing.bias[c], z, k)
            tail = x.tail._replace(scale=x.tail.scale[channels], shift=x.tail.shift[channels])
            self.made = channels, Pending(z, tail)  # for the next call too, which often needs the same
        taps[is_weight, 0] = np.searchsorted(self.made[0], taps[is_weight, 0])
        return self.made[1], taps

    def _u(self, batch, place, channel, where, amounts):
        """Return u, what weights of an output channel add to it, and its moments if a BatchNorm is next."""
        stage, taps = self.stages[self.d], where[:, 1] != NO_TAP
        mean = float(batch.statistics[stage.norm.name][0][channel]) if stage.norm else None
        return changes.change_of_channel(*self._channels(batch.x, where[taps, 1:]), amounts[taps], stage.size,
                                         stage.step, *place, mean, len(batch.labels))

    def _change(self, batch, place, channel, u, moments, amount, y=None):
        """Return what z[channel] + amount * u makes of z_next, written to y if that is given."""
        stage, following, run = self.stages[self.d], self.stages[self.d + 1], new_pass(len(batch.labels))
        channels, a, statistics = slice(channel, channel + 1), None, None
        if stage.apart:
            a = changes.channel_sum(*place, u, amount)
            for layer in stage.apart:
                a = layer.forward_channels(a, run, channels)
                channels = slice(channel * a.shape[1], (channel + 1) * a.shape[1])
            a = cpu.as_maps(a)
            change, tail = a - batch.a[:, channels], no_tail(a)
        else:
            if stage.norm:
                known = (s[channels] for s in batch.statistics[stage.norm.name])
                statistics = _moved(*known, moments, amount)
                run.statistics[stage.norm.name] = statistics
            before = batch.tail._replace(scale=batch.tail.scale[channels], shift=batch.tail.shift[channels])
            tail = stage.tail(1, statistics, channels)
            change = changes.tail_change(*place, u, amount, before, tail)
        features = channels
        if isinstance(following.mixing, Dense):  # which sees the pixels of a channel as features
            width = change[0, 0].size // LANES
            features = slice(channels.start * width, channels.stop * width)
        z_next = following.mix(change, None, run.n_images, features, batch.z_next, y)
        return Change(channels, a, tail, run.statistics, *z_next)

    def _finish(self, z_next, statistics, n_images):
        """Return the loss from the output of the next stage's mixing layer, and the statistics behind it."""
        run = new_pass(n_images)
        z, _ = onward(self.stages[self.d + 1 :], z_next, statistics, run)
        return cpu.mean_loss(z.reshape(len(z), -1, LANES), self.batch.labels), run.statistics


def _array(x):
    """Return the array in the input of a stage: Pending and Remade are (array, tail)."""
    return x[0] if isinstance(x, tuple) else x


def _output(stage, x, weight, bias, z=None, k=0):
    """Return one output channel of a stage's convolution, (n_blocks, 1, h, w, LANES) or as channel k of z."""
    taps = np.array([(BIAS, 0, 0), *np.ndindex(weight.shape)])
    return changes.change_of_channel(x, taps, np.append(bias, weight), stage.size, stage.step, u=z, k_u=k)[0]


def _moved(mean, variance, moments, amount):
    """Return mean and variance (1,) of z + amount * u, in closed form."""
    mean_u, covariance, variance_u = moments
    mean, variance, amount = float(mean[0]), float(variance[0]), float(amount)
    variance += 2 * amount * covariance + amount * amount * variance_u
    return np.array([mean + amount * mean_u]), np.array([max(variance, 0.0)])
