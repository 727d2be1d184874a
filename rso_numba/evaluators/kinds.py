"""What a change of one channel of a node reaches: the nodes behind it, sorted.

The nodes behind a node d are of three kinds: those that the change does not reach; those of which it reaches
*one* channel, through additions; and those of which it reaches *all* channels, through a linear layer. The
*base* of a node is what it is made of by edges from the first two kinds.
"""


class Kinds:
    """The nodes behind a node, sorted by what changes of one of its channels reach.

    Parameters
    ----------
    graph : Graph
    node : Node

    Attributes
    ----------
    one, all : list of Node
        Those of which one channel changes, the node first, and those of which all channels do.
    base_edges : dict
        The edges that make the base of each of these nodes.
    spread : list of Node
        Of `all`, those whose linear layer reads a node of `one`.
    needed : set of Node
        What has to be computed for the bases.
    """

    def __init__(self, graph, node):
        self.graph, self.node, self.last = graph, node, graph.nodes[-1]
        self.one, self.all = [node], []
        for later in graph.nodes[node.index + 1 :]:
            sources = [edge.source for edge in later.edges]
            reads_one = later.input is not None and later.input.source in self.one
            if reads_one or any(source in self.all for source in sources):
                self.all.append(later)
            elif any(source in self.one for source in sources):
                self.one.append(later)
        self.base_edges = {later: [edge for edge in later.edges if edge.source not in self.all]
                           for later in (*self.one, *self.all)}
        self.spread = [later for later in self.all if later.input and later.input.source in self.one]
        # addends from a node of `one`: their channel is added to the base
        self.one_addends = [(later, edge) for later in self.all for edge in later.addends
                            if edge.source in self.one]
        self.needed = {edge.source for edges in self.base_edges.values() for edge in edges} | {node}
        for earlier in reversed(graph.nodes):
            if earlier in self.needed:
                self.needed.update(edge.source for edge in earlier.edges)
        # whether the input of the node's linear layer is all that has to be known to compute the bases
        self.by_input = node.input is not None and not node.addends and all(
            edge.source in self.one for later, edges in self.base_edges.items() if later is not node
            for edge in edges)
