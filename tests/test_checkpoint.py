"""Trainings that are interrupted, killed, or whose files are damaged, and go on."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoint_worker import RUNS, train

from rso_numba import build, rso, sgd, trial_log
from rso_numba.layers import BatchNorm, Conv2D, Dense, Flatten, ReLU, Residual
from rso_numba.models import Network

SMALL_NORMS = dict(model="paper_mnist", preset="authors", trained=("gamma", "beta"))


def run(data, solver="rso", resume=False, stop=None, number=signal.SIGINT, seed=5, **arguments):
    """Train until its end, or until the `stop`th trial sends a signal; return network, history, generator."""
    arguments, rng = dict(rounds=2, backend="numpy", batch_size=20) | arguments, np.random.default_rng(seed)
    model, preset = arguments.pop("model", "one_conv"), arguments.get("preset", "paper")
    network, trials = build(model, data.image_shape, rng=0, preset=preset), []
    if solver == "sgd":
        epochs = arguments.pop("rounds")
        history = sgd.train(network, data, epochs, rng=rng, resume=resume, learning_rate=0.1, **arguments)
        return network, history, rng

    def on_trial(trial):
        trials.append(trial)
        if len(trials) == stop:
            os.kill(os.getpid(), number)

    history = rso.train(network, data, on_trial=on_trial, rng=rng, resume=resume, **arguments)
    return network, history, rng


def assert_same(found, expected):
    """Both trainings have come to the same: networks, histories but for seconds, next random numbers."""
    for (name, array), other in zip(found[0].state().items(), expected[0].state().values(), strict=True):
        assert array.tobytes() == other.tobytes(), name
    rows, others = ([replace(row, seconds=0) for row in run[1].rounds] for run in (found, expected))
    assert rows == others
    assert found[2].bit_generator.state == expected[2].bit_generator.state


def interrupted(data, path, stops, **arguments):
    """Interrupt a training at each of `stops`, counted anew from where it goes on; let it end; return it."""
    for i, stop in enumerate(stops):
        with pytest.raises(KeyboardInterrupt, match="with resume=True the training goes on"):
            run(data, checkpoint=path, checkpoint_every=0, resume=i > 0, stop=stop, **arguments)
    return run(data, checkpoint=path, checkpoint_every=0, resume=True, **arguments)


SEARCHES = [
    dict(),
    dict(preset="notebook", model="two_conv", backend="cpu", rounds=1),
    dict(preset="authors", backend="cpu", hold="filter"),
    dict(**SMALL_NORMS, backend="cpu"),
    dict(**SMALL_NORMS, evaluation="full", rounds=1, backend="cpu"),
    dict(preset="notebook", unit="filter", order="first_last", test_statistics="first_2000"),
    dict(preset="authors", unit="network", rounds=100),
    dict(preset="best", growth=3, fraction=0.3, backend="cpu", rounds=3),
]


@pytest.mark.parametrize("arguments", SEARCHES, ids=str)
def test_an_interrupted_search_goes_on_bit_for_bit(small, tmp_path, arguments):
    logs = [None, None] if "unit" in arguments else [tmp_path / "whole.csv", tmp_path / "parts.csv"]
    expected = run(small, trial_log=logs[0], **arguments)
    n = expected[1].weights_visited
    found = interrupted(small, tmp_path / "rso.npz", [n // 3, n // 3, 1], trial_log=logs[1], **arguments)
    assert_same(found, expected)
    assert logs[0] is None or logs[0].read_text() == logs[1].read_text()  # to the last bit of the losses


def test_fifty_rounds_are_stopped_ten_times(small, tmp_path):
    # (of biases only: with all weights it takes minutes)
    arguments = dict(preset="authors", backend="cpu", rounds=50, hold="filter", trained=("bias",))
    expected = run(small, **arguments)
    stops = np.random.default_rng(0).integers(1, expected[1].weights_visited // 12, 10).tolist()
    assert_same(interrupted(small, tmp_path / "rso.npz", stops, **arguments), expected)


@pytest.mark.parametrize("name", ["residual", "one layer"])
def test_a_network_with_a_residual_or_one_layer_goes_on(small, tmp_path, name):
    # the losses are compared, too: by mini-batches that come back they would differ first
    def search(**arguments):
        body = [Conv2D(2), BatchNorm(), Residual([Conv2D(3), ReLU(), Conv2D(2)])]
        layers = [*(body if name == "residual" else []), Flatten(), Dense(10)]
        network, log = Network(layers, small.image_shape, 10), tmp_path / "log.csv"
        network.initialize("he", 0)
        rso.train(network, small, 2, 20, "notebook", rng=1, trial_log=log, **arguments)
        return network.weights.tobytes(), log.read_text()

    arguments = dict(checkpoint=tmp_path / "rso.npz", checkpoint_every=0)
    for i, stop in enumerate((700, 900)):
        trials = iter(range(stop))
        with pytest.raises(KeyboardInterrupt):
            search(resume=i > 0, **arguments, on_trial=lambda _, trials=trials: (
                next(trials, None) is None and os.kill(os.getpid(), signal.SIGTERM)))
    assert search(resume=True, **arguments) == search()


@pytest.mark.parametrize("step", [1, 4, 7])
def test_an_interrupted_sgd_goes_on_bit_for_bit(small, tmp_path, monkeypatch, step):
    arguments = dict(solver="sgd", rounds=3, momentum=0.9, weight_decay=1e-3, validation_fraction=0.2,
                     model="original")
    expected, steps, one = run(small, **arguments), [], sgd._step

    def interrupting_step(*step_arguments, **settings):
        one(*step_arguments, **settings)
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sgd, "_step", interrupting_step)
    file = dict(checkpoint=tmp_path / "sgd.npz", checkpoint_every=1000)
    place = f"epoch {(step + 2) // 3}, step {(step - 1) % 3 + 1} of 3"
    with pytest.raises(KeyboardInterrupt, match=f"SIGTERM.* at {place}"):
        run(small, **file, **arguments)
    assert_same(run(small, resume=True, **file, **arguments), expected)
    assert len(steps) == 9  # none was made twice


@pytest.mark.parametrize("name", RUNS)
def test_a_training_that_is_killed_five_times_goes_on_bit_for_bit(name, tmp_path):
    expected = train(name, None)
    worker, moments = Path(__file__).with_name("checkpoint_worker.py"), random.Random(name)
    for _ in range(5):
        command = [sys.executable, worker, name, tmp_path / "run.npz"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE,
                                   env={**os.environ, "PYTHONPATH": str(worker.parents[1])})
        assert process.stdout.readline() == b"begun\n"
        time.sleep(moments.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it has ended before it was killed"
    for key, array in train(name, tmp_path / "run.npz").state().items():
        assert array.tobytes() == expected.state()[key].tobytes(), key


def test_rounds_that_end_by_a_callback_or_by_themselves_are_finished(small, tmp_path):
    arguments = dict(checkpoint=tmp_path / "rso.npz")
    network = build("one_conv", small.image_shape, rng=0)
    history = rso.train(network, small, 3, 20, rng=0, on_round=lambda row: True, backend="numpy", **arguments)
    other = build("one_conv", small.image_shape, rng=1)
    again = rso.train(other, small, 3, 20, rng=0, backend="numpy", resume=True, **arguments)
    assert again.rounds == history.rounds and len(again.rounds) == 2
    assert other.weights.tobytes() == network.weights.tobytes()
    # without resume, what is finished is made anew
    assert len(rso.train(other, small, 1, 20, rng=0, backend="numpy", **arguments).rounds) == 2


def test_the_checkpoint_before_the_last_one_can_be_gone_on_with(small, tmp_path):
    path, expected = tmp_path / "rso.npz", run(small)
    with pytest.raises(KeyboardInterrupt):
        run(small, checkpoint=path, checkpoint_every=0, stop=700)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged .* resume='previous' goes on from the one before"):
        run(small, checkpoint=path, resume=True)
    assert_same(run(small, checkpoint=path, resume="previous"), expected)


def test_a_full_disk_costs_no_checkpoint(small, tmp_path, monkeypatch):
    path, expected, savez, calls = tmp_path / "rso.npz", run(small), np.savez, []

    def full(file, **arrays):
        calls.append(file)
        if len(calls) == 3:
            Path(file).write_bytes(b"the beginning")
            raise OSError(28, "No space left on device")
        savez(file, **arrays)

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        run(small, checkpoint=path, checkpoint_every=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rso.npz", "rso.previous.npz"]
    monkeypatch.undo()
    assert_same(run(small, checkpoint=path, resume=True), expected)


def test_checkpoints_of_other_trainings_are_refused(small, digits, tmp_path):
    file = dict(checkpoint=tmp_path / "rso.npz", checkpoint_every=0)
    with pytest.raises(KeyboardInterrupt):
        run(small, stop=200, **file)
    for error, message, arguments in (
        (FileExistsError, "interrupted, at round 1, dense1; go on with resume=True .*, or delete", dict()),
        (ValueError, "another training: rounds was 2, and is 3", dict(resume=True, rounds=3)),
        (ValueError, "another training: batch_size was 20, and is 10", dict(resume=True, batch_size=10)),
        (ValueError, "another training: settings was", dict(resume=True, sigma=0.1)),
        (ValueError, "another training: network was", dict(resume=True, model="two_conv")),
        (ValueError, "another training: solver was 'rso', and is 'sgd'", dict(resume=True, solver="sgd")),
        (ValueError, "resume is 'yes'; expected False, True or 'previous'", dict(resume="yes")),
    ):
        with pytest.raises(error, match=message):
            run(small, **file, **arguments)
    with pytest.raises(ValueError, match="another training: data was"):
        run(digits.subset(70, 30, rng=1), resume=True, **file)
    with pytest.raises(ValueError, match="one with PCG64|Generator with MT19937"):
        rso.train(build("one_conv", small.image_shape, rng=0), small, 2, 20, backend="numpy", resume=True,
                  rng=np.random.Generator(np.random.MT19937(0)), **file)


def test_arguments_that_do_not_fit_a_checkpoint_are_refused(small, tmp_path):
    for message, arguments in (
        ("resume is True and checkpoint is None", dict(resume=True)),
        ("expected a file that ends in .npz", dict(checkpoint=tmp_path / "rso.ckpt")),
        ("checkpoint_every is -1; expected 0 <=", dict(checkpoint="a.npz", checkpoint_every=-1)),
        ("track_trials is True", dict(checkpoint=tmp_path / "rso.npz", track_trials=True)),
    ):
        with pytest.raises(ValueError, match=message):
            run(small, **arguments)
    (tmp_path / "rso.npz").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is damaged or is no checkpoint .*; delete it"):
        run(small, checkpoint=tmp_path / "rso.npz")
    with pytest.raises(FileNotFoundError, match="there is no .*previous"):
        run(small, checkpoint=tmp_path / "new.npz", resume="previous")


@pytest.mark.parametrize("kind", [np.random.MT19937, np.random.SFC64, np.random.Philox])
def test_every_kind_of_generator_goes_on(small, tmp_path, kind):
    def search(**arguments):
        network, rng = build("one_conv", small.image_shape, rng=0), np.random.Generator(kind(3))
        rso.train(network, small, 1, 20, rng=rng, backend="numpy", **arguments)
        return network.weights.tobytes(), rng.random()

    file = dict(checkpoint=tmp_path / "rso.npz", checkpoint_every=0)
    with pytest.raises(KeyboardInterrupt):
        search(on_layer=lambda _: os.kill(os.getpid(), signal.SIGINT), **file)
    assert search(resume=True, **file) == search()


def test_a_log_gives_the_weights_again_also_of_a_search_that_was_interrupted(small, tmp_path):
    network, _, _ = run(small, preset="authors", trial_log=tmp_path / "whole.csv")
    again = build("one_conv", small.image_shape, rng=0, preset="authors")
    assert trial_log.replay(again, tmp_path / "whole.csv") == 1352
    assert again.weights.tobytes() == network.weights.tobytes()
    arguments = dict(preset="authors", trial_log=tmp_path / "parts.csv")
    interrupted(small, tmp_path / "rso.npz", [300, 650, 20], **arguments)
    assert (tmp_path / "parts.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_logs_that_do_not_fit_are_refused(small, tmp_path):
    path, network = tmp_path / "log.csv", build("one_conv", small.image_shape, rng=0)
    run(small, rounds=1, trial_log=path)
    with pytest.raises(ValueError, match="line 2: the weight was .* expected the network with its initial"):
        trial_log.replay(build("one_conv", small.image_shape, rng=1), path)
    path.write_text(path.read_text().replace("dense1", "dense7", 1))
    with pytest.raises(ValueError, match="line 2: no trial of this network .KeyError"):
        trial_log.replay(network, path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is no log of trials; expected the columns round, layer"):
        trial_log.replay(network, path)
    with pytest.raises(ValueError, match="many weights at once"):
        run(small, trial_log=path, unit="filter")
    with pytest.raises(KeyboardInterrupt):
        run(small, checkpoint=tmp_path / "rso.npz", checkpoint_every=0, stop=670, trial_log=path)
    path.write_text(path.read_text()[:200])
    with pytest.raises(ValueError, match="trials, and the search has made 650; give the log that it wrote"):
        run(small, checkpoint=tmp_path / "rso.npz", resume=True, trial_log=path)
