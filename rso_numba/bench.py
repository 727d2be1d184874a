"""The benchmark that `rso-numba bench` runs: seconds per weight, here and in PyTorch, side by side.

Every way to evaluate a weight gets the same data, initial weights and mini-batches, and its losses are
checked before it is timed. What is timed is the loop of `rso.py`: a trial is the draw of a mini-batch, three
losses and the decision. Slow ways are timed on a few weights of every parameter and extrapolated to a round.
"""

import sys
import timeit
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter, sleep

import numba
import numpy as np

from . import kernels, models, presets, rso, sgd
from .arguments import training_generator, whole_number
from .bench_torch import LEARNING_RATE, TorchForward, torch_or_none, torch_sgd
from .datasets import Dataset
from .evaluators import FullForward, make_evaluator
from .visits import visits

CONFIGURATIONS = {  # model: mini-batch, preset, and the model that SGD trains beside it
    "one_conv": (1024, "notebook", "one_conv"),
    "two_conv": (1000, "notebook", "two_conv"),
    "paper_mnist": (5000, "authors", "original"),
    "paper_cifar10": (1000, "authors", "paper_cifar10"),
}
FOR_MNIST = "one_conv", "two_conv", "paper_mnist"
FROM_PAPER = "paper_mnist", "paper_cifar10"  # measured with hold="filter" and with one thread, too
SGD_BATCH_SIZES = (32, 256)
CHECK_IMAGES = 64  # mini-batch of the comparison of losses, which is also the first call of everything
BLOCK = 12  # trials of delta evaluation that are averaged before the median is taken
THREE_PASSES, CACHED = "PyTorch, three passes", "PyTorch, cached input"
NO_TORCH = "skipped: PyTorch is not installed; pip install -e '.[bench]'"


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    few: int = 3  # weights of every parameter, for slow evaluations
    many: int = 96  # the first weights of every parameter in their natural order, for delta evaluation
    whole: tuple = ("one_conv", "two_conv")  # models timed for whole rounds and a whole epoch instead
    rounds: int = 3  # of which the median is taken, because the first pays for fresh memory
    sgd_steps: int = 200  # for the other models
    images: int = 1024  # in the convolutions
    matrix: int = 2048  # rows and columns in sgemm
    rest: float = 0.3  # seconds before every measurement, in which threads of the last one stop spinning


QUICK = Effort(few=1, many=6, whole=(), sgd_steps=2, images=64, matrix=256, rest=0.05)


@dataclass(frozen=True)
class Job:
    """One configuration: a model, its data, and how it is searched."""

    model: str
    data: Dataset
    batch_size: int
    preset: str
    seed: int

    def __post_init__(self):
        whole_number(self.batch_size, "batch_size")
        whole_number(self.seed, "seed", 0)

    def __str__(self):
        return f"{self.model}, batch {self.batch_size}, {self.preset}"

    def network(self):
        """Return a network with the initial weights, the same at each call."""
        return models.build(self.model, self.data.image_shape, self.data.n_classes, self.seed, self.preset)

    def fixed_images(self):
        """Return the images whose statistics the preset fixes before the searched layer, or None."""
        if presets.resolve(self.preset).search_statistics == "batch":
            return None
        return self.data.train_images[: rso.CALIBRATION_IMAGES]

    def small(self):
        """Return the same configuration with two mini-batches of few images."""
        n = min(self.batch_size, CHECK_IMAGES, len(self.data.train_images) // 2)
        return replace(self, data=self.data.subset(2 * n, 1, self.seed), batch_size=n)


def peak_mib():
    """Return the most memory that this process has held so far, in MiB (None on Windows)."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@dataclass
class Row:
    """One line of the table."""

    configuration: str
    what: str
    value: float | None  # None if skipped: `measured` says why
    unit: str  # s/weight, s/epoch or GFLOP/s
    measured: str  # whether the whole was timed, or which part of it
    relative: float | None = None  # how many times as fast as `against`
    against: str = ""
    detail: dict = field(default_factory=dict)  # the figures behind `value`
    peak_mib: float | None = field(default_factory=peak_mib)


def our_sgd(network, data, batch_size, rng):
    """Train by one epoch of `sgd.train`; return the seconds."""
    return sgd.train(network, data, 1, batch_size, LEARNING_RATE, rng=rng).seconds


def first_n(n):
    """Return a choice of indices: the first n of a parameter, or all of them if n is None."""
    return lambda parameter, indices: indices[:n]


def filters(n):
    """Return a choice of indices: whole filters of a parameter, at least 2, with n weights or more."""
    def choose(parameter, indices):
        size = len(indices) // len(parameter.value)
        return indices[: size * max(2, -(-n // size))]
    return choose


def spread(n):
    """Return a choice of indices: up to n of a parameter, at equal distances."""
    return lambda parameter, indices: indices[:: -(-len(indices) // n)]


@dataclass
class Visit:
    """The trials of one parameter that were timed, out of `n_weights`."""

    n_weights: int
    filter_size: int
    seconds: list = field(default_factory=list)
    losses: list = field(default_factory=list)
    counted: list = field(default_factory=list)

    def total(self, n_first, block):
        """Return the seconds that all weights of the parameter take, the median if those were whole rounds.

        Of a part of a round the first trials, which fill caches, count once. The rest is extrapolated from
        the median of the others, taken over means of `block` trials.
        """
        if len(self.seconds) >= self.n_weights:
            return float(np.median(self.rounds()))
        n_first = min(n_first, len(self.seconds) // 2)
        starts = range(n_first, len(self.seconds), block)
        means = [np.mean(self.seconds[start : start + block]) for start in starts]
        return float(sum(self.seconds[:n_first]) + (self.n_weights - n_first) * np.median(means))

    def rounds(self):
        """Return the seconds of every whole round."""
        return np.reshape(self.seconds, (-1, self.n_weights)).sum(axis=1)


def timed_visits(job, choose, evaluator_of=None, rounds=1, count=lambda: 0, **arguments):
    """Run the chosen trials of some rounds; return a dict of `Visit` by parameter.

    `evaluator_of` makes an evaluator that `rso.trials` does not know; `Visit.counted` is what trials added to
    `count()`; `arguments` go to `rso.trials`. One trial more than was chosen begins each round and
    is not counted: sigma, the order of the visits and the partition of the data are made in the first.
    """
    network, timed = job.network(), {}

    def chosen_visits(*arguments):
        chosen = []
        for parameter, indices, sigma in visits(*arguments):
            timed[str(parameter)] = Visit(len(indices), len(indices) // len(parameter.value))
            chosen.append((parameter, list(choose(parameter, indices)), sigma))
        chosen[0][1].insert(0, chosen[0][1][0])
        return chosen

    def clock():
        return perf_counter() - getattr(evaluator, "not_counted", 0.0)

    evaluator = evaluator_of(network, fixed_images=job.fixed_images()) if evaluator_of else None
    stream = rso.trials(network, job.data, rounds, job.batch_size, job.preset, evaluator=evaluator,
                        visits=chosen_visits, rng=training_generator(job.seed), **arguments)
    last = next(stream)
    before, begin = count(), clock()
    for trial in stream:
        visit = timed[f"{trial.layer}.{trial.parameter}"]
        if trial.round == last.round:
            visit.seconds.append(clock() - begin)
            visit.losses.append(trial.losses)
            visit.counted.append(count() - before)
        last, before, begin = trial, count(), clock()
    return timed


def kernels_loaded():
    """Return how many kernels this process has taken from Numba's cache, and how many it has compiled."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(f"{__package__}.")]
    stats = {id(f): f.stats for module in modules for f in vars(module).values() if hasattr(f, "stats")}
    counts = [(sum(s.cache_hits.values()), sum(s.cache_misses.values())) for s in stats.values()]
    return np.sum([(0, 0), *counts], axis=0, dtype=int)


class Compared:
    """FullForward, and another evaluator that is asked the same and has to agree.

    FullForward decides, so that a tie which rounding decides otherwise makes no other network of it.
    """

    def __init__(self, full, other, what):
        self.full, self.other, self.what = full, other, what

    def set_batch(self, images, labels, key=None):
        """Give both the mini-batch."""
        for evaluator in (self.full, self.other):
            evaluator.set_batch(images, labels, key)

    def losses(self, parameter, index, candidates):
        """Return FullForward's losses; raise an AssertionError unless the other's are the same."""
        expected, found = (evaluator.losses(parameter, index, candidates)
                           for evaluator in (self.full, self.other))
        np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=f"{self.what}, {parameter}")
        return expected

    def keep(self, parameter, index, value):
        """Tell both what stays."""
        for evaluator in (self.full, self.other):
            evaluator.keep(parameter, index, value)


def search_row(job, effort, what, choose, evaluator_of=None, evaluation="full", **arguments):
    """Compare the losses of one way of evaluation with FullForward's, then time it; return its Row."""
    loaded, begin = kernels_loaded(), perf_counter()
    timed_visits(job.small(), first_n(2), evaluator_of, evaluation=evaluation, **arguments)
    first_calls, (from_cache, compiled) = perf_counter() - begin, (kernels_loaded() - loaded).tolist()
    backend = arguments.get("backend", "cpu")

    def compared_evaluator(network, fixed_images):
        make = evaluator_of or partial(make_evaluator, evaluation, backend=backend)
        full = FullForward(network, backend, fixed_images=fixed_images)
        return Compared(full, make(network, fixed_images=fixed_images), what)

    timed_visits(job.small(), first_n(2), compared_evaluator, **arguments)
    sleep(effort.rest)
    rounds = effort.rounds if evaluation == "delta" and job.model in effort.whole else 1
    timed = timed_visits(job, choose, evaluator_of, rounds, evaluation=evaluation, **arguments)
    n, n_timed = sum(v.n_weights for v in timed.values()), sum(len(v.seconds) for v in timed.values())
    n_first, block, held = 0, 1, "hold" in arguments
    if evaluation == "delta" and not held:
        n_first, block = len(job.data.train_images) // job.batch_size, BLOCK  # once for each mini-batch
    totals = {name: v.total(n_first, v.filter_size if held else block) for name, v in timed.items()}
    measured = f"median of {rounds} rounds of {n:,}" if n <= n_timed else f"sampled {n_timed:,} of {n:,}"
    if evaluator_of is None:
        measured += f"; first calls {first_calls:.1f} s, {from_cache} kernels cached, {compiled} compiled"
    detail = dict(
        round_seconds=sum(totals.values()), n_weights=n, n_timed=n_timed, threads=numba.get_num_threads(),
        rounds=sum(v.rounds() for v in timed.values()).tolist() if n <= n_timed else [],
        first_calls_seconds=first_calls, kernels_from_cache=from_cache, kernels_compiled=compiled,
        parameters={name: dict(n_weights=v.n_weights, n_timed=len(v.seconds), seconds=totals[name],
                               median_trial=float(np.median(v.seconds))) for name, v in timed.items()})
    configuration = f"{job}, hold=filter" if held else str(job)
    return Row(configuration, what, sum(totals.values()) / n, "s/weight", measured, detail=detail)


def search_rows(job, effort):
    """Return the rows of RSO in one configuration."""
    few, many = spread(effort.few), first_n(None if job.model in effort.whole else effort.many)
    rows = [search_row(job, effort, "FullForward", few),
            search_row(job, effort, "DeltaForward", many, evaluation="delta")]
    if job.model in FROM_PAPER and presets.resolve(job.preset).order != "column_major":
        held = filters(effort.many)
        rows += [search_row(job, effort, "DeltaForward", held, evaluation="delta", hold="filter")]
    if job.model in FROM_PAPER and (threads := numba.get_num_threads()) > 1:
        numba.set_num_threads(1)
        rows += [search_row(job, effort, "DeltaForward, 1 thread", many, evaluation="delta")]
        numba.set_num_threads(threads)
        rows[-1].measured += f"; {threads} threads are {rows[-1].value / rows[1].value:.2f} x as fast"
    if torch_or_none() is None:
        return rows + [Row(str(job), what, None, "s/weight", NO_TORCH) for what in (THREE_PASSES, CACHED)]
    rows += [search_row(job, effort, THREE_PASSES, few, TorchForward),
             search_row(job, effort, CACHED, few, partial(TorchForward, cached=True))]
    rows[-1].measured += ", without making that input"
    return compared(rows, rows[-2])


def compared(rows, peer):
    """Return rows of seconds, with their ratios to those of `peer`."""
    for row in rows:
        if row.value and peer.value:
            row.relative, row.against = peer.value / row.value, peer.what
    return rows


def sgd_rows(model, data, batch_size, effort, seed):
    """Return the rows of an epoch of SGD, here and by PyTorch."""
    n = len(data.train_images)
    n_timed, rows, moves = n if model in effort.whole else min(n, effort.sgd_steps * batch_size), [], []
    small, part = data.subset(min(n, 2 * batch_size), 1, seed), data.subset(n_timed, 1, seed)
    measured = "whole epoch" if n_timed == n else f"sampled {n_timed:,} of {n:,} images"
    for what, train in (("SGD", our_sgd), ("SGD, PyTorch", torch_sgd)):
        rows.append(Row(f"{model}, batch {batch_size}, notebook", what, None, "s/epoch", NO_TORCH))
        if train is torch_sgd and torch_or_none() is None:
            return rows
        networks = [models.build(model, data.image_shape, data.n_classes, seed, "notebook") for _ in range(2)]
        train(networks[0], small, batch_size, seed)  # the first call of everything
        moves.append(networks[0].weights - networks[1].weights)
        # as a whole: a bias before a BatchNorm moves by rounding only, a pixel at a ReLU's 0 either way
        assert np.linalg.norm(moves[-1] - moves[0]) < 1e-3 * np.linalg.norm(moves[0]), f"{what}, {model}"
        sleep(effort.rest)
        rows[-1].value = train(networks[1], part, batch_size, seed) * n / n_timed
        rows[-1].measured, rows[-1].peak_mib = measured, peak_mib()
    return compared(rows, rows[1])


def rate_row(effort, name, what, operations, function, *arguments):
    """Return the row of the median rate of a function's calls: as many as fit `effort.rest`, at least 7."""
    timer = timeit.Timer(lambda: function(*arguments))
    sleep(effort.rest)  # after which a processor takes milliseconds to reach its full clock
    seconds = timer.repeat(max(7, int(effort.rest / timer.repeat(2, 1)[1])), 1)
    return Row(name, what, float(operations / np.median(seconds) / 1e9), "GFLOP/s", f"{len(seconds)} calls")


def kernel_rows(effort, seed):
    """Return the rows of the 3x3 convolution of 16 to 16 channels, against NumPy's sgemm."""
    from .kernels.cpu.convolution import conv2d_before_norm

    rng, torch, k = np.random.default_rng(seed), torch_or_none(), kernels.backend("cpu")
    a = rng.standard_normal((effort.matrix, effort.matrix), np.float32)
    rows = [rate_row(effort, f"sgemm {effort.matrix}", "NumPy", 2 * effort.matrix**3, np.matmul, a, a)]
    weight, bias = rng.standard_normal((16, 16, 3, 3), np.float32), np.zeros(16, np.float32)
    for size in (28, 14, 7):
        images = rng.standard_normal((effort.images, 16, size, size), np.float32)
        name, operations = f"conv 3x3 16->16, {effort.images} of {size}x{size}", 2 * 9 * 16 * images.size
        x = k.pack(images)
        rows.append(rate_row(effort, name, "conv2d_forward", operations, k.conv2d_forward, x, weight, bias))
        # its fewer multiplications count as those of the direct sums
        quick = conv2d_before_norm, x, weight, bias
        rows.append(rate_row(effort, name, "conv2d, Winograd", operations, *quick))
        if torch is None:
            rows.append(Row(name, "PyTorch", None, "GFLOP/s", NO_TORCH))
            continue
        peer = torch.nn.functional.conv2d, *map(torch.from_numpy, (images, weight, bias)), 1, 1
        for convolution in (k.conv2d_forward, conv2d_before_norm):
            y = k.unpack(convolution(x, weight, bias), len(images))
            np.testing.assert_allclose(y, peer[0](*peer[1:]), rtol=1e-4, atol=1e-4, err_msg=name)
        rows.append(rate_row(effort, name, "PyTorch", operations, *peer))
    for row in rows:
        row.relative, row.against = row.value and row.value / rows[0].value, "sgemm"
    return rows


def job_of(model, data, seed, batch_size=None, preset=None):
    """Return the Job of a configuration, with its own batch size and preset unless others are given."""
    own_batch_size, own_preset, _ = CONFIGURATIONS[model]
    if batch_size is None:
        batch_size = min(own_batch_size, len(data.train_images) // 2)
    return Job(model, data, batch_size, preset or own_preset, seed)


def run(chosen, data, threads, effort, seed=0, batch_size=None, preset=None):
    """Yield lists of `Row` as they are measured.

    `chosen` are names in `CONFIGURATIONS`; `threads` those of Numba and PyTorch (NumPy's sgemm takes as
    many as it likes); `batch_size` and `preset` replace those of every configuration.
    """
    numba.set_num_threads(threads)
    if torch_or_none() is not None:
        torch_or_none().set_num_threads(threads)
    for model in chosen:
        yield search_rows(job_of(model, data, seed, batch_size, preset), effort)
        _, _, sgd_model = CONFIGURATIONS[model]
        for sgd_batch_size in SGD_BATCH_SIZES:
            yield sgd_rows(sgd_model, data, sgd_batch_size, effort, seed)
    yield kernel_rows(effort, seed)
