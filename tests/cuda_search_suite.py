"""The search on the GPU, judged by whole forward passes in NumPy. Run like `cuda_suite.py`."""

import os
import signal
from itertools import islice, product

import numpy as np
import pytest
from networks import narrow
from numba import config

from rso_numba import bench, bench_gpu, datasets, kernels, models, rso
from rso_numba.evaluators import CudaForward, FullForward, cuda, make_evaluator
from rso_numba.kernels import formulas
from rso_numba.kernels.cuda.device import LANES
from rso_numba.layers import (
    AvgPool,
    BatchNorm,
    Conv2D,
    Dense,
    Flatten,
    GlobalMaxPool,
    GlobalMeanPool,
    Layer,
    MaxPool,
    ReLU,
    Residual,
    Standardize,
)
from rso_numba.models import Network
from rso_numba.visits import visits

if config.ENABLE_CUDASIM:
    import simulator

    simulator.repair()

N_CLASSES, SHAPE = 3, (1, 4, 5)


class Negative(Layer):
    """A channelwise layer that no epilogue knows."""

    def forward(self, x, run):
        zeros = np.zeros(x.shape[1], np.float32)
        return run.kernels.scale_shift(x, zeros - 1, zeros)


def _network(name):
    """A tiny version of a model, or a chain that no model has, with parameters that all differ."""
    layers = {
        "one_conv": [Conv2D(2), ReLU(), MaxPool(), Flatten(), Dense(N_CLASSES)],
        "two_conv": [Conv2D(1), ReLU(), MaxPool(), Conv2D(2), ReLU(), MaxPool(), Flatten(),
                     Dense(N_CLASSES)],
        "original": [Conv2D(2, size=1), BatchNorm(), ReLU(), AvgPool(), Conv2D(1), BatchNorm(), ReLU(),
                     GlobalMeanPool(), Dense(N_CLASSES)],
        "paper_mnist": [
            Conv2D(1, use_bias=False), AvgPool(), BatchNorm(), ReLU(), Conv2D(2, use_bias=False),
            BatchNorm(), GlobalMaxPool(), Dense(N_CLASSES, use_bias=False)],
        "unusual": [Conv2D(2, size=1), ReLU(), BatchNorm(), MaxPool(), Conv2D(2), Flatten(), Dense(1), ReLU(),
                    Dense(N_CLASSES)],
        "identity": [
            Conv2D(2, size=1), BatchNorm(),
            Residual([ReLU(), Conv2D(1), BatchNorm(), ReLU(), Conv2D(2, size=1)]),
            BatchNorm(), ReLU(), GlobalMaxPool(), Dense(N_CLASSES)],
        "projection": [
            Conv2D(2, size=1), Residual([BatchNorm(), ReLU(), Conv2D(2, size=1)],
                                        [Conv2D(2, size=1, use_bias=False), BatchNorm()]),
            AvgPool(), BatchNorm(), ReLU(), Flatten(), Dense(N_CLASSES)],
        "over_a_pool": [
            Conv2D(2, size=1), BatchNorm(),
            Residual([Conv2D(2, size=1), ReLU(), MaxPool()], [ReLU(), MaxPool()]),
            GlobalMeanPool(), Dense(N_CLASSES)],
        "two_skips": [
            Conv2D(2, size=1), BatchNorm(),
            Residual([ReLU(), Conv2D(2, size=1), Residual([BatchNorm(), ReLU(), Conv2D(2, size=1)]), ReLU()]),
            GlobalMaxPool(), Dense(N_CLASSES)],
        "sum_of_logits": [
            Conv2D(1, size=1), ReLU(), GlobalMeanPool(),
            Residual([Dense(N_CLASSES)], [Dense(2), ReLU(), Dense(N_CLASSES)])],
        "paper_cifar10": narrow(models.paper_cifar10(N_CLASSES), 16, size=1),
        "own_layer": [
            BatchNorm(), Conv2D(2, size=1), Negative(), BatchNorm(), Residual([Conv2D(2, size=1)]),
            Negative(), AvgPool(), Flatten(), Dense(N_CLASSES)],
    }[name]
    network = Network([Standardize(), *layers], SHAPE, N_CLASSES)
    network.initialize("he", 0)
    network.weights += np.float32(0.1) * np.cos(np.arange(network.n_weights, dtype=np.float32))
    return network


def _data(n):
    rng = np.random.default_rng(2)
    images = rng.random((n, *SHAPE), np.float32)
    return datasets.Dataset(images, np.arange(n) % N_CLASSES, images[:1], np.zeros(1, np.int64), N_CLASSES)


N = LANES + 1  # images of a mini-batch: a full block and one more
FEW = LANES - 1  # where a trial takes the simulator long


@pytest.mark.parametrize("name", ["one_conv", "two_conv", "unusual"])  # the rounds below have the others
def test_losses_before_and_after_accepted_changes(name, rng):
    network, data = _network(name), _data(2 * N)
    network.fit_scaling(data.train_images)
    full, delta = FullForward(network, "numpy"), CudaForward(network)
    for parameter in network.parameters():
        indices = list(np.ndindex(parameter.value.shape))
        for i in range(0, len(indices), 1 + len(indices) // 3):
            part = slice(0, N) if i % 2 else slice(N, N + FEW)
            for evaluator in (full, delta):
                evaluator.set_batch(data.train_images[part], data.train_labels[part], i % 2)
            w, step = parameter.value[indices[i]], np.float32(rng.normal(0, 0.5))
            expected = full.losses(parameter, indices[i], (w + step,))
            found = delta.losses(parameter, indices[i], (w + step,))
            np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=f"{parameter}[{indices[i]}]")
            assert parameter.value[indices[i]] == w
            if i % 3:
                delta.keep(parameter, indices[i], w + step)


def _follow(network, twin, streams):
    """Compare two streams of trials; return how many ties they decided differently."""
    ties = n = 0
    for found, expected in zip(*streams, strict=True):
        # atol: a loss near 0 comes from logits that are rounded to 1e-6 themselves
        np.testing.assert_allclose(found.losses, expected.losses, 1e-5, 1e-6, err_msg=f"{found}\n{expected}")
        assert (found.layer, found.index, found.delta) == (expected.layer, expected.index, expected.delta)
        n += 1
        if found.choice == expected.choice:
            assert found.before == expected.before and found.after == expected.after
        else:
            best, second, _ = sorted(expected.losses)
            assert second - best < 1e-5 * best
            ties += 1
            twin.weights[:] = network.weights
    print(f"{n} trials, {ties} ties decided differently")
    return n


@pytest.mark.parametrize("name, preset, hold, n, batch_size", [
    ("one_conv", "notebook", "weight", 2 * N + 2, N), ("one_conv", "paper", "filter", FEW + 1, FEW),
    ("two_conv", "notebook", "filter", N + 2, N), ("original", "notebook", "weight", FEW + 1, FEW),
    ("paper_mnist", "authors", "filter", 2 * FEW, FEW), ("unusual", "authors", "weight", FEW, FEW)])
def test_a_whole_round_decides_as_numpy_does(name, preset, hold, n, batch_size):
    networks, data = [_network(name) for _ in range(2)], _data(n)
    streams = [
        rso.trials(network, data, 1, batch_size, preset, evaluation=evaluation, backend=backend,
                   rng=0, hold=hold)
        for network, evaluation, backend in zip(networks, ("delta", "full"), ("cuda", "numpy"), strict=True)]
    assert _follow(*networks, streams) == sum(p.value.size for p in networks[0].parameters()
                                              if preset != "authors" or p.name != "bias")
    _compare_running_statistics(*networks)


def test_larger_mini_batches_and_a_part_of_the_weights_decide_as_numpy_does():
    networks, data = [_network("two_conv") for _ in range(2)], _data(2 * FEW)
    streams = [
        rso.trials(network, data, 2, FEW, "notebook", evaluation=evaluation, backend=backend, rng=0,
                   growth=2, fraction=0.25)
        for network, evaluation, backend in zip(networks, ("delta", "full"), ("cuda", "numpy"), strict=True)]
    assert _follow(*networks, streams) == 2 * sum(
        max(1, round(p.value.size / 4)) for p in networks[0].parameters())


def _compare_running_statistics(*networks):
    for a, b in zip(*(network.leaves for network in networks), strict=True):
        if isinstance(a, BatchNorm):
            np.testing.assert_allclose(a.running_mean, b.running_mean, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(a.running_variance, b.running_variance, rtol=1e-4)


@pytest.mark.parametrize("name, every, settings", [
    ("identity", 1, {"hold": "filter"}), ("projection", 1, {}), ("over_a_pool", 1, {}),
    ("two_skips", 1, {"hold": "filter"}), ("sum_of_logits", 4, {}), ("own_layer", 4, {}),
    ("paper_cifar10", 11, {"sigma": 0.3, "search_statistics": "fixed", "test_statistics": "first_2000"}),
    ("projection", 4, {"hold": "filter", "search_statistics": "fixed", "test_statistics": "first_2000"})])
def test_residual_networks_decide_as_numpy_does(name, every, settings):
    """Every weight, or with `every` 4 a part of them: a trial takes the simulator long."""
    networks, data, seen = [_network(name) for _ in range(2)], _data(2 * FEW), []

    def some_visits(*arguments):
        chosen = [(p, indices[::every], sigma) for p, indices, sigma in visits(*arguments)]
        seen.append(sum(len(indices) for _, indices, _ in chosen))
        return chosen

    # two mini-batches that come back
    settings = {"batches": "partition", "test_statistics": "running", **settings}
    streams = [
        rso.trials(network, data, 1, FEW, evaluation=evaluation, backend=backend, rng=0, visits=some_visits,
                   **settings)
        for network, evaluation, backend in zip(networks, ("delta", "full"), ("cuda", "numpy"), strict=True)]
    n = _follow(*networks, streams)
    assert n == seen[0] and (n == networks[0].n_weights or every > 1)
    _compare_running_statistics(*networks)


def _search(name, preset="notebook", batch_size=FEW, n_batches=2, **settings):
    network, data = _network(name), _data(n_batches * batch_size)
    return network, rso.trials(network, data, 2, batch_size, preset, backend="cuda", rng=0, **settings)


def test_two_runs_are_the_same_to_the_last_bit(monkeypatch):
    monkeypatch.setattr(cuda, "GROUP", 8)
    runs = [_search("one_conv", batch_size=N, n_batches=1) for _ in range(2)]
    logs = [[trial.losses for trial in islice(stream, 30)] for _, stream in runs]
    assert logs[0] == logs[1]
    np.testing.assert_array_equal(runs[0][0].weights, runs[1][0].weights)


@pytest.mark.parametrize("name, n", [("one_conv", 24), ("two_conv", 27)])
def test_little_memory_changes_no_decision(name, n, monkeypatch):
    logs, most, made = [], [], []
    scant = 75 * LANES  # bytes: enough for one or two of the four mini-batches
    for memory in (1e9, scant, 0):
        def make(_, network, *__, memory=memory):
            made.append(CudaForward(network, memory=memory))
            return made[-1]

        monkeypatch.setattr(rso, "make_evaluator", make)
        _, stream = _search(name, n_batches=4)
        logs.append([])
        for trial in islice(stream, n):
            evaluator = made[-1]
            most.append((memory, evaluator.held_bytes, trial.layer))
            if evaluator.slots:  # one there always is
                one, *others = (sum(a[i].nbytes for a in evaluator.slots.arrays[:3])
                                for i in range(evaluator.slots.n_slots))
                assert one + sum(others) <= max(memory, one)
            logs[-1].append((trial.losses, trial.after))
    for other in logs[1:]:
        np.testing.assert_allclose([log[0] for log in other], [log[0] for log in logs[0]], rtol=1e-5)
        np.testing.assert_array_equal([log[1] for log in other], [log[1] for log in logs[0]])
    assert all(held <= memory for memory, held, _ in most)
    if name == "two_conv":  # some mini-batches are held, the others are not
        little, much = (max(held for memory, held, layer in most if memory == limit and layer == "conv2")
                        for limit in (scant, 1e9))
        assert 0 < little <= scant < much


def test_the_network_has_the_weights_of_the_trials_that_were_seen():
    network, stream = _search("one_conv")
    seen = list(islice(stream, 30))  # the group on the GPU goes on
    expected = _network("one_conv")
    values = expected.views(expected.weights)
    for trial in seen:
        values[f"{trial.layer}.{trial.parameter}"][trial.index] = trial.after
    np.testing.assert_array_equal(network.weights, expected.weights)


def test_an_interrupted_search_goes_on_bit_for_bit(tmp_path):
    # the host draws the first trial of a layer before the GPU has decided the last one of the layer before
    def search(stop=np.inf, **arguments):
        network, trials = _network("two_conv"), []

        def on_trial(trial):
            trials.append(trial)
            if len(trials) == stop:
                os.kill(os.getpid(), signal.SIGINT)

        rso.train(network, _data(3 * FEW), 2, FEW, "authors", backend="cuda", rng=0, trained=("bias",),
                  on_trial=on_trial, **arguments)
        return [array.tobytes() for array in network.state().values()]

    file = dict(checkpoint=tmp_path / "rso.npz", checkpoint_every=0)
    with pytest.raises(KeyboardInterrupt, match="at round 2"):
        search(stop=8, **file)  # of 6 a round
    assert search(resume=True, **file) == search()


def test_a_lost_gpu_leaves_the_weights_of_the_last_whole_group(monkeypatch):
    monkeypatch.setattr(cuda, "GROUP", 8)
    network, stream = _search("one_conv")
    seen = list(islice(stream, 8))
    before = network.weights.copy()

    def fail(*_):
        raise kernels.GpuError("lost")

    monkeypatch.setattr(cuda, "to_host", fail)
    with pytest.raises(kernels.GpuError, match="lost"):
        next(stream)
    np.testing.assert_array_equal(network.weights, before)
    assert any(trial.accepted for trial in seen)


def test_the_host_reads_once_for_a_group(monkeypatch):
    reads = []
    monkeypatch.setattr(cuda, "to_host", lambda array, read=cuda.to_host: reads.append(array) or read(array))
    _, stream = _search("one_conv", "authors", trained=("weight",))
    trials = list(islice(stream, 24 + 18))
    assert [t.parameter for t in trials[::41]] == ["weight", "weight"] and len(reads) == 2


def test_a_weight_changed_by_somebody_else_is_noticed(monkeypatch):
    network, data = _network("two_conv"), _data(N)
    network.fit_scaling(data.train_images)
    full, delta = FullForward(network, "numpy"), CudaForward(network)
    parameter = network.parameters()[2]
    for evaluator in (full, delta):
        evaluator.set_batch(data.train_images, data.train_labels)
    for _ in range(2):
        expected, found = (e.losses(parameter, (1, 0, 0, 2), (0.1, 0.2)) for e in (full, delta))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        network.weights[::7] *= 1.5


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("step", [90.0, 1e4, 1e30, np.inf])
def test_huge_steps_lose_or_win_as_in_full(step):
    logs = []
    for evaluation, backend in (("delta", "cuda"), ("full", "numpy")):
        network = _network("one_conv")
        stream = rso.trials(network, _data(N), 1, N, "notebook", evaluation=evaluation, backend=backend,
                            rng=0, sigma=min(step, 3e38))
        logs.append([(t.losses, t.choice) for t in islice(stream, 6)])
    for (found, choice), (expected, expected_choice) in zip(*logs, strict=True):
        finite = np.isfinite(expected)
        np.testing.assert_allclose(np.array(found)[finite], np.array(expected)[finite], rtol=1e-5)
        assert choice == expected_choice


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_a_trial_without_a_finite_loss_ends_the_search(monkeypatch):
    monkeypatch.setattr(cuda, "GROUP", 2)
    network = _network("one_conv")
    network.weights *= np.float32(1e30)
    before = network.weights.copy()
    stream = rso.trials(network, _data(FEW), 1, FEW, "notebook", backend="cuda", rng=0)
    with pytest.raises(FloatingPointError, match=r"round 1, dense1.weight at \(0, 0\): no loss is finite"):
        next(stream)
    np.testing.assert_array_equal(network.weights, before)


def test_who_evaluates():
    chain, flat = _network("one_conv"), Network([Conv2D(3), Flatten(), Dense(3), ReLU()], (1, 2, 2), 3)
    by_pixel = Network([Conv2D(1), Flatten(), BatchNorm(), Dense(3)], (1, 2, 2), 3)
    for network in (chain, _network("identity")):
        assert isinstance(make_evaluator("delta", network, "cuda"), CudaForward)
    assert isinstance(make_evaluator("full", chain, "cuda"), FullForward)
    assert make_evaluator("full", chain, "cuda", by_block=True).by_block
    with pytest.raises(ValueError, match="expected gate=0, evaluation='full' or backend='cpu'"):
        make_evaluator("delta", chain, "cuda", by_block=True)
    for network, unit in ((chain, "layer"), (flat, "weight"), (by_pixel, "weight")):
        with pytest.warns(UserWarning, match="whole forward pass"):
            evaluator = make_evaluator("delta", network, "cuda", unit=unit)
        assert isinstance(evaluator, FullForward) and evaluator.kernels is kernels.backend("cuda")


class SmallJob(bench.Job):
    """A job whose whole round the simulator can do."""

    def network(self):
        network = Network([Conv2D(1, size=1), ReLU(), GlobalMaxPool(), Dense(N_CLASSES)], SHAPE, N_CLASSES)
        network.initialize("he", 0)
        return network


def test_benchmark(monkeypatch):
    monkeypatch.setattr(bench, "Job", SmallJob)
    (rows,) = bench_gpu.run(
        ["paper_mnist"], _data(2 * FEW), bench.QUICK, 0, FEW, "paper", peaks=(1e12, 1e12))
    assert [row.what for row in rows] == ["FullForward on the GPU", "CudaForward", "CudaForward"]
    assert rows[2].configuration.endswith("hold=filter")
    for row in rows[1:]:
        assert row.value > 0 and row.detail["n_weights"] == 8 and "whole round of 8 in" in row.measured
        assert 0 < row.detail["arithmetic_floor"] < 1e-6 and 0 < row.detail["memory_floor"] < 1e-6


@pytest.mark.parametrize("order", ["last_first", "first_last"])
def test_the_vertex_is_chosen_as_on_the_host(order):
    _, stream = _search("two_conv", "authors", order=order, trained=("weight",), choose="vertex")
    choices = set()
    for trial in islice(stream, 20):
        w = np.float32(trial.before * np.float32(1 - 1e-4))
        best = rso.smallest(trial.losses)
        after = (w, w + trial.delta, w - trial.delta)[best]
        if formulas.has_vertex(*trial.losses):
            best, after = rso.VERTEX, w + np.float32(formulas.vertex(*trial.losses)) * trial.delta
        assert (trial.choice, trial.after) == (rso.CHOICES[best], after)
        choices.add(trial.choice)
    assert "vertex" in choices


def test_the_smallest_of_three_losses():
    values = (0.5, 1.0, np.nan, np.inf, -np.inf)
    for losses in product(values, repeat=3):
        assert formulas.smallest_of_three(*losses) == rso.smallest(list(losses)), losses
