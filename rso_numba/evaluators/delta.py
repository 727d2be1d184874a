"""Exact losses from what one weight changes. The reasons, with a picture, are in `delta.md`.

A network is cut into *stages*: a layer that mixes channels (convolution, dense) and the layers up to
the next one, which treat every channel by itself. A weight of a stage changes one channel k of its
output z by `amount * u`. The stage's other layers keep the change in channel k; the next stage adds
what that channel contributes; what follows is computed in full. In the last stage z are the logits,
and the loss has a closed form.

For each mini-batch that comes back, x and z of the stage that is being searched are kept, and a log
of the changes that were kept brings them up to date.
"""

from dataclasses import dataclass, field

import numpy as np

from ..kernels import changes, cpu
from ..layers import AvgPool, BatchNorm, Dense, Pass

MANY = 100  # weights in a stage: with fewer, only a batch that came back once is expected again


@dataclass(eq=False)
class Stage:
    """A mixing layer and the channelwise layers behind it; `pooled`: an AvgPool is merged into it."""

    mixing: object
    tail: list = field(default_factory=list)
    pooled: bool = False

    def forward(self, x, run):
        """Return z, the output of the mixing layer."""
        if self.pooled:
            return changes.conv2d_avgpool_forward(x, self.mixing.weight, self.mixing.bias)
        return self.mixing.forward(x, run)

    def response(self, dx, run, channels):
        """Return how much z changes if the input `channels` (a slice) change by dx."""
        if self.pooled:
            weight = np.ascontiguousarray(self.mixing.weight[:, channels])
            return changes.conv2d_avgpool_forward(dx, weight, 0 * self.mixing.bias)
        return self.mixing.response(dx, run, channels)


@dataclass(eq=False)
class Batch:
    """A mini-batch, and what is known about it in the stage that is being searched."""

    images: np.ndarray
    labels: np.ndarray
    x: np.ndarray | None = None  # input of the stage, packed; in the last stage by feature
    z: np.ndarray | None = None  # output of its mixing layer, likewise
    padded_labels: np.ndarray | None = None  # in the last stage: -1 in lanes without image
    applied: int = 0  # how many entries of the log are in z
    statistics: dict = field(default_factory=dict)  # of the BatchNorms before the stage
    visits: int = 0
    is_held: bool = False  # x and z wait for the batch to come back


@dataclass(eq=False)
class Base:
    """The network beyond z, for one mini-batch and the weights as they are."""

    a: np.ndarray  # input of the next stage
    z_next: np.ndarray  # output of its mixing layer
    loss: float
    statistics: dict  # of the stage's BatchNorms: mean and variance, by layer name

    def adopt(self, tried):
        """Become what was tried."""
        self.a[:, tried.first : tried.first + tried.y.shape[1]] = tried.y
        self.z_next, self.loss = tried.z_next, tried.loss
        for name, channel, mean, variance in tried.statistics:
            self.statistics[name][0][channel], self.statistics[name][1][channel] = mean, variance


@dataclass(eq=False)
class Tried:
    """What became of one candidate."""

    value: float
    first: int  # of the channels of a that changed
    y: np.ndarray  # what they became
    z_next: np.ndarray
    loss: float
    statistics: list  # (layer name, channel, mean, variance) of a BatchNorm that comes first


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

    def __init__(self, network, momentum=0.0, memory=4.5e9):
        self.network, self.momentum, self.memory = network, momentum, memory
        self.head, self.stages, self.stage_of = [], [], {}
        for layer in network.layers:
            if layer not in network.leaves:
                raise ValueError(f"{layer} holds layers; delta evaluation takes chains only, "
                                 "use evaluation='full'")
            if layer.mixes_channels:
                self.stages.append(Stage(layer))
            elif not self.stages:
                self.head.append(layer)
            elif isinstance(layer, AvgPool) and not self.stages[-1].tail and not self.stages[-1].pooled:
                self.stages[-1].pooled = True
            else:
                self.stages[-1].tail.append(layer)
            self.stage_of[layer.name] = len(self.stages) - 1
        if not self.stages or not isinstance(self.stages[-1].mixing, Dense) or self.stages[-1].tail:
            raise ValueError("the network does not end in a dense layer; use evaluation='full'")
        self.batch, self.key = None, None
        self.known = network.weights.copy()  # the weights that everything remembered belongs to
        self.equal = np.empty(network.n_weights, np.bool_)
        self.known_value = network.views(self.known)
        self._forget(None)

    def _forget(self, d):
        """Begin to search stage d, with nothing remembered."""
        self.d, self.base, self.tried = d, None, []
        self.batches, self.held_bytes = {}, 0
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
            self.batch.x = self.batch.z = None
        self.base, self.tried, self.is_new, self.key = None, [], True, key
        self._take(images, labels)

    def _take(self, images, labels):
        self.batch = self.batches.get(self.key) or Batch(images, labels)
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
            if self.base is None and candidates[0] != before and d < len(self.stages) - 1:
                # weight decay: the loss of the decayed weight is asked for anyway, let it be the base
                parameter.value[index] = candidates[0]
                self._note(parameter, index, candidates[0])
            return self._losses(parameter, index, candidates)
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
        winner = [tried for tried in self.tried if tried.value == value]
        if self.base is not None and winner:  # the same batch may be asked about again: hold="filter"
            self.base.adopt(winner[0])
        else:
            self.base = None

    def _note(self, parameter, index, value):
        """Take note that a weight is `value` now."""
        known = self.known_value[str(parameter)]
        amount, known[index] = np.float32(value) - known[index], value
        if parameter.layer == self.stages[self.d].mixing.name:
            if self.log_length == len(self.log_amount):
                self.log_where = np.concatenate([self.log_where, self.log_where])
                self.log_amount = np.concatenate([self.log_amount, self.log_amount])
            self.log_where[self.log_length] = _where(parameter, index)
            self.log_amount[self.log_length] = amount
            self.log_length += 1

    def _losses(self, parameter, index, candidates):
        batch, stage, channel = self.batch, self.stages[self.d], index[0]
        momentum, self.is_new = (self.momentum if self.is_new else 0.0), False
        self._prepare(batch, stage, momentum)
        steps = np.array([float(c) - float(parameter.value[index]) for c in candidates], np.float32)
        if stage is self.stages[-1]:
            return self._last_losses(batch, parameter, index, steps)
        self._replay(batch, stage)
        if self.base is None:
            self.base = self._compute_base(batch, momentum)
        u, moments = None, None
        self.tried, losses = [], np.full(len(candidates), self.base.loss)
        for i in np.flatnonzero(steps):
            if u is None:
                u, moments = self._u(batch, stage, parameter, index)
            parameter.value[index] = candidates[i]
            amount = steps[i] if parameter.layer == stage.mixing.name else np.float32(0)
            y, statistics = self._channel(batch, stage, channel, u, amount, moments)
            tried = self._respond(y, channel, candidates[i], statistics)
            losses[i] = tried.loss
            self.tried.append(tried)
        return losses

    def _prepare(self, batch, stage, momentum):
        """Compute input and output of the stage, unless the batch has kept them."""
        if batch.z is None:
            run = Pass(cpu, len(batch.labels), batch_statistics=True)
            x = cpu.pack(batch.images)
            for layer in self.head:
                x = layer.forward(x, run)
            x = _through(self.stages[: self.d], x, run)
            batch.x, batch.z, batch.applied = x, stage.forward(x, run), self.log_length
            if stage is self.stages[-1]:
                batch.x, batch.z = changes.by_feature(x, n_ones=1), changes.by_feature(batch.z)
                batch.padded_labels = np.full(batch.z.shape[1], -1)
                batch.padded_labels[: len(batch.labels)] = batch.labels
            batch.statistics = run.statistics
            size = batch.x.nbytes + batch.z.nbytes
            comes_back = batch.visits > 1 or stage.mixing.weight.size > MANY
            if self.key is not None and comes_back and self.held_bytes + size <= self.memory:
                batch.is_held = True
                self.held_bytes += size
        if momentum:
            for layer in self.network.layers:
                if layer.name in batch.statistics:
                    layer.follow(*batch.statistics[layer.name], momentum)

    def _replay(self, batch, stage):
        """Bring z up to date with the changes of weights that the batch has missed."""
        if batch.applied < self.log_length:
            missed = slice(batch.applied, self.log_length)
            changes.replay_blocks(_maps(batch.z), _maps(batch.x), self.log_where[missed],
                                  self.log_amount[missed], 2 if stage.pooled else 1)
            batch.applied = self.log_length

    def _last_losses(self, batch, parameter, index, steps):
        """Return the losses in the last stage, where z are the logits."""
        missed = slice(batch.applied, self.log_length)
        k, j, _, _ = _where(parameter, index)
        sums = changes.dense_trial(batch.z, batch.x, self.log_where[missed], self.log_amount[missed], k, j,
                                   steps, batch.padded_labels)
        batch.applied = self.log_length
        return sums / len(batch.labels)

    def _compute_base(self, batch, momentum):
        run = Pass(cpu, len(batch.labels), batch_statistics=True, momentum=momentum)
        a = batch.z
        for layer in self.stages[self.d].tail:
            a = layer.forward(a, run)
        if np.may_share_memory(a, batch.z):
            a = a.copy()  # a Flatten alone makes a view, and z changes before a does
        z_next = self.stages[self.d + 1].forward(a, run)
        return Base(a, z_next, self._finish(z_next, run), run.statistics)

    def _finish(self, z_next, run):
        """Return the loss from the output of the next stage's mixing layer, by a full forward pass."""
        following, *later = self.stages[self.d + 1 :]
        x = z_next
        for layer in following.tail:
            x = layer.forward(x, run)
        return cpu.mean_loss(_through(later, x, run), self.batch.labels)

    def _u(self, batch, stage, parameter, index):
        """Return the map that the weight multiplies, and its moments if a BatchNorm comes next."""
        if parameter.layer != stage.mixing.name:  # gamma or beta: z stays, any map will do
            return changes.shifted(_maps(batch.z), index[0], 0, 0, False), None
        _, c, row, column = _where(parameter, index)
        if c < 0:
            u = np.ones_like(_maps(batch.z)[:, :1])
        else:
            u = changes.shifted(_maps(batch.x), c, row, column, stage.pooled)
        if not stage.tail or not isinstance(stage.tail[0], BatchNorm):
            return u, None
        mean = self.base.statistics[stage.tail[0].name][0][index[0]]
        return u, changes.moments(_maps(batch.z), index[0], u, mean, len(batch.labels))

    def _channel(self, batch, stage, channel, u, amount, moments):
        """Return the changed channel at the end of the stage, and its statistics (see `Tried`)."""
        run = Pass(cpu, len(batch.labels), batch_statistics=True)
        scale, shift, tail, statistics = np.float32(1), np.float32(0), stage.tail, []
        if tail and isinstance(tail[0], BatchNorm):
            norm, tail = tail[0], tail[1:]
            mean, variance = (float(s[channel]) for s in self.base.statistics[norm.name])
            if moments is not None:  # of z + amount u, in closed form
                mean_u, covariance, variance_u = moments
                mean += amount * mean_u
                variance = max(variance + 2 * amount * covariance + amount * amount * variance_u, 0.0)
            scale, shift = map(np.float32, norm.scale_and_shift(mean, variance, channel))
            statistics.append((norm.name, channel, mean, variance))
        y = changes.blend(_maps(batch.z), channel, u, amount, scale, shift)
        for layer in tail:
            y = layer.forward_channels(y, run, slice(channel, channel + 1))
        return y, statistics

    def _respond(self, y, channel, value, statistics):
        """Return what the network makes of the changed channel y."""
        run = Pass(cpu, len(self.batch.labels), batch_statistics=True)
        a, following = self.base.a, self.stages[self.d + 1]
        y = y.reshape(len(a), -1, *a.shape[2:])
        first = channel * y.shape[1]
        change = changes.difference(a, y, first)
        z_next = following.response(change, run, slice(first, first + y.shape[1]))
        changes.add_blocks_to(z_next.reshape(len(a), -1), self.base.z_next.reshape(len(a), -1))
        return Tried(value, first, y, z_next, self._finish(z_next, run), statistics)


def _through(stages, x, run):
    """Return what whole stages make of x."""
    for stage in stages:
        x = stage.forward(x, run)
        for layer in stage.tail:
            x = layer.forward(x, run)
    return x


def _maps(z):
    """View features (n_blocks, n, LANES) as n maps of one pixel; maps stay as they are."""
    return z if z.ndim == 5 else z.reshape(len(z), -1, 1, 1, z.shape[-1])


def _where(parameter, index):
    """Return output channel, input channel (-1: bias), row and column of a weight; the last relative."""
    if parameter.name == "bias":
        return index[0], -1, 0, 0
    if parameter.value.ndim == 2:
        return *index, 0, 0
    middle = parameter.value.shape[2] // 2
    return index[0], index[1], index[2] - middle, index[3] - middle
