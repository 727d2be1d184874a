"""Values of the nodes of a `Graph` on the GPU, and the launches that make them.

What a launch is stands in `cuda_launches.py`.
"""

import math

import numpy as np

from ..kernels import cuda
from ..kernels.cuda.convolution import conv2d_launch
from ..kernels.cuda.delta import merge_kernel, norm_kernel
from ..kernels.cuda.dense import dense_kernel
from ..kernels.cuda.device import LANES, ROWS, empty, gpu_errors, to_device
from ..kernels.cuda.fusion import add_epilogue_kernel, add_to_channel_kernel, epilogue_kernel
from ..kernels.cuda.layout import by_channel, by_line, by_row
from ..kernels.cuda.norms import statistics_kernel
from ..kernels.formulas import NO_POOL
from ..passes import Pass

NO_CHANNEL = -1


def n_lines(y):
    """Return the number of lines of pixels of y (n_blocks, C, h, w, LANES), the tasks of an epilogue."""
    return y.shape[0] * y.shape[1] * y.shape[2]


class DeviceLinear:
    """The linear layer of a node, with its weights on the GPU.

    Parameters
    ----------
    node : Node
    parameters : dict
        All weights of the network, by `str(parameter)`: arrays on the GPU.
    """

    def __init__(self, node, parameters):
        self.step, self.is_dense, name = node.step, node.is_dense, node.linear.name
        self.weight, self.bias = parameters[f"{name}.weight"], parameters.get(f"{name}.bias")
        if self.bias is None:
            self.bias = to_device(node.linear.bias)
        self.n_in, self.merged = self.weight.shape[1], None
        if self.step == 2:
            size = self.weight.shape[2] + 1
            self.merged = empty((len(self.weight), self.n_in, size, size), np.float32)
        # what a channel is to the layer: a channel, or as many features as it has pixels
        self.width = math.prod(node.input.shape[1:]) if self.is_dense else 1

    def merge(self):
        """Return the launches that merge the filters, as they are now, with the average pool behind them."""
        return [merging(self.weight, self.merged)] if self.step == 2 else []

    def view(self, x):
        """View x (n_blocks, C, H, W, LANES) as the kernel takes it."""
        return by_row(x) if self.is_dense else by_line(x)

    def apply(self, x, y, part=None, start=None, filters=None, bias=None):
        """Return the launch from x to y, (n_blocks, C, h, w, LANES), for all input channels or a part.

        What `part` means is told in `kernels/cuda/convolution.py`. By default the sums begin at `start`, or
        at the bias if there is none.
        """
        part = part or (0 if start is None else len(start), 0, 0, self.n_in)
        weight = self.merged if self.step == 2 else self.weight
        weight, bias = weight if filters is None else filters, self.bias if bias is None else bias
        start = y if start is None else start
        arguments = self.view(x), weight, bias, self.view(start), part, self.view(y)
        if self.is_dense:
            return dense_kernel, y.shape[0] * y.shape[1], arguments
        return *conv2d_launch(weight.shape[2], self.step, y), arguments


def merging(weight, merged):
    """Return the launch of merge_kernel."""
    return merge_kernel, -(-merged.size // (LANES * ROWS)), (weight, merged)


class DeviceValues:
    """Values of nodes for mini-batches of a size, as they are or of three candidates.

    Parameters
    ----------
    linears : dict
        The `DeviceLinear` of each node that has a linear layer.
    parameters : dict
        gamma and beta of each BatchNorm, by `str(parameter)`: arrays on the GPU.
    n_images : int
    n_candidates : int
        That many times as many blocks as the images need: candidates follow each other.
    n_channels : int or None
        Instead of a node's channels: that many candidates of one of them.
    fixed : collection of str
        Names of BatchNorms that use their stored statistics.

    Attributes
    ----------
    z : dict
        Value of a node, (n_blocks, C, h, w, LANES).
    statistics : dict
        Mean and variance that a BatchNorm takes from the mini-batch, (2, n_candidates, C), by its name.
    """

    def __init__(self, linears, parameters, n_images, n_candidates=1, n_channels=None, fixed=frozenset()):
        self.linears, self.parameters, self.n_images = linears, parameters, n_images
        self.n_candidates, self.n_channels, self.fixed = n_candidates, n_channels, fixed
        self.n_blocks = n_candidates * -(-n_images // LANES)
        self.z, self.statistics, self._factors = {}, {}, {}
        # launches that were prepared before: of the statistics of a node, along an edge, to a node
        self._taking, self._along, self._computing = {}, {}, {}

    def maps(self, shape):
        """Return an array for maps of a shape (C, h, w)."""
        return empty((self.n_blocks, self.n_channels or shape[0], *shape[1:], LANES), np.float32)

    def add_node(self, node):
        """Make room for the value of a node."""
        self.z[node] = self.maps(node.shape)

    # ---- BatchNorm ----

    def take_statistics(self, node):
        """Return the launches that take the statistics of a node for the BatchNorms that read it."""
        if node not in self._taking:
            self._taking[node] = self._take_statistics(node)
        return self._taking[node]

    def _take_statistics(self, node):
        norms = [norm for norm in node.norms if norm.name not in self.fixed]
        if not norms:
            return []
        z = self.z[node]
        sums = empty((2, *z.shape[:2]), np.float64)
        launches = [(statistics_kernel, z.shape[0] * z.shape[1], (by_channel(z), self.n_images, sums))]
        for norm in norms:
            scale, shift = self._scale_and_shift(norm, z.shape[1])
            launches.append((norm_kernel, scale.size, (
                sums, self.n_images, z.shape[2] * z.shape[3], self.parameters[f"{norm.name}.gamma"],
                self.parameters[f"{norm.name}.beta"], np.float32(norm.epsilon), self.statistics[norm.name],
                scale, shift)))
        return launches

    def _scale_and_shift(self, norm, n_channels):
        """Return the factors and summands of an epilogue with this BatchNorm or None, (n_candidates, C)."""
        key, shape = norm or n_channels, (self.n_candidates, n_channels)
        if key not in self._factors:
            scale, shift = np.ones(shape, np.float32), np.zeros(shape, np.float32)
            if norm and norm.name in self.fixed:
                scale[:], shift[:] = norm.scale_and_shift(norm.running_mean, norm.running_variance)
            elif norm:
                self.statistics[norm.name] = empty((2, *shape), np.float32)
            self._factors[key] = to_device(scale), to_device(shift)
        return self._factors[key]

    # ---- along edges ----

    def _epilogue(self, edge):
        """Return the epilogue of an edge as kernels take it."""
        z = self.z[edge.source]
        return z, *self._scale_and_shift(edge.norm, z.shape[1]), int(edge.relu), edge.pool

    def along(self, edge):
        """Return what an edge gives, and the launches that compute it, maybe in the place of the value."""
        if edge not in self._along:
            y, launches = self.z[edge.source], []
            if edge.norm or edge.relu or edge.pool != NO_POOL:
                is_only_use = len(edge.source.outputs) == 1 and edge.source.index > 0
                if not is_only_use or edge.pool != NO_POOL:
                    y = self.maps(edge.shape)
                launches = [(epilogue_kernel, -(-n_lines(y) // ROWS), (*self._epilogue(edge), y))]
            self._along[edge] = y, launches
        return self._along[edge]

    def add(self, edge, y, start=None, but=NO_CHANNEL):
        """Return the launch of y = start + what an edge gives, which is left out in channel `but`."""
        n_start, start = (0, y) if start is None else (len(start), start)
        return add_epilogue_kernel, -(-n_lines(y) // ROWS), (*self._epilogue(edge), but, start, n_start, y)

    def add_to_channel(self, edge, k, y):
        """Return the launch that adds candidates for a channel, which an edge gives, to candidates y."""
        return add_to_channel_kernel, -(-n_lines(y) // (y.shape[1] * ROWS)), (*self._epilogue(edge), k, y)

    def compute(self, node, edges, start=None):
        """Return the launches that make the value of a node of what `edges` give.

        Parameters
        ----------
        node : Node
        edges : list of Edge
            From nodes whose values are here.
        start : array or None
            What they are added to, for each candidate; None is the bias.
        """
        if start is not None:
            return self._compute(node, edges, start)
        key = node, *edges
        if key not in self._computing:
            self._computing[key] = self._compute(node, edges, None)
        return self._computing[key]

    def _compute(self, node, edges, start):
        z, launches = self.z[node], []
        if node.layer:
            return [self._layer(node.layer, self.z[edge.source], z) for edge in edges]
        if node.input in edges:
            x, launches = self.along(node.input)
            launches = [*launches, self.linears[node].apply(x, z, start=start)]
            start = z
        for edge in node.addends:
            if edge in edges:
                launches.append(self.add(edge, z, start))
                start = z
        return launches

    def _layer(self, layer, x, y):
        """Return a function that writes what a layer makes of x to y."""
        def forward():
            made = layer.forward(x, Pass(cuda, self.n_images))
            with gpu_errors():
                y.copy_to_device(made.reshape(y.shape))

        return forward
