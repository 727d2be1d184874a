"""The benchmark of a GPU, `rso-numba bench --backend cuda`: seconds per weight beside the least possible.

The *floors* of a round are the time that its multiply-adds alone would take, and that its numbers alone would
take to be written to the GPU's memory and read from it once, at the rates that the driver promises.
"""

import math
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from . import bench, presets, rso
from .arguments import training_generator
from .evaluators.graph import Graph
from .evaluators.kinds import Kinds
from .kernels.formulas import NO_POOL
from .visits import sigmas, visits

BYTES = 4  # of a float32
N_CANDIDATES = 3


@dataclass
class Size:
    """What a node of a `Graph` costs for one image."""

    multiply_adds: int  # of its linear layer
    n_in: int  # numbers that enter that
    n_out: int  # numbers that the node holds
    n_left: int  # numbers that its epilogues make


def sizes(graph):
    """Return the `Size` of each node of a graph, a dict."""
    return {node: size_of(node) for node in graph.nodes}


def size_of(node):
    """Return the `Size` of a node."""
    n_out, taps, n_in = math.prod(node.shape), 0, 0
    if node.linear:
        filters, n_in = node.linear.weight, math.prod(node.input.shape)
        # with step 2 merged with the pool that follows, see `delta.md`
        taps = filters[0].size if node.step == 1 else len(filters[0]) * (filters.shape[2] + 1) ** 2
    left = [edge for edge in node.outputs if edge.norm or edge.relu or edge.pool != NO_POOL]
    return Size(n_out * taps, n_in, n_out, sum(math.prod(edge.shape) for edge in left))


def trial_cost(found, kinds):
    """Return multiply-adds and numbers moved, of one image in one trial of a weight of a node."""
    node, last = kinds.node, kinds.last
    if node is last:  # three logits; all of them and one feature are read
        return N_CANDIDATES, found[last].n_out + 1
    # of these nodes one channel is computed
    multiply_adds = found[node].multiply_adds // node.shape[0]
    moved = sum(2 * (found[one].n_out + found[one].n_left) // one.shape[0] for one in kinds.one)
    # what one kernel writes another one reads; beside that, the node's input, and what other channels add
    read = found[node].n_in
    for later in kinds.all:
        size = found[later]
        if later in kinds.spread:
            multiply_adds += size.multiply_adds // later.input.source.shape[0]
        elif later.input and later.input.source in kinds.all:
            multiply_adds += size.multiply_adds
        moved += 2 * (size.n_out + size.n_left)
        read += size.n_out if kinds.base_edges[later] else 0
    return N_CANDIDATES * multiply_adds, N_CANDIDATES * moved + read


def floors(job, peaks):
    """Return the seconds that a round takes at least, for arithmetic and for memory."""
    network = job.network()
    graph = Graph(network)
    found, total = sizes(graph), np.zeros(2)
    settings = presets.resolve(job.preset)
    sigma = sigmas(network, settings.sigma, np.random.default_rng(0))
    for parameter, indices, _ in visits(network, settings, sigma):
        cost = trial_cost(found, Kinds(graph, graph.node_of[parameter.layer]))
        total += np.array(cost) * len(indices)
    multiply_adds, numbers = total * job.batch_size
    return multiply_adds / peaks[0], numbers * BYTES / peaks[1]


def delta_row(job, effort, peaks, **settings):
    """Compare losses with FullForward's, then time a whole round of the search on the GPU; return its Row."""
    small = [bench.timed_visits(job.small(), bench.first_n(2), evaluation=evaluation, backend="cuda",
                                **settings) for evaluation in ("delta", "full")]
    for name, visit in small[0].items():
        np.testing.assert_allclose(visit.losses, small[1][name].losses, rtol=1e-4, err_msg=name)
    network = job.network()
    stream = rso.trials(network, job.data, 1, job.batch_size, job.preset, backend="cuda",
                        rng=training_generator(job.seed), **settings)
    # trials are decided in groups: only a whole round can be timed
    begin = perf_counter()
    n = sum(1 for _ in stream)
    seconds = perf_counter() - begin
    arithmetic, memory = floors(job, peaks)
    measured = (f"whole round of {n:,} in {seconds:.3g} s; floors: {arithmetic:.2g} s for arithmetic at "
                f"{peaks[0] / 1e12:.3g} T multiply-adds/s, {memory:.2g} s for memory at "
                f"{peaks[1] / 1e9:.4g} GB/s")
    configuration = f"{job}, hold=filter" if settings else str(job)
    return bench.Row(configuration, "CudaForward", seconds / n, "s/weight", measured, detail=dict(
        round_seconds=seconds, n_weights=n, arithmetic_floor=arithmetic, memory_floor=memory,
        peak_multiply_adds=peaks[0], peak_bytes=peaks[1]))


def run(chosen, data, effort, seed=0, batch_size=None, preset=None, peaks=None):
    """Yield lists of `bench.Row` as they are measured; arguments as of `bench.run`.

    `peaks` are multiply-adds and bytes in a second, by default those of the GPU.
    """
    if peaks is None:
        from .kernels.cuda.device import peaks as peaks_of_device

        peaks = peaks_of_device()
    for model in chosen:
        job = bench.job_of(model, data, seed, batch_size, preset)
        few = bench.spread(effort.few)
        rows = [bench.search_row(job, effort, "FullForward on the GPU", few, backend="cuda"),
                delta_row(job, effort, peaks)]
        if model in bench.FROM_PAPER and presets.resolve(job.preset).order != "column_major":
            rows.append(delta_row(job, effort, peaks, hold="filter"))
        yield bench.compared(rows, rows[0])
