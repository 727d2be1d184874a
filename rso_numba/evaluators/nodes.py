"""Values of the nodes of a `Graph` on the CPU: packed images, (n_blocks, C, h, w, LANES)."""

import numpy as np

from ..kernels import cpu
from ..kernels.cpu.activations import computed
from ..kernels.cpu.convolution import conv2d_fused
from ..kernels.cpu.dense import dense_fused
from ..kernels.cpu.fusion import Deferred, Epilogue, deferred, unscaled
from ..kernels.cpu.lanes import LANES
from ..kernels.cpu.layout import as_maps, as_row
from ..passes import Pass


class Values:
    """Nodes that were computed for a mini-batch.

    Parameters
    ----------
    share : Share
        The images.
    fixed : collection of str
        Names of BatchNorms that use their stored statistics.

    Attributes
    ----------
    z : dict
        Value of a node.
    statistics : dict
        Mean and variance of the channels of a node, (C,) each, if a BatchNorm reads it.
    """

    def __init__(self, share, fixed=frozenset()):
        self.share, self.fixed = share, fixed
        self.z, self.statistics = {}, {}

    def epilogue(self, edge, channels=slice(None)):
        """Return the `Epilogue` of an edge, with the statistics of these channels of its source."""
        return epilogue(edge, self.statistics.get(edge.source), self.fixed, channels)

    def along(self, edge):
        """Return what an edge gives, Deferred."""
        return Deferred(self.z[edge.source], self.epilogue(edge))

    def compute(self, node, edges=None, start=None, y=None):
        """Compute the value of a node.

        Parameters
        ----------
        node : Node
        edges : collection of Edge
            Those whose sources are computed and not in `start`; by default all.
        start : ndarray or None
            What the other edges contribute, with the bias.
        y : ndarray or None
            Where the value is written, if the node is linear.
        """
        edges = node.edges if edges is None else edges
        addends = [edge for edge in node.addends if edge in edges]
        if node.layer:
            run = Pass(cpu, self.share.n_own)
            start = as_maps(computed(node.layer.forward(computed(self.along(addends[0])), run)))
            addends = []
        for edge in addends:
            if start is None:
                start = with_bias(node, computed(self.along(edge)))
            else:
                start = cpu.add(start, self.along(edge))
        if node.input in edges and node.input is not None:
            self.z[node], self.statistics[node] = apply_linear(
                node, *self.along(node.input), self.share, start=start, y=y)
        else:
            self.put(node, start)

    def put(self, node, z):
        """Take a value for a node; compute its statistics if a BatchNorm needs them."""
        self.z[node] = z
        self.statistics[node] = self.share.statistics(z) if node.norms else None


def epilogue(edge, statistics, fixed=frozenset(), channels=slice(None)):
    """Return the `Epilogue` of an edge; `statistics` are those of these channels of its source."""
    if not edge.norm:
        n_channels = len(range(edge.source.shape[0])[channels])
        return Epilogue(*unscaled(n_channels, np.float32), edge.relu, edge.pool)
    if edge.norm.name in fixed:
        statistics = edge.norm.running_mean[channels], edge.norm.running_variance[channels]
    scale, shift = (a.astype(np.float32) for a in edge.norm.scale_and_shift(*statistics, channels))
    return Epilogue(scale, shift, edge.relu, edge.pool)


def with_bias(node, z):
    """Return z plus the bias of the node's linear layer, if it has one."""
    if node.linear is None or not node.linear.use_bias:
        return z
    return z + node.linear.bias[:, None, None, None]


def apply_linear(node, z, epilogue, share, channels=slice(None), start=None, y=None):
    """Return the output of a node's linear layer, and its statistics if a BatchNorm reads it.

    Parameters
    ----------
    node : Node
    z : ndarray (n_blocks, C_in, H, W, LANES) or Deferred
    epilogue : Epilogue or None
        What is done to z, which is then not Deferred.
    share : Share
    channels : slice
        Which channels of the layer's input z holds.
    start : ndarray (n_blocks, C_out, h, w, LANES) or None
        What the other channels, and addends, contribute; None is the bias.
    y : ndarray like `start`, or None
        Where the output is written; it may be `start`.

    Returns
    -------
    y : ndarray (n_blocks, C_out, h, w, LANES)
    statistics : (mean (C_out,), variance (C_out,)) or None
    """
    if epilogue is None:  # a dense layer does not mind in which shape its input comes
        z, epilogue = deferred(as_row(z) if node.is_dense else z)
    weight = np.ascontiguousarray(node.linear.weight[:, channels])
    counted = share.n_own if node.norms else None
    if node.is_dense:
        start, y = (a if a is None else a.reshape(len(a), -1, LANES) for a in (start, y))
        y = as_maps(dense_fused(z, epilogue, weight, node.linear.bias, start, y))
        return y, share.statistics(y) if node.norms else None
    y, statistics = conv2d_fused(z, epilogue, weight, node.linear.bias, counted, start, node.step, y)
    return y, share.mean_and_variance(statistics, y) if node.norms else None
