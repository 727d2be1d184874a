"""What `cuda.py` sends to the GPU in each trial, prepared once for mini-batches of a size.

A *launch* here is a kernel, its number of CUDA blocks, and its arguments. (A CUDA graph would start all
launches of a trial at once; but numba-cuda offers none, and weight and step of a trial are arguments of its
launches.)
"""

import math

import numpy as np

from ..kernels.cuda import by_channel, by_line, by_row
from ..kernels.cuda_changes import N_CANDIDATES, merge_kernel, norm_kernel, tail_kernel
from ..kernels.cuda_device import LANES, ROWS, empty, launch_blocks, to_device
from ..kernels.cuda_norms import statistics_kernel
from ..kernels.cuda_products import CHANNELS, CONV2D_KERNELS, PIXELS, dense_kernel
from ..kernels.tails import KEEP, pooled_shape
from ..layers import Dense, Flatten
from .stages import NotAChain, first_tail


def start_all(launches):
    """Start launches one after the other; wait for none."""
    for kernel, n_blocks, arguments in launches:
        launch_blocks(kernel, n_blocks, *arguments)


class DeviceStage:
    """A stage (see `stages.py`) with its weights on the GPU.

    Parameters
    ----------
    stage : Stage
    shape : tuple of int
        (C, H, W) of what enters.
    parameters : dict
        All weights of the network, by `str(parameter)`: arrays on the GPU.
    first : dict
        Where each begins in the vector of all weights.
    """

    def __init__(self, stage, shape, parameters, first):
        self.step, self.is_dense, name = stage.step, isinstance(stage.mixing, Dense), stage.mixing.name
        self.weight = parameters[f"{name}.weight"]
        self.names = [f"{name}.bias"]  # of what a channel has besides its filter
        self.bias = parameters.get(f"{name}.bias")
        if self.bias is None:
            self.bias = to_device(stage.mixing.bias)
        self.n_in, self.merged = self.weight.shape[1], None
        if self.step == 2:
            size = self.weight.shape[2] + 1
            self.merged = empty((len(self.weight), self.n_in, size, size), np.float32)
        after = (1, 1) if self.is_dense else (shape[1] // self.step, shape[2] // self.step)
        self.shape = self.out_shape = (len(self.weight), *after)
        self.tails, rest = [], list(stage.layers)
        while rest:
            (norm, relu, pool), behind = first_tail(rest)
            if len(behind) == len(rest):
                if not isinstance(rest[0], Flatten):  # which changes nothing for what treats channels alike
                    raise NotAChain(f"delta evaluation on the GPU does not know {rest[0]}; "
                                    "use evaluation='full'")
                rest = behind[1:]
                continue
            if norm and len(norm.gamma) != self.shape[0]:
                raise NotAChain(f"{norm.name} takes pixels as channels, which delta evaluation on the GPU "
                                "cannot do; use evaluation='full'")
            if norm:
                self.names += [f"{norm.name}.gamma", f"{norm.name}.beta"]
            self.tails.append((norm, relu, pool))
            self.out_shape = pooled_shape(self.out_shape, pool)
            rest = behind
        self.parameters, self.filter_first = parameters, first[f"{name}.weight"]
        self.origins = to_device(np.array([first.get(name, -1) for name in self.names]))

    def merge(self):
        """Return the launches that take the filters as they are now into account."""
        return [merging(self.weight, self.merged)] if self.step == 2 else []

    def view(self, x):
        """View x (n_blocks, C, H, W, LANES) as the kernel of the mixing layer takes it."""
        return by_row(x) if self.is_dense else by_line(x)

    def mix(self, x, y, part=None, start=None, filters=None, bias=None):
        """Return the launch that mixes the channels of x into y: all, or a part (`cuda_products.py`)."""
        weight = self.merged if self.step == 2 else self.weight
        weight, bias = weight if filters is None else filters, self.bias if bias is None else bias
        part, start = part or (0, 0, 0, self.n_in), y if start is None else start
        if self.is_dense:
            return dense_kernel, y.shape[0] * y.shape[1], (x, weight, bias, start, part, y)
        tiles = -(-y.shape[1] // CHANNELS) * y.shape[2] * -(-y.shape[3] // (PIXELS * LANES))
        kernel = CONV2D_KERNELS[weight.shape[2], self.step]
        return kernel, -(-y.shape[0] * tiles // ROWS), (x, weight, bias, start, part, y)


def merging(weight, merged):
    """Return the launch of merge_kernel."""
    return merge_kernel, -(-merged.size // (LANES * ROWS)), (weight, merged)


class Plan:
    """Buffers and launches for mini-batches of n_images images in stage d: a trial allocates nothing else.

    Attributes
    ----------
    z : list of arrays (n_blocks, C, h, w, LANES)
        Output of the mixing layers of stages 0..d (or to the last one before d, if d is the last stage).
    behind : list of lists of launches
        From each of them to the end of its stage, `a`.
    statistics : dict
        Mean and variance of each BatchNorm of these stages, (2, 1, C).
    z_k, behind_k, a_k, statistics_k
        The same for three candidates of a channel of stage d, (n_blocks, 3, h, w, LANES).
    others
        For mini-batches that are not kept: what all other channels contribute to z_next.
    z_next, after, later_statistics, logits
        What follows, where the candidates are blocks: (3 * n_blocks, C, h, w, LANES).
    """

    def __init__(self, stages, d, n_images):
        self.n_images, self.n_blocks = n_images, -(-n_images // LANES)
        self.z, self.a, self.behind, self.statistics = [], [], [], {}
        self.statistics_k, self.later_statistics = {}, {}
        self.is_last = d == len(stages) - 1
        for stage in stages[: d if self.is_last else d + 1]:
            self.z.append(self._maps(1, stage.shape))
            launches, a = self._tails(stage, self.z[-1], stage.parameters, self.statistics)
            self.behind.append(launches)
            self.a.append(a)
        self.sums = empty((1 if self.is_last else N_CANDIDATES) * self.n_blocks, np.float64)
        if self.is_last:
            self.logits = by_row(self._maps(1, stages[-1].shape))
        else:
            self._prepare_candidates(stages[d], stages[d + 1 :])

    def _maps(self, n_candidates, shape):
        return empty((n_candidates * self.n_blocks, *shape, LANES), np.float32)

    def _prepare_candidates(self, stage, later):
        size = math.prod(stage.weight.shape[1:])
        self.filters = empty((N_CANDIDATES, size), np.float32)
        self.singles = empty((len(stage.names), N_CANDIDATES), np.float32)
        self.kernel_filters, self.merging = self.filters.reshape(N_CANDIDATES, *stage.weight.shape[1:]), []
        if stage.step == 2:
            unmerged, shape = self.kernel_filters, stage.merged.shape[1:]
            self.kernel_filters = empty((N_CANDIDATES, *shape), np.float32)
            self.merging = [merging(unmerged, self.kernel_filters)]
        own = {name: self.singles[i] for i, name in enumerate(stage.names)}
        self.bias_k = own[stage.names[0]]
        self.z_k = self._maps(1, (N_CANDIDATES, *stage.shape[1:]))
        self.behind_k, a_k = self._tails(stage, self.z_k, own, self.statistics_k)
        following, later = later[0], later[1:]
        self.z_k, self.a_k = stage.view(self.z_k), following.view(a_k)
        # what a channel is to the next stage: a channel, or as many features as it has pixels
        self.width = math.prod(stage.out_shape[1:]) if following.is_dense else 1
        z = self._maps(N_CANDIDATES, following.shape)
        self.others = following.view(self._maps(1, following.shape))
        self.z_next, self.after = following.view(z), []
        for stage, after in zip([following, *later], later, strict=False):
            launches, a = self._tails(stage, z, stage.parameters, self.later_statistics)
            z = self._maps(N_CANDIDATES, after.shape)
            self.after += [*launches, after.mix(after.view(a), after.view(z))]
        self.logits = by_row(z)

    def _tails(self, stage, z, parameters, statistics):
        """Return the launches of a stage's channelwise layers on z, and where the result will be."""
        launches = []
        for norm, relu, pool in stage.tails:
            n_blocks, n_channels = z.shape[:2]
            shape = n_blocks // self.n_blocks, n_channels
            scale, shift = to_device(np.ones(shape, np.float32)), to_device(np.zeros(shape, np.float32))
            if norm:
                sums, pixels = empty((2, n_blocks, n_channels), np.float64), z.shape[2] * z.shape[3]
                statistics[norm.name] = empty((2, *shape), np.float32)
                launches += [
                    (statistics_kernel, n_blocks * n_channels, (by_channel(z), self.n_images, sums)),
                    (norm_kernel, math.prod(shape), (
                        sums, self.n_images, pixels, parameters[f"{norm.name}.gamma"],
                        parameters[f"{norm.name}.beta"], np.float32(norm.epsilon),
                        statistics[norm.name], scale, shift))]
            y = z if pool == KEEP else empty((n_blocks, *pooled_shape(z.shape[1:4], pool), LANES), np.float32)
            launches.append((tail_kernel, -(-y.size // (LANES * ROWS)),
                             (z, scale, shift, int(relu), pool, y)))
            z = y
        return launches, z
