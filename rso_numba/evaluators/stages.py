"""A network as delta evaluation sees it: stages, each a layer that mixes channels and what follows it.

What follows, up to the next mixing layer, treats every channel by itself. If it is a BatchNorm, a ReLU and
a pool, or a part of that, the next stage applies it while it reads its input (`kernels/tails.py`); any other
sequence runs layer by layer.
"""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from ..kernels import changes, cpu, tails
from ..kernels.lanes import LANES
from ..kernels.tails import tailed
from ..layers import AvgPool, BatchNorm, Dense, Flatten, GlobalMaxPool, GlobalMeanPool, MaxPool, Pass, ReLU

POOLS = {MaxPool: tails.MAX, AvgPool: tails.MEAN, GlobalMaxPool: tails.GLOBAL_MAX,
         GlobalMeanPool: tails.GLOBAL_MEAN}


class NotAChain(ValueError):
    """Delta evaluation cannot cut a network into stages."""


@dataclass(eq=False)
class Stage:
    """A mixing layer and the channelwise layers behind it; `step` is 2 if an AvgPool is merged into it."""

    mixing: object
    layers: list = field(default_factory=list)
    step: int = 1

    def close(self):
        """Decide how the layers behind the mixing layer are computed, now that all are known."""
        self.size = 1 if isinstance(self.mixing, Dense) else self.mixing.size  # of its filters
        (self.norm, self.relu, self.pool), rest = first_tail(self.layers)
        self.apart = [] if all(isinstance(layer, Flatten) for layer in rest) else self.layers
        if self.apart:
            self.norm, self.relu, self.pool = None, False, tails.KEEP

    def mix(self, z, tail, n_images, channels=slice(None), start=None, y=None):
        """Return the output of the mixing layer; mean and variance of its channels if a BatchNorm needs them.

        Its input is what `tail` makes of z, or with None z itself, which may be Pending. With `channels` z
        holds only these channels of the input, and `start` is what the others contribute. The output is
        written to y if that is given.
        """
        if tail is None:  # the input itself, and a dense layer does not mind in which shape
            z, tail = tailed(cpu.as_row(z) if isinstance(self.mixing, Dense) else z)
        weight = self.mixing.weight[:, channels]
        if self.step == 2:
            weight = changes.merged_with_avgpool(weight)
        weight, counted = np.ascontiguousarray(weight), n_images if self.norm else None
        if isinstance(self.mixing, Dense):
            start, y = (a if a is None else a.reshape(len(a), -1, LANES) for a in (start, y))
            y = cpu.as_maps(cpu.dense_stage(z, tail, weight, self.mixing.bias, start, y))
            return y, cpu.batchnorm_statistics(y, n_images) if self.norm else None
        return cpu.conv2d_stage(z, tail, weight, self.mixing.bias, counted, start, self.step, y)

    def leave(self, z, statistics, run):
        """Return (z, tail): what stands before the next stage is what `tail` makes of z."""
        for layer in self.apart:
            z = layer.forward(z, run)
        if self.norm:
            run.statistics[self.norm.name] = statistics
        z = cpu.as_maps(z)
        return z, self.tail(z.shape[1], statistics)

    def tail(self, n_channels, statistics, channels=slice(None)):
        """Return the Tail of these channels; `statistics` are their mean and variance."""
        scale, shift = np.ones(n_channels, np.float32), np.zeros(n_channels, np.float32)
        if self.norm:
            scale, shift = (a.astype(np.float32) for a in self.norm.scale_and_shift(*statistics, channels))
        return tails.Tail(scale, shift, self.relu, self.pool)


def first_tail(layers):
    """Return what one tail can do of channelwise layers, (BatchNorm or None, ReLU?, pool), and the rest."""
    rest = list(layers)
    norm = rest.pop(0) if rest and isinstance(rest[0], BatchNorm) else None
    relu = bool(rest and isinstance(rest[0], ReLU) and rest.pop(0))
    pool = POOLS[type(rest.pop(0))] if rest and type(rest[0]) in POOLS else tails.KEEP
    return (norm, relu, pool), rest


def cut(network):
    """Return the layers before the first stage, and the stages.

    Raises
    ------
    NotAChain
        If the network is no chain of mixing and channelwise layers that ends in a dense layer.
    """
    head, stages = [], []
    for layer in network.layers:
        if layer not in network.leaves:
            raise NotAChain(f"{layer} holds layers; delta evaluation takes chains only, "
                            "use evaluation='full'")
        if layer.mixes_channels:
            stages.append(Stage(layer))
        elif not stages:
            head.append(layer)
        elif isinstance(layer, AvgPool) and not stages[-1].layers and stages[-1].step == 1 and not isinstance(
                stages[-1].mixing, Dense):
            stages[-1].step = 2
        else:
            stages[-1].layers.append(layer)
    for stage in stages:
        stage.close()
    if not stages or not isinstance(stages[-1].mixing, Dense) or stages[-1].layers:
        raise NotAChain("the network does not end in a dense layer; use evaluation='full'")
    return head, stages


def forward(stages, z, tail, run):
    """Return the output of the last stage's mixing layer, and its statistics (see `Stage.mix`)."""
    return onward(stages, *stages[0].mix(z, tail, run.n_images), run)


def onward(stages, z, statistics, run):
    """Return the same from the output of the first stage's mixing layer."""
    for stage, following in pairwise(stages):
        z, tail = stage.leave(z, statistics, run)
        z, statistics = following.mix(z, tail, run.n_images)
    return z, statistics


def new_pass(n_images):
    """Return a Pass through stages: the mini-batch's own statistics, and nobody's running average moves."""
    return Pass(cpu, n_images, batch_statistics=True)
