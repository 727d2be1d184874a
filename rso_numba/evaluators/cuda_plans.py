"""What `cuda.py` sends to the GPU in each trial, prepared once for mini-batches of a size."""

import math
from dataclasses import dataclass

import numpy as np

from ..kernels.cuda.delta import N_CANDIDATES, copy_channel_kernel, replace_channel_kernel
from ..kernels.cuda.device import LANES, ROWS, empty, gpu_errors, to_device
from ..kernels.cuda.layout import by_line, by_row
from ..kernels.cuda.softmax import loss_sums_kernel
from .cuda_launches import Launches
from .cuda_nodes import NO_CHANNEL, DeviceValues, merging


@dataclass(eq=False)
class Kept:
    """What is kept of a mini-batch while a node is searched.

    Parameters
    ----------
    x : array or None
        Input of the node's linear layer, if it has one.
    channels : dict
        Channel k of the base of a node of which one channel changes, (n_blocks, 1, h, w, LANES), without
        what comes from such nodes.
    bases : dict
        The base of a node of which all channels change, without channel k of such nodes; and the logits as
        they are, if one of them changes.
    labels : array (n_images,)
    """

    x: object
    channels: dict
    bases: dict
    labels: object

    @property
    def n_bytes(self):
        """Bytes of all arrays but the labels."""
        arrays = [*self.channels.values(), *self.bases.values()] + ([] if self.x is None else [self.x])
        return 4 * sum(array.size for array in arrays)

    def own(self):
        """Return a `Kept` with arrays of its own; input and labels are copied, all else is to be computed."""
        channels, bases = ({node: empty(array.shape, np.float32) for node, array in arrays.items()}
                           for arrays in (self.channels, self.bases))
        return Kept(None if self.x is None else copied(self.x), channels, bases, copied(self.labels))


class LaunchPlan:
    """Buffers and launches for mini-batches of n_images images while a node is searched.

    A trial allocates nothing else. Values are there in three forms: as they are, of the nodes that are needed
    for the bases; three candidates for channel k as *channels*, (n_blocks, 3, h, w, LANES), of the nodes of
    which one channel changes; and three candidates as *blocks*, (3 * n_blocks, C, h, w, LANES), of the nodes
    of which all channels change.

    Parameters
    ----------
    kinds : Kinds
        Of the node.
    linears, parameters : dict
        See `DeviceValues`.
    first : dict
        Where each parameter begins in the vector of all weights.
    n_images : int
    fixed : collection of str
        Names of BatchNorms that use their stored statistics.

    Attributes
    ----------
    images : array
        Where the value of node 0 has to be written.
    before : list of launches
        From there to the input of the node.
    kept : Kept
        For mini-batches that do not come back.
    logits, sums : array
        Of the candidates, as blocks; in the last node of the mini-batch as it is.
    """

    def __init__(self, kinds, linears, parameters, first, n_images, fixed):
        self.kinds, self.linears, self.n_images = kinds, linears, n_images
        self.n_blocks, node = -(-n_images // LANES), kinds.node
        self.as_is = DeviceValues(linears, parameters, n_images, fixed=fixed)
        for one in kinds.graph.nodes:
            if one in kinds.needed or one in kinds.one:
                self.as_is.add_node(one)
        self.images = self.as_is.z[kinds.graph.nodes[0]]
        self.before = self.as_is.take_statistics(kinds.graph.nodes[0])
        for one in kinds.graph.nodes[1 : node.index]:
            if one in kinds.needed:
                self.before += self._compute(one)
        x = None
        if node.input:
            x, launches = self.as_is.along(node.input)
            self.before += launches
        self.norms_before = list(self.as_is.statistics)
        self.kept, self._built_for, self._built = (
            Kept(x, {}, {}, empty(n_images, np.int64)), NO_CHANNEL, None)
        if node is kinds.last:
            self.logits, self.sums = by_row(self.as_is.z[node]), empty(self.n_blocks, np.float64)
        else:
            self._prepare_candidates(parameters, first)

    def _compute(self, node):
        """Return the launches that compute a node as it is from all its edges."""
        return self.as_is.compute(node, node.edges) + self.as_is.take_statistics(node)

    def compute_logits(self):
        """Return the launches that compute the searched node, from its input on, if it is the last."""
        return self._compute_searched(self.kinds.last, self.kept)

    # ---- candidates ----

    def _prepare_candidates(self, parameters, first):
        kinds, node = self.kinds, self.kinds.node
        # what a channel has besides its filter
        names = [f"{node.linear.name}.bias"] if node.linear else []
        names += [f"{norm.name}.{name}" for one in kinds.one for norm in one.norms
                  for name in ("gamma", "beta")]
        self.origins = to_device(np.array([first.get(name, -1) for name in names]))
        self.singles = empty((len(names), N_CANDIDATES), np.float32)
        own = {name: self.singles[i] for i, name in enumerate(names)}
        self._prepare_filters(first, own)
        self.as_channels = DeviceValues(self.linears, own, self.n_images, n_channels=N_CANDIDATES)
        self.as_blocks = DeviceValues(self.linears, parameters, self.n_images, N_CANDIDATES)
        for one in kinds.one:
            self.as_channels.add_node(one)
            if self._unreached(one) or (one is node and not node.linear):
                self.kept.channels[one] = empty((self.n_blocks, 1, *one.shape[1:], LANES), np.float32)
        for one in kinds.all:
            self.as_blocks.add_node(one)
            if kinds.base_edges[one]:
                self.kept.bases[one] = self.as_is.maps(one.shape)
        if kinds.last in kinds.one:
            self.kept.bases[kinds.last] = self.as_is.z[kinds.last]
            self.as_blocks.add_node(kinds.last)
        self.logits = by_row(self.as_blocks.z[kinds.last])
        self.sums = empty(N_CANDIDATES * self.n_blocks, np.float64)

    def _prepare_filters(self, first, own):
        """Make room for the filters of three candidates."""
        node = self.kinds.node
        if not node.linear:  # only a BatchNorm is searched; an array may not be empty
            self.filters, self.filter_first = empty((N_CANDIDATES, 1), np.float32), 0
            return
        shape, linear = node.linear.weight.shape[1:], self.linears[node]
        self.filter_first = first[f"{node.linear.name}.weight"]
        self.filters = empty((N_CANDIDATES, math.prod(shape)), np.float32)
        self.bias_k = own[f"{node.linear.name}.bias"]
        self.kernel_filters, self.merging = self.filters.reshape(N_CANDIDATES, *shape), []
        if node.step == 2:
            unmerged = self.kernel_filters
            self.kernel_filters = empty((N_CANDIDATES, *linear.merged.shape[1:]), np.float32)
            self.merging = [merging(unmerged, self.kernel_filters)]

    def _unreached(self, node):
        """Return the edges to a node of which one channel changes, from nodes of which none does.

        Of the searched node these are the addends: its linear layer is what is searched.
        """
        edges = node.addends if node is self.kinds.node else node.edges
        return [edge for edge in edges if edge.source not in self.kinds.one]

    def launches(self, k, kept):
        """Return the launches that compute what is kept for channel k, and those of a trial, as `Launches`.

        The latter lead from the filters of the candidates to the sums of losses.
        """
        if kept is not self.kept:
            return self._bases(k, kept), Launches(self._trial(k, kept))
        if self._built_for != k:
            self._built_for, self._built = k, (self._bases(k, kept), Launches(self._trial(k, kept)))
        return self._built

    # ---- what is kept ----

    def _bases(self, k, kept):
        kinds, launches = self.kinds, []
        if kinds.node.linear:
            launches += self.linears[kinds.node].merge()
        for node in kinds.graph.nodes[kinds.node.index :]:
            if node in kinds.one:
                launches += self._one(node, k, kept)
            elif node in kept.bases:
                launches += self._base(node, k, kept.bases[node])
            elif node in kinds.needed:
                launches += self._compute(node)
        return launches

    def _one(self, node, k, kept):
        """Return the launches that compute a node of which one channel changes, as it is."""
        if node.index == 0:
            return [copying(self.images, k, kept.channels[node])]
        launches, edges, z = [], self._unreached(node), self.as_is.z[node]
        if node is self.kinds.node:
            if node.linear and edges:  # the addends without the rest
                launches += [*self.as_is.compute(node, edges), copying(z, k, kept.channels[node])]
            launches += self._compute_searched(node, kept)
            if not node.linear:
                launches.append(copying(z, k, kept.channels[node]))
        else:
            start = None
            if edges:
                launches += [*self.as_is.compute(node, edges), copying(z, k, kept.channels[node])]
                start = z
            launches += self.as_is.compute(node, [e for e in node.edges if e not in edges], start)
        launches += self.as_is.take_statistics(node)
        if node is self.kinds.last and kept.bases[node] is not z:
            launches.append(copying_all(z, kept.bases[node]))
        return launches

    def _compute_searched(self, node, kept):
        """Return the launches that compute the searched node as it is, from its input on."""
        if not node.linear:
            return self.as_is.compute(node, node.edges)
        z = self.as_is.z[node]
        return [self.linears[node].apply(kept.x, z), *(self.as_is.add(edge, z, z) for edge in node.addends)]

    def _base(self, node, k, base):
        """Return the launches that compute the base of a node of which all channels change."""
        launches, start, kinds = [], None, self.kinds
        if node.linear:
            linear, x, ranges = self.linears[node], base, []
            if node.input in kinds.base_edges[node]:
                x, launches = self.as_is.along(node.input)
                ranges = [(0, linear.n_in)]
                if node in kinds.spread:
                    first, end = k * linear.width, (k + 1) * linear.width
                    ranges = [r for r in ((0, first), (end, linear.n_in)) if r[1] > r[0]]
            launches = list(launches)
            for first, end in ranges or [(0, 0)]:  # the bias, if there is nothing else
                part = 0 if start is None else len(base), first, first, end - first
                launches.append(linear.apply(x, base, part, start))
                start = base
        for edge in node.addends:
            if edge in kinds.base_edges[node]:
                but = k if edge.source in kinds.one else NO_CHANNEL
                launches.append(self.as_is.add(edge, base, start, but))
                start = base
        return launches

    # ---- a trial ----

    def _trial(self, k, kept):
        kinds, launches = self.kinds, []
        for node in kinds.one:
            launches += self._candidates_as_channels(node, kept)
        for node in kinds.all:
            launches += self._candidates_as_blocks(node, k, kept.bases.get(node))
        if kinds.last in kinds.one:
            candidates, logits = by_row(self.as_channels.z[kinds.last]), self.logits
            launches.append((replace_channel_kernel, -(-logits.size // (LANES * ROWS)),
                             (by_row(kept.bases[kinds.last]), k, candidates, logits)))
        return [*launches, self.add_losses(kept)]

    def add_losses(self, kept):
        """Return the launch that adds up the losses of the images, from the logits and labels on."""
        return loss_sums_kernel, len(self.logits), (self.logits, kept.labels, self.sums)

    def _candidates_as_channels(self, node, kept):
        """Return the launches for a node of which one channel changes."""
        values, kinds, launches, start = self.as_channels, self.kinds, [], None
        z, channel = values.z[node], kept.channels.get(node)
        if node is kinds.node and node.linear:
            launches += [*self.merging, self.linears[node].apply(
                kept.x, z, filters=self.kernel_filters, bias=self.bias_k)]
            start = z
        if channel is not None:
            launches.append(copying(channel, 0, z, adds=start is not None))
            start = z
        if node is not kinds.node:
            reached = [edge for edge in node.edges if edge.source in kinds.one]
            launches += values.compute(node, reached, start)
        return launches + values.take_statistics(node)

    def _candidates_as_blocks(self, node, k, base):
        """Return the launches for a node of which all channels change."""
        values, kinds, launches = self.as_blocks, self.kinds, []
        z, start = values.z[node], base
        if node in kinds.spread:
            x, launches = self.as_channels.along(node.input)
            width = self.linears[node].width
            part = self.n_blocks, 0, k * width, width
            launches, start = [*launches, self.linears[node].apply(x, z, part, base)], z
        launches += values.compute(node, [e for e in node.edges if e.source in kinds.all], start)
        launches += [self.as_channels.add_to_channel(edge, k, z) for edge in node.addends
                     if edge.source in kinds.one]
        return launches + values.take_statistics(node)


def copying(x, k, y, adds=False):
    """Return the launch that copies channel k of x to all channels of y, or adds it to them."""
    return copy_channel_kernel, -(-y.size // (LANES * ROWS)), (by_line(x), k, int(adds), by_line(y))


def copying_all(x, y):
    """Return a function that copies an array on the GPU to another one."""
    def copy():
        with gpu_errors():
            y.copy_to_device(x)

    return copy


def copied(array):
    """Return a copy of an array on the GPU."""
    copy = empty(array.shape, array.dtype)
    copying_all(array, copy)()
    return copy
