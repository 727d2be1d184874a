"""The search on the GPU: what a weight changes is computed there, and the decision is made there.

As in `delta.py`, a network is a `Graph`, and a weight changes one channel k of a node d. Here all three
candidates are computed side by side, and no sum is moved by a difference:

    x of node d, kept for each mini-batch that comes back
    | one channel of its linear layer, with three filters
    z_k (3 candidates as channels); also channel k of the nodes that additions lead to
    | W[:, k] * a_k, on top of the bases: what all other channels contribute, kept while k is searched
    z of the nodes behind (3 candidates as blocks), from there on in full
    | losses, decision: the winner is written into the weights on the GPU, and into the record of the trial

So nothing drifts, and while channel k is searched, a mini-batch that comes back has nothing to catch up with:
the weights that changed are those that z_k is computed from. Where another channel is searched, the bases are
computed once more for each mini-batch. In the last layer one launch decides many trials
(`kernels/cuda/last_layer.py`).

The host starts kernels and waits for none, until it reads the records of a group of trials; only a mini-batch
that is new has to be copied to the GPU, which waits. Memory there, in bytes, for n images rounded up to
whole blocks: mini-batches that come back take at most `memory`, each 4 n (numbers in x + in the bases, and in
an image if a skip leads around d); beside that, a trial takes 4 n (numbers in the nodes that the bases need +
three times those of nodes behind, where what a pool makes comes on top of its node).
"""

from dataclasses import dataclass, field

import numpy as np

from ..kernels import cuda
from ..kernels.cuda.delta import (
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
from ..kernels.cuda.device import LANES, THREADS, empty, gpu_errors, launch, to_device, to_host
from ..kernels.cuda.last_layer import WHERE
from ..kernels.cuda.layout import by_row
from ..passes import Pass
from . import MEMORY
from .cuda_launches import Launches, start_all
from .cuda_nodes import NO_CHANNEL, DeviceLinear
from .cuda_plans import Kept, LaunchPlan, copied
from .cuda_slots import Slots
from .graph import Graph
from .kinds import Kinds
from .recorder import recorded

GROUP = 256  # trials between two reads


@dataclass(eq=False)
class Batch:
    """A mini-batch, and what is known about it while a node is searched."""

    images: np.ndarray
    labels: np.ndarray
    plan: LaunchPlan | None = None
    first: object = None  # value of node 0, if it is kept because the bases need it
    kept: Kept | None = None
    trial: Launches | None = None  # from the filters of the candidates to their losses
    era: int = 0  # in which visit of a channel the bases were computed
    statistics: dict = field(default_factory=dict)  # that BatchNorms took with the weights as they are


class CudaForward:
    """Losses and decisions of changed weights on the GPU, by computing only what changes. float32.

    Parameters
    ----------
    network : Network
    momentum : float
        How far each mini-batch moves BatchNorm's running statistics.
    fixed_images : ndarray (N, C, H, W) or None
        If given, BatchNorms before the layer that is being searched use the statistics of these images.
    memory : float
        Bytes on the GPU that may hold mini-batches that come back (those that `set_batch` gets with a
        key). What does not fit is computed anew at each visit.

    Raises
    ------
    NoDelta
        If the network is none that delta evaluation can take: see `Graph`.
    """

    def __init__(self, network, momentum=0.0, fixed_images=None, memory=MEMORY):
        self.network, self.momentum, self.memory = network, np.float32(momentum), memory
        self.graph, self.fixed_images = Graph(network), fixed_images
        self.last = self.graph.nodes[-1]
        self.known, self.weights = network.weights.copy(), to_device(network.weights)
        self.known_value, self.parameters = network.views(self.known), network.views(self.weights)
        self.first = {name: int(a.flat[0]) for name, a in network.views(np.arange(network.n_weights)).items()}
        self.linears = {node: DeviceLinear(node, self.parameters) for node in self.graph.nodes if node.linear}
        self.node_of_norm = {norm.name: node for node in self.graph.nodes for norm in node.norms}
        self.norms = {norm.name: norm for node in self.graph.nodes for norm in node.norms}
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
                if self.node is self.last:
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

    def decide(self, search, settings):
        """Decide the trials of a search on the GPU, in groups.

        Parameters
        ----------
        search : function
            Of an evaluator; returns an iterator of `Trial`. It runs with a `Recorder`: up to a group of
            trials is taken from it before the first of them is decided.
        settings : Preset
            Of the search: weight decay, and what is chosen of three losses.

        Yields
        ------
        Trial
            As they are yielded, the weights are written into the network.
        """
        how = settings.decay, int(settings.choose == "vertex")
        group, where, deltas = [], np.empty((GROUP, WHERE), np.int64), np.empty(GROUP, np.float32)
        for trial, parameter, batch in recorded(search):
            if batch is not None:
                self.set_batch(*batch)
            if group and self._ends(group, trial, parameter):
                yield from self._read(group, where, deltas, how)
                group = []
            n, position = len(group), self._begin(parameter, trial.index, is_first=not group)
            if self.slots:
                index = trial.index
                k, j = index if len(index) == 2 else (*index, self.linears[self.last].n_in)
                where[n] = position, k, j, self._slot(), len(self.batch.labels)
                deltas[n] = trial.delta
            else:
                self._trial(n, position, trial.delta, *how)
            group.append((trial, parameter))
        if group:
            yield from self._read(group, where, deltas, how)

    def _ends(self, group, trial, parameter):
        """Return whether a group has to be read before `trial`."""
        last, last_parameter = group[-1]
        return (len(group) == GROUP or trial.round != last.round or parameter is not last_parameter
                or bool(self.slots and not self.slots.has_room(self.key, self._n_blocks())))

    def _read(self, group, where, deltas, how):
        """Yield what the trials of a group have come to."""
        n = len(group)
        if self.slots:
            self.slots.decide(where[:n], deltas[:n], *how, self.weights, self.records)
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
        node = self.graph.node_of[parameter.layer]
        if is_first:
            if not np.array_equal(self.known, self.network.weights):  # somebody else has changed them
                self.known[:] = self.network.weights
                with gpu_errors():
                    self.weights.copy_to_device(self.known)
                self.node = None
            if node is not self.node or (self.slots and self.slots.n_logged + GROUP > self.slots.n_log):
                self._enter(node, parameter.layer)
            self._write_running()
        if index[0] != self.k:
            self.k, self.era = index[0], self.era + 1
        return self.first[str(parameter)] + int(np.ravel_multi_index(index, parameter.value.shape))

    def _enter(self, node, layer=None):
        """Begin to search a node, with nothing remembered."""
        self.node, self.k, self.era, self.fixed = node, NO_CHANNEL, 0, frozenset()
        self.plans, self.batches, self.held_bytes, self.slots = {}, {}, 0, None
        if self.batch is not None:
            self.batch = Batch(self.batch.images, self.batch.labels)
        if node is None:
            return
        self.kinds = Kinds(self.graph, node)
        if self.fixed_images is not None:
            self.network.calibrate(self.fixed_images, "cuda")
            self.fixed = self.graph.norms_before(layer)
        if node is self.last:
            n_classes, n_in = self.linears[node].weight.shape
            self.slots = Slots(n_in, n_classes, n_classes * (n_in + 1) + 2 * GROUP, self.memory)
        for linear in self.linears.values():
            start_all(linear.merge())

    def _put(self, position, value):
        with gpu_errors():
            self.weights[position : position + 1].copy_to_device(np.array([value], np.float32))

    def _n_blocks(self):
        return -(-len(self.batch.labels) // LANES)

    # ---- what a trial needs ----

    def _trial(self, trial, position, delta, decay, wants_vertex=0):
        """Start all that decides a trial of a weight that is not in the last layer."""
        batch = self.batch
        if batch.era != self.era:
            self._compute_bases()
        plan = batch.plan
        start_all([
            (candidates_kernel, -(-(plan.filters.size + plan.singles.size) // THREADS), (
                trial, self.weights, position, self.k, delta, decay, plan.filter_first, plan.origins,
                plan.filters, plan.singles, self.records)),
        ])
        batch.trial.start()
        start_all([
            (decide_kernel, 1, (trial, self.weights, position, delta, decay, wants_vertex, plan.sums,
                                plan.n_images, self.records)),
        ])
        self._follow_all()

    def _arrive(self):
        """Compute the input of the node for a mini-batch, and keep what it takes if there is room."""
        batch, n_images = self.batch, len(self.batch.labels)
        if n_images not in self.plans:
            self.plans[n_images] = LaunchPlan(self.kinds, self.linears, self.parameters, self.first, n_images,
                                              self.fixed)
        batch.plan = plan = self.plans[n_images]
        x, run = cuda.pack(batch.images), Pass(cuda, n_images)
        for layer in self.graph.head:
            x = layer.forward(x, run)
        x = x.reshape(plan.images.shape)
        with gpu_errors():
            plan.kept.labels.copy_to_device(batch.labels)
        self._start_before(x)
        batch.kept = plan.kept
        if self.node is not self.last:
            first = None if self.kinds.by_input else x
            if self._hold(plan.kept.n_bytes + (0 if first is None else 4 * first.size)):
                batch.first, batch.kept = first, plan.kept.own()

    def _start_before(self, x):
        """Compute the nodes before the searched one, from the value x of node 0."""
        plan = self.batch.plan
        if x is not plan.images:
            with gpu_errors():
                plan.images.copy_to_device(x)
        start_all(plan.before)
        self._remember(plan.norms_before)

    def _hold(self, n_bytes):
        """Return whether the mini-batch is kept until it comes back, and take note if it is."""
        if not self.comes_back or self.held_bytes + n_bytes > self.memory:
            return False
        self.held_bytes += n_bytes
        self.batches[self.key] = self.batch
        return True

    def _compute_bases(self):
        """Compute what all channels but k contribute to the nodes behind."""
        batch = self.batch
        if batch.plan is None:
            self._arrive()
        elif not self.kinds.by_input:
            self._start_before(batch.plan.images if batch.first is None else batch.first)
        bases, batch.trial = batch.plan.launches(self.k, batch.kept)
        start_all(bases)
        batch.era = self.era
        before, all_norms = batch.plan.norms_before, batch.plan.as_is.statistics
        self._remember([name for name in all_norms if name not in before])

    def _slot(self):
        """Return the slot of the mini-batch in the last layer."""
        if self.key not in self.slots.of:
            if not self.slots.has_room(self.key, self._n_blocks()):
                self.slots.forget()
            self._compute_logits()
            plan = self.batch.plan
            self.slots.add(self.key, by_row(plan.kept.x), plan.logits, plan.kept.labels)
            if self.comes_back:
                self.batches[self.key] = self.batch
        self._follow_all()
        return self.slots.of[self.key]

    def _compute_logits(self):
        """Compute the logits of the mini-batch when the last layer is searched."""
        self._arrive()
        start_all(self.batch.plan.compute_logits())

    def _whole_loss(self):
        """Return the loss of the mini-batch when the last layer is searched."""
        self._compute_logits()
        plan = self.batch.plan
        start_all([plan.add_losses(plan.kept)])
        self._follow_all()
        return to_host(plan.sums).sum() / plan.n_images

    # ---- BatchNorm's running statistics ----

    def _remember(self, norms):
        """Keep the statistics that BatchNorms took: the buffers serve other mini-batches."""
        if self.momentum:
            known = self.batch.plan.as_is.statistics
            self.batch.statistics.update({name: copied(known[name]) for name in norms})

    def _follow_all(self):
        """Let the running statistics follow a new mini-batch."""
        if self.is_new and self.momentum:
            for name, statistics in self.batch.statistics.items():
                changes = self.node_of_norm[name] in self.kinds.one
                self._follow(name, statistics, but=self.k if changes and not self.slots else NO_CHANNEL)
            if self.node is not self.last:
                plan = self.batch.plan
                for name, statistics in plan.as_channels.statistics.items():
                    self._follow(name, statistics, self.k, 1)
                for name, statistics in plan.as_blocks.statistics.items():
                    self._follow(name, statistics)
        self.is_new = False

    def _follow(self, name, statistics, first=0, n=None, but=NO_CHANNEL):
        n = n or statistics.shape[2]
        launch(follow_kernel, -(-n // LANES), statistics, first, n, but, self.momentum, self.running[name])

    def _write_running(self):
        if self.momentum:
            for name, norm in self.norms.items():
                with gpu_errors():
                    self.running[name].copy_to_device(np.stack([norm.running_mean, norm.running_variance]))

    def _read_running(self):
        if self.momentum:
            for name, norm in self.norms.items():
                norm.running_mean[:], norm.running_variance[:] = to_host(self.running[name])
