"""The search on the GPU: what a weight changes is computed there, and the decision is made there.

As in `delta.py`, a network is cut into stages, and a weight of stage d changes one channel k of its output.
Here all three candidates are computed side by side, and no sum is moved by a difference:

    x of stage d, kept for each mini-batch that comes back
    | one channel of the mixing layer, with three filters
    z_k (3 candidates as channels), behind it the layers that treat every channel by itself
    | W_next[:, k] * a_k, on top of what all other channels contribute, kept while channel k is searched
    z_next (3 candidates as blocks), and all that follows in full
    | losses, decision: the winner is written into the weights on the GPU, and into the record of the trial

So nothing drifts, and while channel k is searched, a mini-batch that comes back has nothing to catch up with:
the weights that changed are those that z_k is computed from. Where another channel is searched, the stage is
computed once more for each mini-batch. In the last stage one launch decides many trials
(`kernels/cuda_last.py`).

The host starts kernels and waits for none, until it reads the records of a group of trials; only a mini-batch
that is new has to be copied to the GPU, which waits. Memory there, in bytes, for n images rounded up to
whole blocks: mini-batches that come back take at most `memory`, each 4 n (numbers in x + in z_next); beside
that, a trial takes 4 n (numbers in the outputs of stages 0..d + three times those of later stages, where
a pool's output comes on top of its stage's).
"""

from dataclasses import dataclass, field

import numpy as np

from ..kernels import cuda
from ..kernels.cuda_changes import (
    AFTER,
    BEFORE,
    CHOICE,
    LOSSES,
    N_CANDIDATES,
    RECORD,
    candidates_kernel,
    decide_kernel,
    follow_kernel,
)
from ..kernels.cuda_device import LANES, THREADS, empty, gpu_errors, launch, to_device, to_host
from ..kernels.cuda_last import WHERE
from ..layers import Pass
from .cuda_plans import DeviceStage, Plan, start_all
from .cuda_slots import Slots
from .recorder import recorded
from .stages import cut

GROUP = 256  # trials between two reads
NO_CHANNEL = -1


@dataclass(eq=False)
class Batch:
    """A mini-batch, and what is known about it in the stage that is being searched."""

    images: np.ndarray
    labels: np.ndarray
    plan: Plan | None = None
    on_device: object = None  # labels
    x: object = None  # input of the stage, as its kernel takes it
    others: object = None  # what the channels but k contribute to z_next
    era: int = 0  # in which visit of a channel `others` were computed
    statistics: dict = field(default_factory=dict)  # of BatchNorms up to this stage, (2, 1, C)


class CudaForward:
    """Losses and decisions of changed weights on the GPU, by computing only what changes. float32.

    Parameters
    ----------
    network : Network
    momentum : float
        How far each mini-batch moves BatchNorm's running statistics.
    memory : float
        Bytes on the GPU that may hold mini-batches that come back (those that `set_batch` gets with a
        key). What does not fit is computed anew at each visit.

    Raises
    ------
    ValueError
        If the network is no chain of mixing and channelwise layers that ends in a dense layer.
    """

    def __init__(self, network, momentum=0.0, memory=3.5e9):
        self.network, self.momentum, self.memory = network, np.float32(momentum), memory
        self.head, stages = cut(network)
        self.known, self.weights = network.weights.copy(), to_device(network.weights)
        self.known_value, parameters = network.views(self.known), network.views(self.weights)
        self.first = {name: int(a.flat[0]) for name, a in network.views(np.arange(network.n_weights)).items()}
        shape, shapes = network.image_shape, {}
        for layer in network.layers:
            shapes[layer.name], shape = shape, layer.output_shape(shape)
        self.stages = [DeviceStage(stage, shapes[stage.mixing.name], parameters, self.first)
                       for stage in stages]
        self.stage_of = {layer.name: d for d, stage in enumerate(stages)
                         for layer in (stage.mixing, *stage.layers)}
        self.norms = {layer.name: layer for stage in stages for layer in stage.layers
                      if f"{layer.name}.gamma" in self.first}
        self.running = {name: empty((2, len(norm.gamma)), np.float32) for name, norm in self.norms.items()}
        self.records = empty((GROUP, RECORD), np.float64)
        self.batch, self.key = None, None
        self._enter(None)

    # ---- what every evaluator can do ----

    def set_batch(self, images, labels, key=None):
        """Take a mini-batch: images (N, C, H, W) float32, labels (N,) int64.

        Two calls with the same `key` promise the same images and labels.
        """
        self.key, self.is_new = object() if key is None else key, True
        self.comes_back = key is not None
        self.batch = self.batches.get(self.key) or Batch(images, labels)

    def losses(self, parameter, index, candidates):
        """Return the mean loss for each candidate value of `parameter.value[index]`, float64."""
        position, before = self._begin(parameter, index), parameter.value[index]
        losses = np.empty(len(candidates))
        try:
            for i, candidate in enumerate(candidates):
                self._put(position, candidate)
                if self.d == len(self.stages) - 1:
                    losses[i] = self._whole_loss()
                else:
                    self._trial(0, position, np.float32(0), np.float32(1))
                    losses[i] = to_host(self.records)[0, LOSSES]
        finally:
            self._put(position, before)
        self._read_running()
        return losses

    def keep(self, parameter, index, value):
        """Store the winning value."""
        position = self._begin(parameter, index)
        parameter.value[index] = self.known_value[str(parameter)][index] = value
        self._put(position, value)
        if self.slots:
            self.slots.forget()

    # ---- the search ----

    def decide(self, search, decay):
        """Decide the trials of a search on the GPU, in groups.

        Parameters
        ----------
        search : function
            Of an evaluator; returns an iterator of `Trial`. It runs with a `Recorder`: up to a group of
            trials is taken from it before the first of them is decided.
        decay : float32
            What each weight is multiplied with before its visit.

        Yields
        ------
        Trial
            As they are yielded, the weights are written into the network.
        """
        group, where, deltas = [], np.empty((GROUP, WHERE), np.int64), np.empty(GROUP, np.float32)
        for trial, parameter, batch in recorded(search):
            if batch is not None:
                self.set_batch(*batch)
            if group and self._ends(group, trial, parameter):
                yield from self._read(group, where, deltas, decay)
                group = []
            n, position = len(group), self._begin(parameter, trial.index, is_first=not group)
            if self.slots:
                index = trial.index
                k, j = index if len(index) == 2 else (*index, self.stages[-1].n_in)
                where[n] = position, k, j, self._slot(), len(self.batch.labels)
                deltas[n] = trial.delta
            else:
                self._trial(n, position, trial.delta, decay)
            group.append((trial, parameter))
        if group:
            yield from self._read(group, where, deltas, decay)

    def _ends(self, group, trial, parameter):
        """Return whether a group has to be read before `trial`."""
        last, last_parameter = group[-1]
        return (len(group) == GROUP or trial.round != last.round or parameter is not last_parameter
                or bool(self.slots and not self.slots.has_room(self.key, self._n_blocks())))

    def _read(self, group, where, deltas, decay):
        """Yield what the trials of a group have come to."""
        n = len(group)
        if self.slots:
            self.slots.decide(where[:n], deltas[:n], decay, self.weights, self.records)
            if not self.comes_back:
                self.slots.forget()
        records = to_host(self.records)[:n]
        self._read_running()
        values = records[:, [BEFORE, AFTER]].astype(np.float32)
        for (trial, parameter), (_, after) in zip(group, values, strict=True):
            self.known_value[str(parameter)][trial.index] = after
        for (trial, parameter), record, (before, after) in zip(group, records, values, strict=True):
            parameter.value[trial.index] = after
            losses = record[LOSSES : LOSSES + N_CANDIDATES].tolist()
            yield trial.decided(losses, int(record[CHOICE]), before, after)

    def _begin(self, parameter, index, is_first=True):
        """Prepare for a trial of a weight; return its place in the vector of weights.

        `is_first` says that no trial waits to be read: else the GPU is ahead of the network.
        """
        d = self.stage_of[parameter.layer]
        if is_first:
            if not np.array_equal(self.known, self.network.weights):  # somebody else has changed them
                self.known[:] = self.network.weights
                with gpu_errors():
                    self.weights.copy_to_device(self.known)
                self.d = None
            if d != self.d or (self.slots and self.slots.n_logged + GROUP > self.slots.n_log):
                self._enter(d)
            self._write_running()
        if index[0] != self.k:
            self.k, self.era = index[0], self.era + 1
        return self.first[str(parameter)] + int(np.ravel_multi_index(index, parameter.value.shape))

    def _enter(self, d):
        """Begin to search stage d, with nothing remembered."""
        self.d, self.k, self.era = d, NO_CHANNEL, 0
        self.plans, self.batches, self.held_bytes, self.slots = {}, {}, 0, None
        if self.batch is not None:
            self.batch = Batch(self.batch.images, self.batch.labels)
        if d == len(self.stages) - 1:
            last = self.stages[-1]
            n_weights = last.weight.size + last.shape[0]
            self.slots = Slots(last.n_in, last.shape[0], n_weights + 2 * GROUP, self.memory)
        for stage in self.stages:
            start_all(stage.merge())

    def _put(self, position, value):
        with gpu_errors():
            self.weights[position : position + 1].copy_to_device(np.array([value], np.float32))

    def _n_blocks(self):
        return -(-len(self.batch.labels) // LANES)

    # ---- what a trial needs ----

    def _trial(self, trial, position, delta, decay):
        """Start all that decides a trial of a weight that is not in the last stage."""
        batch, stage, following = self.batch, *self.stages[self.d : self.d + 2]
        if batch.x is None:
            self._input()
        if batch.era != self.era:
            self._mix_others()
        plan, k = batch.plan, self.k
        part = plan.n_blocks, 0, k * plan.width, plan.width
        start_all([
            (candidates_kernel, -(-(plan.filters.size + plan.singles.size) // THREADS), (
                trial, self.weights, position, k, delta, decay, stage.filter_first, stage.origins,
                plan.filters, plan.singles, self.records)),
            *plan.merging,
            stage.mix(batch.x, plan.z_k, filters=plan.kernel_filters, bias=plan.bias_k),
            *plan.behind_k,
            following.mix(plan.a_k, plan.z_next, part, batch.others),
            *plan.after,
            (cuda.loss_sums_kernel, len(plan.logits), (plan.logits, batch.on_device, plan.sums)),
            (decide_kernel, 1, (trial, self.weights, position, delta, decay, plan.sums, plan.n_images,
                                self.records)),
        ])
        if self.is_new:
            for name, statistics in batch.statistics.items():
                self._follow(name, statistics, but=k if self.stage_of[name] == self.d else NO_CHANNEL)
            for name, statistics in plan.statistics_k.items():
                self._follow(name, statistics, k, 1)
            for name, statistics in plan.later_statistics.items():
                self._follow(name, statistics)
        self.is_new = False

    def _input(self):
        """Compute the input of stage d for the mini-batch, and keep it if there is room."""
        batch, stage, n_images = self.batch, self.stages[self.d], len(self.batch.labels)
        if n_images not in self.plans:
            self.plans[n_images] = Plan(self.stages, self.d, n_images)
        batch.plan = plan = self.plans[n_images]
        x, run = cuda.pack(batch.images), Pass(cuda, n_images)
        for layer in self.head:
            x = layer.forward(x, run)
        for before, z, behind, a in zip(self.stages[: self.d], plan.z, plan.behind, plan.a, strict=False):
            start_all([before.mix(before.view(x), before.view(z)), *behind])
            x = a
        batch.on_device = to_device(batch.labels)
        self._remember(batch, range(self.d))
        if not self.slots:
            is_held = self._hold(4 * (x.size + plan.others.size))
            batch.others = empty(plan.others.shape, np.float32) if is_held else plan.others
            x = copied(x) if is_held and self.d > 0 else x
        batch.x = stage.view(x)

    def _hold(self, n_bytes):
        """Return whether the mini-batch is kept until it comes back, and take note if it is."""
        if not self.comes_back or self.held_bytes + n_bytes > self.memory:
            return False
        self.held_bytes += n_bytes
        self.batches[self.key] = self.batch
        return True

    def _mix_others(self):
        """Compute what all channels but k contribute to the output of the next mixing layer."""
        batch, d, k, plan = self.batch, self.d, self.k, self.batch.plan
        stage, following = self.stages[d : d + 2]
        a, n = following.view(plan.a[d]), following.n_in
        start_all([*stage.merge(), stage.mix(batch.x, stage.view(plan.z[d])), *plan.behind[d]])
        ranges = [(0, k * plan.width), ((k + 1) * plan.width, n)]
        n_start = 0
        for first, end in [r for r in ranges if r[1] > r[0]] or [(0, 0)]:
            part = n_start, first, first, end - first
            start_all([following.mix(a, batch.others, part, batch.others)])
            n_start = plan.n_blocks
        batch.era = self.era
        self._remember(batch, [d])

    def _slot(self):
        """Return the slot of the mini-batch in the last stage."""
        if self.key not in self.slots.of:
            if not self.slots.has_room(self.key, self._n_blocks()):
                self.slots.forget()
            self._input()
            logits = self.batch.plan.logits
            start_all([self.stages[-1].mix(self.batch.x, logits)])
            self.slots.add(self.key, self.batch.x, logits, self.batch.on_device)
            if self.comes_back:
                self.batches[self.key] = self.batch
        self._follow_all()
        return self.slots.of[self.key]

    def _whole_loss(self):
        """Return the loss of the mini-batch, from the input of the last stage on."""
        self._input()
        plan = self.batch.plan
        start_all([self.stages[-1].mix(self.batch.x, plan.logits),
                   (cuda.loss_sums_kernel, plan.n_blocks, (plan.logits, self.batch.on_device, plan.sums))])
        self._follow_all()
        return to_host(plan.sums).sum() / plan.n_images

    # ---- BatchNorm's running statistics ----

    def _remember(self, batch, stages):
        """Keep the statistics that BatchNorms of these stages took: the buffers serve other mini-batches."""
        if self.momentum:
            batch.statistics.update({name: copied(s) for name, s in batch.plan.statistics.items()
                                     if self.stage_of[name] in stages})

    def _follow_all(self):
        if self.is_new:
            for name, statistics in self.batch.statistics.items():
                self._follow(name, statistics)
        self.is_new = False

    def _follow(self, name, statistics, first=0, n=None, but=NO_CHANNEL):
        if self.momentum:
            n = n or statistics.shape[2]
            launch(follow_kernel, -(-n // LANES), statistics, first, n, but, self.momentum,
                   self.running[name])

    def _write_running(self):
        if self.momentum:
            for name, norm in self.norms.items():
                with gpu_errors():
                    self.running[name].copy_to_device(np.stack([norm.running_mean, norm.running_variance]))

    def _read_running(self):
        if self.momentum:
            for name, norm in self.norms.items():
                norm.running_mean[:], norm.running_variance[:] = to_host(self.running[name])


def copied(array):
    """Return a copy of an array on the GPU."""
    copy = empty(array.shape, array.dtype)
    with gpu_errors():
        copy.copy_to_device(array)
    return copy
