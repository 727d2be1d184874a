"""The benchmark of a GPU, `rso-numba bench --backend cuda`: seconds per weight beside the least possible.

The *floors* of a round are the time that its multiply-adds alone would take, and that its numbers alone would
take to be written to the GPU's memory and read from it once, at the rates that the driver promises.
"""

import math
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from . import bench, presets, rso
from .evaluators.stages import cut
from .kernels.tails import pooled_shape
from .layers import Dense
from .visits import sigmas, visits

BYTES = 4  # of a float32
N_CANDIDATES = 3


@dataclass
class Size:
    """What a stage costs for one image."""

    multiply_adds: int  # of its mixing layer
    n_in: int  # numbers that enter
    n_out: int  # numbers that the mixing layer makes
    n_channels: int  # of those
    n_left: int  # numbers after the channelwise layers


def sizes(network):
    """Return the `Size` of each stage of a network."""
    shape, shapes = network.image_shape, {}
    for layer in network.layers:
        shapes[layer.name], shape = shape, layer.output_shape(shape)
    found = []
    for stage in cut(network)[1]:
        shape, filters, after = shapes[stage.mixing.name], stage.mixing.weight, (1, 1)
        if not isinstance(stage.mixing, Dense):
            after = shape[1] // stage.step, shape[2] // stage.step
        taps = filters[0].size
        if stage.step == 2:  # merged with the pool that follows, see `delta.md`
            taps = len(filters[0]) * (filters.shape[2] + 1) ** 2
        out = (len(filters), *after)
        found.append(Size(math.prod(out) * taps, math.prod(shape), math.prod(out), len(filters),
                          math.prod(pooled_shape(out, stage.pool))))
    return found


def trial_cost(found, d):
    """Return multiply-adds and numbers moved, of one image in one trial of a weight of stage d."""
    if d == len(found) - 1:  # three logits; all of them and one feature are read
        return N_CANDIDATES, found[d].n_channels + 1
    own, following, later = found[d], found[d + 1], found[d + 2 :]
    k = own.n_channels
    multiply_adds = (own.multiply_adds + following.multiply_adds) // k + sum(s.multiply_adds for s in later)
    # what one kernel writes another one reads; beside that, the stage's input, and what other channels add
    moved = 2 * (own.n_out + own.n_left) // k + sum(2 * (s.n_out + s.n_left) for s in found[d + 1 : -1])
    moved += 2 * found[-1].n_out
    return N_CANDIDATES * multiply_adds, N_CANDIDATES * moved + own.n_in + following.n_out


def floors(job, peaks):
    """Return the seconds that a round takes at least, for arithmetic and for memory."""
    network = job.network()
    found, stages = sizes(network), cut(network)[1]
    stage_of = {layer.name: d for d, stage in enumerate(stages) for layer in (stage.mixing, *stage.layers)}
    total = np.zeros(2)
    settings = presets.resolve(job.preset)
    sigma = sigmas(network, settings.sigma, np.random.default_rng(0))
    for parameter, indices, _ in visits(network, settings, sigma):
        total += np.array(trial_cost(found, stage_of[parameter.layer])) * len(indices)
    multiply_adds, numbers = total * job.batch_size
    return multiply_adds / peaks[0], numbers * BYTES / peaks[1]


def delta_row(job, plan, peaks, **settings):
    """Compare losses with FullForward's, then time a whole round of the search on the GPU; return its Row."""
    small = [bench.timed_visits(job.small(), bench.first(2), evaluation=evaluation, backend="cuda",
                                **settings) for evaluation in ("delta", "full")]
    for name, visit in small[0].items():
        np.testing.assert_allclose(visit.losses, small[1][name].losses, rtol=1e-4, err_msg=name)
    network = job.network()
    stream = rso.trials(network, job.data, 1, job.batch_size, job.preset, backend="cuda",
                        rng=np.random.default_rng([job.seed, 1]), **settings)
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


def run(chosen, data, plan, seed=0, batch_size=None, preset=None, peaks=None):
    """Yield lists of `bench.Row` as they are measured; arguments as of `bench.run`.

    `peaks` are multiply-adds and bytes in a second, by default those of the GPU.
    """
    if peaks is None:
        from .kernels.cuda_device import peaks as peaks_of_device

        peaks = peaks_of_device()
    for model in chosen:
        own_batch_size, own_preset, _ = bench.CONFIGURATIONS[model]
        size = batch_size or min(own_batch_size, len(data.train_images) // 2)
        job = bench.Job(model, data, size, preset or own_preset, seed)
        rows = [bench.search_row(job, plan, "FullForward on the GPU", bench.spread(plan.few), backend="cuda"),
                delta_row(job, plan, peaks)]
        if model == "paper_mnist" and presets.resolve(job.preset).order != "column_major":
            rows.append(delta_row(job, plan, peaks, hold="filter"))
        yield bench.compared(rows, rows[0])
