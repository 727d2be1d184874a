"""A network as delta evaluation sees it: a graph of nodes, whose values are stored, and edges between them.

A *node* is what a linear layer (convolution, dense) makes of its input, plus addends where branches of a
`Residual` meet. An *edge* leads from a node to another and carries what stands between two linear layers: a
BatchNorm, a ReLU and a pool, or a part of that, which is the *epilogue* of the node it comes from. Nobody
stores what an epilogue makes; whoever reads the node applies it.

    Conv, BatchNorm, Residual([ReLU, Conv, BatchNorm, ReLU, Conv]), AvgPool, BatchNorm, GlobalMaxPool, Dense

    images ──▶ conv 1 ──BatchNorm, ReLU──▶ conv 2 ──BatchNorm, ReLU──▶ conv 3 ──BatchNorm, GlobalMax──▶ dense
                  └───────BatchNorm, AvgPool─────────────────────────────▲ addend

An average pool behind a convolution is merged into it, and behind a sum into all its terms: the pool of a sum
is the sum of the pools.
"""

from dataclasses import dataclass, field
from functools import cached_property

from ..kernels import formulas
from ..layers import (
    AvgPool,
    BatchNorm,
    Conv2D,
    Dense,
    Flatten,
    GlobalMaxPool,
    GlobalMeanPool,
    MaxPool,
    ReLU,
    Residual,
    chain_output_shape,
)

POOLS = {MaxPool: formulas.MAX, AvgPool: formulas.MEAN, GlobalMaxPool: formulas.GLOBAL_MAX,
         GlobalMeanPool: formulas.GLOBAL_MEAN}


class NoDelta(ValueError):
    """A network that delta evaluation cannot take."""


@dataclass(eq=False)
class Edge:
    """What a node gives to another: pool(relu(norm(value))), each of the three if there is one."""

    source: "Node"
    layers: tuple = ()
    norm: BatchNorm | None = None
    relu: bool = False
    pool: int = formulas.NO_POOL

    def close(self):
        """Read the epilogue off the layers."""
        (self.norm, self.relu, self.pool), _ = first_epilogue(self.layers)

    @property
    def shape(self):
        """Shape (C, h, w) of what the edge gives."""
        return formulas.pooled_shape(self.source.shape, self.pool)


@dataclass(eq=False)
class Node:
    """A value that is stored.

    Parameters
    ----------
    linear : Conv2D, Dense or None
        What makes it of `input`; None for the images and for sums of addends.
    input : Edge or None
    addends : list of Edge
        What is added.
    layer : Layer or None
        Treats the only addend: a layer of a kind that no epilogue can do.
    step : {1, 2}
        2 if an average pool is merged into the convolution.
    outputs : list of Edge
        To the nodes that read this one.
    index, last_reader : int
        Place among the nodes of the graph, and that of the last node that reads it.
    shape : tuple of int
        (C, h, w) of one image.
    """

    linear: object = None
    input: Edge | None = None
    addends: list = field(default_factory=list)
    layer: object = None
    step: int = 1
    outputs: list = field(default_factory=list)
    index: int = 0
    last_reader: int = 0
    shape: tuple = ()

    @property
    def edges(self):
        """The edges that lead here."""
        return [self.input, *self.addends] if self.input else self.addends

    @property
    def is_dense(self):
        """Whether it is the output of a dense layer."""
        return isinstance(self.linear, Dense)

    @cached_property
    def norms(self):
        """The BatchNorms that read this node. All take the same statistics."""
        return list(dict.fromkeys(edge.norm for edge in self.outputs if edge.norm))


class Graph:
    """The nodes of a network, in an order in which they can be computed.

    Parameters
    ----------
    network : Network

    Attributes
    ----------
    head : list of Layer
        Before the first node with a value to be searched: these make the value of node 0 of the images.
    nodes : list of Node
        The last one makes the logits.
    node_of : dict
        The node whose value, or whose epilogues, the parameters of a layer change; by the layer's name.

    Raises
    ------
    NoDelta
        If delta evaluation cannot take the network. The message says why.
    """

    def __init__(self, network):
        layers, self._leaves = network.layers, network.leaves
        n = next((i for i, layer in enumerate(layers)
                  if layer.is_linear or layer.parameter_names or layer not in self._leaves), len(layers))
        self.head, self.nodes, self._made = layers[:n], [Node()], {}
        output = self._chain(layers[n:], Edge(self.nodes[0]))
        self._merge_pools(output)
        self._split(output)
        if output.layers or output.source is not self.nodes[-1] or not output.source.is_dense:
            raise NoDelta("the network does not end in a dense layer")
        self._measure(network)
        self.node_of = {norm.name: node for node in self.nodes for norm in node.norms}
        self.node_of |= {node.linear.name: node for node in self.nodes if node.linear}

    def _chain(self, layers, at):
        """Add the nodes of a chain of layers that begins with what the edge `at` gives; return its end."""
        for layer in layers:
            if isinstance(layer, Residual):
                shortcut = self._chain(layer.shortcut, at)
                at = self._sum(self._chain(layer.body, at), shortcut, at.source)
            elif layer not in self._leaves or layer.is_linear and not isinstance(layer, (Conv2D, Dense)):
                raise NoDelta(f"{type(layer).__name__} is a layer of its own kind")
            elif layer.is_linear:
                at = Edge(self._add(Node(layer, Edge(at.source, at.layers))))
            else:
                at = Edge(at.source, (*at.layers, layer))
        return at

    def _add(self, node):
        node.index = len(self.nodes)
        self.nodes.append(node)
        return node

    def _sum(self, body, shortcut, before):
        """Return an edge from the sum of two branches: a node, or the convolution that ends the body."""
        if any(isinstance(layer, Flatten) for layer in (*body.layers, *shortcut.layers)):
            raise NoDelta("a Residual adds what a Flatten has made, map by map")
        shortcut = Edge(shortcut.source, shortcut.layers)
        last = body.source
        if last.linear and not body.layers and last.index > max(before.index, shortcut.source.index):
            last.addends.append(shortcut)
            return Edge(last)
        return Edge(self._add(Node(addends=[Edge(body.source, body.layers), shortcut])))

    def _outputs(self, output):
        """Return the edges that leave each node, by node."""
        leaving = {node: [] for node in self.nodes}
        for edge in (*(edge for node in self.nodes for edge in node.edges), output):
            leaving[edge.source].append(edge)
        return leaving

    def _merge_pools(self, output):
        """Let convolutions do the average pools behind them."""
        for node in reversed(self.nodes[1:]):
            edges = self._outputs(output)[node]
            can = isinstance(node.linear, Conv2D) or (node.addends and not node.linear)
            if can and edges and all(edge.layers and isinstance(edge.layers[0], AvgPool) for edge in edges):
                pool = edges[0].layers[0]
                for edge in edges:
                    edge.layers = edge.layers[1:]
                for edge in node.addends:
                    edge.layers = (*edge.layers, pool)
                node.step = 2 if node.linear else 1

    def _split(self, output):
        """Add nodes where more stands between two of them than one epilogue can do."""
        nodes, self.nodes = self.nodes, []
        for node in nodes:
            for edge in node.edges:
                self._shorten(edge)
            self._add(node)
        for node, edges in self._outputs(output).items():
            node.outputs = [edge for edge in edges if edge is not output]
        for node in self.nodes:
            for edge in node.edges:
                edge.source.last_reader = node.index

    def _shorten(self, edge):
        layers = list(edge.layers)
        if any(isinstance(layer, Flatten) for layer in layers):
            behind = layers[[isinstance(layer, Flatten) for layer in layers].index(True) + 1 :]
            if any(not isinstance(layer, (Flatten, ReLU)) for layer in behind):
                raise NoDelta(f"{behind[0]} stands behind a Flatten, where pixels are channels")
            layers = [layer for layer in layers if not isinstance(layer, Flatten)]
        _, rest = first_epilogue(layers)
        while rest:
            n = max(1, len(layers) - len(rest))
            first, layers = tuple(layers[:n]), layers[n:]
            if (edge.source, first) not in self._made:  # the branches of a Residual may begin with the same
                between = Node(addends=[Edge(edge.source, first)])
                if len(rest) == len(first) + len(layers):  # no epilogue can do it
                    between.layer, between.addends[0].layers = first[0], ()
                between.addends[0].close()
                self._made[edge.source, first] = self._add(between)
            edge.source = self._made[edge.source, first]
            _, rest = first_epilogue(layers)
        edge.layers = tuple(layers)
        edge.close()

    def _measure(self, network):
        """Note the shape of every node."""
        self.nodes[0].shape = _as_maps(chain_output_shape(self.head, network.image_shape))
        for node in self.nodes[1:]:
            shape = node.edges[0].shape
            if node.is_dense:
                shape = node.linear.output_shape((shape[0] * shape[1] * shape[2],))
            elif node.linear or node.layer:
                shape = (node.linear or node.layer).output_shape(shape)
            shape = _as_maps(shape)
            node.shape = (shape[0], shape[1] // node.step, shape[2] // node.step)

    def norms_before(self, layer):
        """Return the names of the BatchNorms before a layer that is being searched, as the authors take it.

        Their program keeps the input of that layer, or of the one before it if a shortcut enters it: the
        BatchNorms before are those that this input depends on. One in a shortcut beside it is none of them.
        """
        node = self.node_of[layer]
        first = node.input.source if node.addends and node.input else node
        before, waiting = set(), list(first.edges)
        while waiting:
            edge = waiting.pop()
            if edge not in before:
                before.add(edge)
                waiting += edge.source.edges
        return frozenset(edge.norm.name for edge in before if edge.norm)


def first_epilogue(layers):
    """Return what one epilogue can do of layers, (BatchNorm or None, ReLU?, pool), and the rest of them."""
    rest = list(layers)
    norm = rest.pop(0) if rest and isinstance(rest[0], BatchNorm) else None
    relu = bool(rest and isinstance(rest[0], ReLU) and rest.pop(0))
    pool = POOLS[type(rest.pop(0))] if rest and type(rest[0]) in POOLS else formulas.NO_POOL
    return (norm, relu, pool), rest


def _as_maps(shape):
    return tuple(shape) if len(shape) == 3 else (*shape, 1, 1)
