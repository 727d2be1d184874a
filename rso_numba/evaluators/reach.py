"""What a change of one channel of a node makes of the nodes behind it: the mathematics of `delta.py`.

Which nodes it reaches, and how, is told in `kinds.py`. The base of a linear layer next to the node changes by
what one channel contributes, and what comes from nodes of which all channels change is computed in full.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ..kernels import cpu
from ..kernels.cpu.activations import computed
from ..kernels.cpu.delta import add_to_channel, channel_sum, epilogue_change
from ..kernels.cpu.fusion import apply_epilogue, of_channels
from ..kernels.cpu.lanes import LANES
from ..kernels.cpu.layout import as_maps
from ..kernels.cpu.softmax import loss_sums
from ..passes import Pass
from .kinds import Kinds
from .nodes import Values, apply_linear, epilogue

ONE = np.float32(1)


@dataclass(eq=False)
class Change:
    """Channel k of a node's value z becomes z[:, k] + amount * direction.

    Parameters
    ----------
    z : ndarray (n_blocks, C, h, w, LANES)
    k : int
    direction : ndarray (n_blocks, 1, h, w, LANES)
    amount : float32
    statistics : (mean (1,), variance (1,)) or None
        Of the channel with the change, if a BatchNorm reads it.
    """

    z: np.ndarray
    k: int
    direction: np.ndarray
    amount: np.float32
    statistics: tuple | None


class Reach(Kinds):
    """What changes of one channel of a node make of the nodes behind it."""

    def changes(self, values, epilogues, first, channel):
        """Return the `Change` of every node of `one`, a dict.

        Parameters
        ----------
        values : Values
            The bases as they are.
        epilogues : dict
            Epilogues, as they are, of all edges that leave nodes of `one`.
        first : Change
            That of the node.
        channel : int
        """
        changes = {self.node: first}
        for later in self.one[1:]:
            z = values.z[later]
            if later.layer:
                (edge,), run = later.addends, Pass(cpu, values.share.n_own)
                a = later.layer.forward(self._channel_along(edge, values, changes[edge.source], channel), run)
                direction = as_maps(computed(a)) - z[:, channel : channel + 1]
            else:
                reached = [edge for edge in later.addends if edge.source in changes]
                parts = [self._change_along(edge, values, epilogues, changes, channel) for edge in reached]
                direction = sum(parts[1:], parts[0])
            statistics = None
            if later.norms:
                changed = channel_sum(z, channel, direction, ONE)
                statistics = values.share.statistics(changed)
            changes[later] = Change(z, channel, direction, ONE, statistics)
        return changes

    def _change_along(self, edge, values, epilogues, changes, channel):
        """Return by what a channel changes that an edge gives, (n_blocks, 1, h, w, LANES)."""
        change, channels = changes[edge.source], slice(channel, channel + 1)
        before = of_channels(epilogues[edge], channels)
        after = epilogue(edge, change.statistics, values.fixed, channels)
        return epilogue_change(change.z, change.k, change.direction, change.amount, before, after)

    def _channel_along(self, edge, values, change, channel):
        """Return the channel that an edge gives, with its change."""
        after = epilogue(edge, change.statistics, values.fixed, slice(channel, channel + 1))
        return apply_epilogue(
            channel_sum(change.z, change.k, change.direction, change.amount), after)

    def loss_sums(self, values, labels, epilogues=None, changes=None, channel=None):
        """Return the losses with changes of one channel, a sum for each block, and the statistics of `all`.

        `values` are the bases as they are; without changes it is the loss as it is.
        """
        found = Values(values.share, values.fixed)
        with self._added(values, epilogues, changes, channel):
            for later in self.all:
                self._compute(later, values, found, epilogues, changes, channel)
            logits = found.z[self.last] if self.last in self.all else values.z[self.last]
            sums = loss_sums(logits.reshape(len(logits), -1, LANES), labels)
        return sums, found.statistics

    def _compute(self, later, values, found, epilogues, changes, channel):
        """Compute a node of `all`."""
        base = values.z.get(later) if self.base_edges[later] else None
        rest = [edge for edge in later.edges if edge.source in self.all]
        if later not in self.spread:
            found.compute(later, rest, base)
            return
        z, statistics = base, values.statistics[later]
        if changes is not None:
            change = self._change_along(later.input, values, epilogues, changes, channel)
            features = _features(later, change, channel)
            z, statistics = apply_linear(later, change, None, values.share, features, base)
        for edge in rest:
            z = cpu.add(z, found.along(edge))
        if rest:
            found.put(later, z)
        else:
            found.z[later], found.statistics[later] = z, statistics

    @contextmanager
    def _added(self, values, epilogues, changes, channel):
        """Add one channel's changes to the bases that have it as an addend, and take them away again."""
        before = []
        if changes is not None:
            for later, edge in self.one_addends:
                before.append((values.z[later], values.z[later][:, channel].copy()))
                change = self._change_along(edge, values, epilogues, changes, channel)
                add_to_channel(values.z[later], channel, change, ONE)
            if self.last in self.one:
                before.append((values.z[self.last], values.z[self.last][:, channel].copy()))
                add_to_channel(values.z[self.last], channel, changes[self.last].direction, ONE)
        try:
            yield
        finally:
            for base, channel_before in reversed(before):
                base[:, channel] = channel_before

    def adopt(self, values, epilogues, changes, channel):
        """Make changes of one channel the state of the bases."""
        for later, edge in self.one_addends:
            change = self._change_along(edge, values, epilogues, changes, channel)
            add_to_channel(values.z[later], channel, change, ONE)
        for later in self.spread:
            change = self._change_along(later.input, values, epilogues, changes, channel)
            features = _features(later, change, channel)
            _, values.statistics[later] = apply_linear(
                later, change, None, values.share, features, values.z[later], values.z[later])
        for one, change in changes.items():
            if one in values.z:
                add_to_channel(values.z[one], channel, change.direction, change.amount)
            channels = slice(channel, channel + 1)
            if change.statistics:
                for array, moved in zip(values.statistics[one], change.statistics, strict=True):
                    array[channels] = moved
            for edge in one.outputs:
                after = epilogue(edge, change.statistics, values.fixed, channels)
                for array, moved in zip(epilogues[edge][:2], after[:2], strict=True):
                    array[channels] = moved


def _features(node, change, channel):
    """Return which inputs of a linear layer a channel is: to a dense layer its pixels are features."""
    width = change[0, 0].size // LANES if node.is_dense else 1
    return slice(channel * width, (channel + 1) * width)
