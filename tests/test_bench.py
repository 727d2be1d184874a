"""The benchmark: which rows it prints and writes, what it skips, and that it compares equal things."""

import json
import sys

import numpy as np
import pytest

from rso_numba import bench, bench_gpu, bench_torch, datasets, models, rso, sgd
from rso_numba.__main__ import benchmark_table, main
from rso_numba.evaluators import FullForward
from rso_numba.evaluators.graph import Graph


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tests change quickly between libraries, whose idle threads would take each other's cores."""
    torch = bench_torch.torch_or_none()
    threads = torch and torch.get_num_threads()
    if torch:
        torch.set_num_threads(1)
    yield
    if torch:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def all_digits28():
    return datasets.load_digits(size=28)


@pytest.fixture(scope="module")
def digits28(all_digits28):
    return all_digits28.subset(80, 10, rng=0)


def test_the_floors_of_a_gpu_count_what_a_trial_computes(all_digits28):
    job = job_of("one_conv", all_digits28, batch_size=100)
    # a filter at 784 pixels and 196 features for 10 logits, three times; in the last layer three logits
    convolution, dense = 3 * (784 * 9 + 196 * 10), 3
    # input, map and pooled map of a channel, then logits: written and read for three candidates
    moved, moved_last = 784 + 3 * 2 * (784 + 196 + 10) + 10, 10 + 1
    n_convolution, n_dense = 4 * 9 + 4, 7840 + 10
    arithmetic, memory = bench_gpu.floors(job, (1e9, 1e9))
    assert arithmetic == pytest.approx(100 * (convolution * n_convolution + dense * n_dense) / 1e9)
    assert memory == pytest.approx(4 * 100 * (moved * n_convolution + moved_last * n_dense) / 1e9)
    # merged with their pools, the six convolutions and the dense layer of one image
    network = job_of("paper_mnist", all_digits28, "authors").network()
    forward = sum(size.multiply_adds for size in bench_gpu.sizes(Graph(network)).values())
    assert forward == 784 * 144 + 196 * 16 * 256 + 196 * 2304 + 49 * 16 * 256 + 2 * 49 * 2304 + 160


def job_of(model, data, preset="notebook", batch_size=16):
    return bench.Job(model, data, batch_size, preset, seed=0)


@pytest.fixture
def without_torch(monkeypatch, all_digits28):
    monkeypatch.setitem(sys.modules, "torch", None)  # after the digits: SciPy stumbles over it, too
    monkeypatch.setattr(datasets, "load", lambda *_: all_digits28)


# ---- the command ----


@pytest.fixture
def written(tmp_path, capsys, without_torch, monkeypatch):
    """Output and JSON of `rso-numba bench --quick` without PyTorch."""
    path = tmp_path / "new" / "bench.json"
    monkeypatch.setattr(bench, "QUICK", bench.Effort(1, 2, (), 1, images=16, matrix=32, rest=0.0))
    arguments = ["bench", "--model", "one_conv", "--data", "digits28", "--quick", "--batch-size", "16",
                 "--seed", "3", "--out", str(path)]
    assert main(arguments) == 0
    return capsys.readouterr().out, json.loads(path.read_text())


def test_command_prints_a_table_and_writes_json(written):
    out, result = written
    rows = result["rows"]
    assert {(row["what"], row["unit"]) for row in rows} == {
        ("FullForward", "s/weight"), ("DeltaForward", "s/weight"), (bench.THREE_PASSES, "s/weight"),
        (bench.CACHED, "s/weight"), ("SGD", "s/epoch"), ("SGD, PyTorch", "s/epoch"),
        ("NumPy", "GFLOP/s"), ("conv2d_forward", "GFLOP/s"), ("conv2d, Winograd", "GFLOP/s"),
        ("PyTorch", "GFLOP/s")}
    lines = out.splitlines()
    assert len(lines) == len(rows) + 3  # header, rule, and what was written
    column = lines[0].index("what")
    assert all(line[column:].startswith(row["what"]) for line, row in zip(lines[2:-1], rows, strict=True))
    assert lines[-1].startswith("wrote ")
    assert result["seed"] == result["arguments"]["seed"] == 3 and result["threads"] >= 1
    assert result["versions"]["numba"] and result["machine"]["cores"] >= 1 and result["command"]


def test_without_torch_its_rows_are_skipped_visibly(written):
    out, result = written
    skipped = [row for row in result["rows"] if row["value"] is None]
    assert {row["what"] for row in skipped} == {bench.THREE_PASSES, bench.CACHED, "SGD, PyTorch", "PyTorch"}
    assert all(row["measured"] == bench.NO_TORCH and row["relative"] is None for row in skipped)
    assert out.count("skipped: PyTorch is not installed; pip install -e '.[bench]'") == len(skipped)
    timed = [row for row in result["rows"] if row["value"] is not None]
    assert len(timed) == 11 and all(0 < row["value"] < np.inf for row in timed)
    assert not any("PyTorch" in row["against"] for row in result["rows"])


def test_an_interrupted_benchmark_keeps_what_it_measured(tmp_path, capsys, monkeypatch, without_torch):
    def run(*_):
        yield [bench.Row("one_conv", "FullForward", 0.5, "s/weight", "sampled")]
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run", run)
    path = tmp_path / "bench.json"
    assert main(["bench", "--quick", "--data", "digits28", "--out", str(path)]) == 130
    assert "0.5000" in capsys.readouterr().out
    assert [row["value"] for row in json.loads(path.read_text())["rows"]] == [0.5]


@pytest.mark.parametrize("arguments, named", [
    (["--batch-size", "9999"], "batch_size is 9999"), (["--batch-size", "0"], "batch_size is 0"),
    (["--seed", "-1"], "seed is -1"), (["--seed", "-1", "--quick"], "seed is -1"),
])
def test_bad_numbers_are_errors_of_the_user(tmp_path, capsys, without_torch, arguments, named):
    path = tmp_path / "bench.json"
    assert main(["bench", "--data", "digits28", "--model", "one_conv", "--out", str(path), *arguments]) == 2
    assert f"error: {named}" in capsys.readouterr().err and not path.exists()


def test_a_folder_is_no_file_to_write(tmp_path, capsys, monkeypatch, without_torch):
    monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("measured"))
    assert main(["bench", "--quick", "--data", "digits28", "--out", str(tmp_path)]) == 2
    assert "a folder; expected a file" in capsys.readouterr().err


def test_what_cannot_be_printed_is_written(tmp_path, monkeypatch, without_torch):
    def fail(*_, file=None, **__):
        if file is None:
            raise BrokenPipeError

    monkeypatch.setattr(bench, "run", lambda *_: [[bench.Row("a", "b", 0.5, "s/weight", "whole")]])
    monkeypatch.setattr("builtins.print", fail)
    assert main(["bench", "--quick", "--data", "digits28", "--out", str(tmp_path / "bench.json")]) == 0
    assert json.loads((tmp_path / "bench.json").read_text())["rows"][0]["value"] == 0.5


def test_table_is_aligned():
    table = benchmark_table([bench.Row("a", "b", 1.5, "s/weight", "whole", 2.0, "peer", peak_mib=None),
                             bench.Row("longer", "b", None, "s/weight", "skipped: why", peak_mib=10.0)])
    header, rule, first, second = table.splitlines()
    assert set(rule) == {"-"} and "2.00 x peer" in first and "skipped: why" in second
    assert header.index("how") == first.index("whole") == second.index("skipped")


# ---- how seconds are extrapolated ----


def test_a_whole_visit_is_its_sum_and_a_sample_is_extrapolated():
    assert bench.Visit(3, 1, [1.0, 2.0, 6.0]).total(0, 1) == 9
    assert bench.Visit(2, 1, [9.0, 9.0, 1.0, 2.0, 2.0, 2.0]).total(0, 1) == 4  # the median of three rounds
    # one first trial as it is, and the median of the others for the other 9 weights
    assert bench.Visit(10, 1, [5.0, 1.0, 1.0, 9.0]).total(1, 1) == 5 + 9 * 1
    # means of two trials, of which the first is dear: (4 + 2) / 2 = 3, and 3, and 10
    assert bench.Visit(100, 2, [4.0, 2.0, 4.0, 2.0, 10.0, 10.0]).total(0, 2) == 100 * 3
    # more first trials than were timed
    assert bench.Visit(10, 1, [5.0, 1.0]).total(12, 1) == 5 + 9 * 1


def test_choices(digits28):
    network = job_of("two_conv", digits28).network()
    parameter = network.parameters()[2]  # (16, 16, 3, 3)
    indices = list(np.ndindex(parameter.value.shape))
    assert bench.first_n(3)(parameter, indices) == indices[:3]
    assert bench.first_n(None)(parameter, indices) == indices
    assert len(bench.filters(10)(parameter, indices)) == 2 * 144
    assert len(bench.filters(300)(parameter, indices)) == 3 * 144
    assert [index[0] for index in bench.spread(3)(parameter, indices)] == [0, 5, 10]
    assert bench.spread(3)(parameter, indices[:2]) == indices[:2]


def test_the_loop_that_is_timed_is_that_of_rso(digits28):
    job = job_of("one_conv", digits28)
    timed = bench.timed_visits(job, bench.first_n(None), evaluation="full", trained=("bias",))
    assert {name: (visit.n_weights, len(visit.seconds)) for name, visit in timed.items()} \
        == {"dense1.bias": (10, 10), "conv1.bias": (4, 4)}

    twice = bench.timed_visits(job, bench.first_n(None), None, 2, evaluation="full", trained=("bias",))
    assert {name: len(visit.seconds) for name, visit in twice.items()} == {"dense1.bias": 20, "conv1.bias": 8}
    assert twice["conv1.bias"].losses[:4] == timed["conv1.bias"].losses

    trials = list(rso.trials(job.network(), digits28, 1, 16, "notebook", evaluation="full",
                             rng=np.random.default_rng([0, 1]), trained=("bias",)))
    # the first trial is made twice and counted once, so the second is the first that is counted
    assert len(trials) == 14 == sum(len(visit.losses) for visit in timed.values())


def test_kernels_loaded_counts_compiled_functions(digits28):
    evaluator = FullForward(job_of("one_conv", digits28).network())
    evaluator.set_batch(digits28.train_images, digits28.train_labels)
    from_cache, compiled = bench.kernels_loaded()
    assert from_cache + compiled > 0


# ---- the peer ----


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("model, preset", [
    ("one_conv", "paper"), ("two_conv", "notebook"), ("original", "notebook"), ("paper_mnist", "authors"),
    ("paper_cifar10", "authors")])
def test_torch_gives_the_same_losses(model, preset, cached, digits28, rng):
    pytest.importorskip("torch")
    network = models.build(model, digits28.image_shape, 10, rng, preset)
    network.fit_scaling(digits28.train_images)
    network.weights += rng.normal(0, 0.01, network.n_weights).astype(np.float32)
    before = network.weights.copy()
    ours, peer = FullForward(network), bench_torch.TorchForward(network, cached=cached)
    for evaluator in (ours, peer):
        evaluator.set_batch(digits28.train_images[:10], digits28.train_labels[:10])
    for parameter in network.parameters():
        index = tuple(int(rng.integers(n)) for n in parameter.value.shape)
        candidates = parameter.value[index] + np.float32([0, 0.3, -0.3])
        expected = ours.losses(parameter, index, candidates)
        losses = peer.losses(parameter, index, candidates)
        np.testing.assert_allclose(losses, expected, rtol=1e-4, err_msg=str(parameter))
    assert np.array_equal(network.weights, before)
    assert peer.not_counted > 0


def test_torch_sgd_ends_with_the_same_weights(digits28):
    pytest.importorskip("torch")
    ours, peer = (job_of("original", digits28).network() for _ in range(2))
    sgd.train(ours, digits28, 1, 32, bench.LEARNING_RATE, rng=5)
    assert bench_torch.torch_sgd(peer, digits28, 32, rng=5) > 0
    np.testing.assert_allclose(peer.weights, ours.weights, rtol=1e-4, atol=1e-6)


def test_with_torch_every_row_is_compared(digits28):
    pytest.importorskip("torch")
    rows = bench.search_rows(job_of("one_conv", digits28), bench.QUICK)
    assert [row.what for row in rows] == ["FullForward", "DeltaForward", bench.THREE_PASSES, bench.CACHED]
    for row in rows:
        assert row.relative == rows[2].value / row.value and row.against == bench.THREE_PASSES
        assert row.measured.startswith("sampled ") and row.detail["n_weights"] == 7890
        assert row.detail["round_seconds"] == pytest.approx(7890 * row.value)


def test_other_losses_than_those_of_full_forward_are_refused(digits28):
    class Wrong(FullForward):
        def losses(self, parameter, index, candidates):
            return super().losses(parameter, index, candidates) * 1.001

    with pytest.raises(AssertionError, match="wrong, dense1.weight"):
        bench.search_row(job_of("one_conv", digits28), bench.QUICK, "wrong", bench.first_n(1), Wrong)


def test_a_tie_that_is_decided_otherwise_is_no_other_loss(digits28):
    differs, kept = [], []

    class Nearly(FullForward):
        def losses(self, parameter, index, candidates):
            losses = super().losses(parameter, index, candidates)
            nearly = losses * (1 - 1e-5 * np.arange(3))
            differs.append(np.argmin(nearly) != np.argmin(losses))
            self.full_keeps = candidates[np.argmin(losses)]
            return nearly

        def keep(self, parameter, index, value):
            kept.append(value == self.full_keeps)
            super().keep(parameter, index, value)

    job = job_of("one_conv", digits28).small()

    def both(network, fixed_images):
        return bench.Compared(FullForward(network), Nearly(network), "nearly")

    bench.timed_visits(job, bench.first_n(2), both, sigma=1e-6)
    assert any(differs) and all(kept)


def test_paper_mnist_has_rows_for_held_batches_and_one_thread(digits28, without_torch, monkeypatch):
    threads = [2]
    monkeypatch.setattr(bench.numba, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(bench.numba, "set_num_threads", threads.append)

    def search_row(job, effort, what, choose, evaluator_of=None, **arguments):
        return bench.Row(str(job), what, 1 / threads[-1], "s/weight", "sampled", detail=arguments)

    monkeypatch.setattr(bench, "search_row", search_row)
    rows = bench.search_rows(job_of("paper_mnist", digits28, "authors"), bench.QUICK)
    assert [row.what for row in rows[:4]] == [
        "FullForward", "DeltaForward", "DeltaForward", "DeltaForward, 1 thread"]
    assert rows[2].detail == {"evaluation": "delta", "hold": "filter"}
    assert threads == [2, 1, 2] and rows[3].measured == "sampled; 2 threads are 2.00 x as fast"
