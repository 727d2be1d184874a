"""The search loop: its decisions, its reproducibility, its errors."""

from itertools import islice

import naive
import numpy as np
import pytest
from test_models import naive_logits

from rso_numba import evaluators, rso
from rso_numba.batches import Fresh
from rso_numba.layers import BatchNorm, Conv2D, Dense, Flatten, MaxPool, ReLU, Standardize
from rso_numba.models import Network, build


def tiny_network(seed=0):
    """A network with every kind of parameter, small enough for nested loops: 2 + 4 + 2 * 2 + 84 weights."""
    layers = [Standardize(), Conv2D(2, 1), BatchNorm(), ReLU(), MaxPool(), MaxPool(), Flatten(), Dense(10)]
    network = Network(layers, (1, 8, 8), 10)
    network.initialize("he", seed)
    return network


def run(network, data, n=None, **arguments):
    arguments = {"rounds": 1, "batch_size": 20, "rng": 0} | arguments
    return list(islice(rso.trials(network, data, **arguments), n))


def test_losses_and_decisions_equal_nested_loops(backend, small, monkeypatch):
    network, judge, batches, draw = tiny_network(), tiny_network(), [], Fresh.draw
    monkeypatch.setattr(Fresh, "draw", lambda self: batches.append(draw(self)) or batches[-1])
    judge.fit_scaling(small.train_images)
    value = {str(p): p.value for p in judge.parameters()}
    trials = run(network, small, backend=backend)
    assert len(trials) == network.n_weights
    for trial, (images, labels, _) in list(zip(trials, batches, strict=True))[::7]:
        array = value[f"{trial.layer}.{trial.parameter}"]
        judge.weights[:] = tiny_network().weights
        for earlier in trials[: trials.index(trial)]:
            value[f"{earlier.layer}.{earlier.parameter}"][earlier.index] = earlier.after
        assert array[trial.index] == trial.before

        def loss_of(w, array=array, trial=trial, images=images, labels=labels):
            array[trial.index] = w
            return naive.mean_loss(naive_logits(judge, images, batch_statistics=True), labels)

        expected = naive.rso_trial_losses(loss_of, trial.before, trial.delta)
        np.testing.assert_allclose(trial.losses, expected, rtol=1e-5)
        assert rso.CHOICES.index(trial.choice) == naive.choose(trial.losses)
        kept = (trial.before, trial.before + trial.delta, trial.before - trial.delta)
        assert trial.after == kept[naive.choose(trial.losses)]


def test_every_weight_is_visited_once_a_round_and_ends_as_the_last_trial_left_it(backend, small):
    network = tiny_network()
    trials = run(network, small, rounds=2, backend=backend)
    for r in (1, 2):
        visited = [(t.layer, t.parameter, t.index) for t in trials if t.round == r]
        assert len(visited) == len(set(visited)) == network.n_weights
    value = {str(p): p.value for p in network.parameters()}
    last = {(f"{t.layer}.{t.parameter}", t.index): t.after for t in trials}
    assert all(value[name][index] == after for (name, index), after in last.items())


def test_backends_decide_alike(small):
    by_backend = [run(build("original", (1, 8, 8), rng=0), small, n=60, backend=b) for b in ("cpu", "numpy")]
    ties = 0
    for cpu, numpy in zip(*by_backend, strict=True):
        np.testing.assert_allclose(cpu.losses, numpy.losses, rtol=1e-5)
        if cpu.choice != numpy.choice:
            best, second = sorted(cpu.losses)[:2]
            assert second - best < 1e-5 * best
            ties += 1
            break  # from here on the networks differ
    print(f"{ties} ties decided differently")


@pytest.mark.parametrize("preset", ["paper", "authors", "notebook"])
def test_one_and_two_threads_agree_bit_for_bit(small, preset):
    numba = pytest.importorskip("numba")
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("this machine has one core")
    results = []
    for threads in (1, 2, 2):
        numba.set_num_threads(threads)
        network = build("paper_mnist", (1, 8, 8), rng=0, preset=preset)
        trials = run(network, small, n=250, batch_size=50, preset=preset)
        results.append((network.weights.tobytes(), [(t.losses, t.choice) for t in trials]))
    assert results[0] == results[1] == results[2]


def test_seeds(small):
    def losses(rng):
        return [t.losses for t in run(build("one_conv", (1, 8, 8), rng=0), small, n=30, rng=rng)]

    assert losses(0) == losses(0) == losses(np.random.default_rng(0))
    assert losses(0) != losses(1)
    assert losses(None) != losses(None)


@pytest.mark.parametrize("losses, expected", [
    ((1, 2, 3), 0), ((3, 2, 1), 2), ((3, 1, 2), 1), ((1, 1, 1), 0), ((2, 1, 1), 1), ((1, 2, 1), 0),
    ((np.nan, 2, 3), 1), ((5, np.nan, np.inf), 0), ((np.inf, np.nan, 3), 2), ((np.nan, np.nan, np.inf), 0),
])
def test_smallest(losses, expected):
    assert rso.smallest(np.array(losses, float)) == expected == naive.choose(losses)


def test_a_step_into_nan_is_never_kept(small, backend):
    network = build("one_conv", (1, 8, 8), rng=0)
    with np.errstate(all="ignore"):
        # all images in a batch: what is kept is finite for the next one, too
        trials = run(network, small, n=40, batch_size=70, sigma=3e38, step="fixed", backend=backend)
    assert not all(np.isfinite(t.losses).all() for t in trials)
    assert np.isfinite(network.weights).all()
    for trial in trials:
        assert np.isfinite(trial.losses[rso.CHOICES.index(trial.choice)])


def test_an_interrupted_trial_leaves_the_weight_as_it_was(small, monkeypatch):
    network = build("one_conv", (1, 8, 8), rng=0)
    before = network.weights.copy()
    evaluator = evaluators.FullForward(network, "numpy")
    evaluator.set_batch(small.train_images, small.train_labels)
    calls = []

    def interrupted(logits, labels):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 0.0

    monkeypatch.setattr(evaluator.kernels, "mean_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluator.losses(network.parameters()[0], (0, 0, 0, 0), (1.0, 2.0, 3.0))
    np.testing.assert_array_equal(network.weights, before)


def test_training_learns_and_is_recorded(small, backend):
    network = build("one_conv", (1, 8, 8), rng=0)
    history = rso.train(network, small, 2, batch_size=70, rng=0, backend=backend, track_trials=True)
    first, last = history.rounds[0], history.rounds[-1]
    assert [row.round for row in history.rounds] == [0, 1, 2]
    assert last.train_loss < 0.5 * first.train_loss
    assert last.weights_visited == 2 * network.n_weights == len(history.trials)
    assert last.images_forwarded == 3 * 70 * last.weights_visited
    assert last.accepted == sum(t.choice != "keep" for t in history.trials)
    in_round_2 = [t.accepted for t in history.trials if t.round == 2 and t.layer == "conv1"]
    assert last.acceptance["conv1"] == pytest.approx(np.mean(in_round_2))
    expected = network.evaluate(small.train_images, small.train_labels, backend)
    assert (last.train_loss, last.train_accuracy) == expected
    expected = network.evaluate(small.test_images, small.test_labels, backend)
    assert (last.test_loss, last.test_accuracy) == expected
    assert history["test_accuracy"] == [row.test_accuracy for row in history.rounds]
    assert 0 == first.seconds < history.rounds[1].seconds < last.seconds


def test_a_history_given_keeps_the_rounds_before_an_interrupt(small, monkeypatch):
    from rso_numba.history import History

    history, calls = History("rso"), []
    add_trial = History.add_trial

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) > 800:
            raise KeyboardInterrupt
        add_trial(self, *arguments)

    monkeypatch.setattr(History, "add_trial", interrupted)
    network = build("one_conv", (1, 8, 8), rng=0)
    with pytest.raises(KeyboardInterrupt):
        rso.train(network, small, rounds=2, batch_size=10, rng=0, history=history, backend="numpy")
    assert [row.round for row in history.rounds] == [0, 1]


@pytest.mark.parametrize("arguments, error, message", [
    ({"rounds": 0}, ValueError, "rounds is 0; expected a positive"),
    ({"rounds": 1.5}, TypeError, "rounds is 1.5; expected a positive"),
    ({"rounds": True}, TypeError, "rounds is True"),
    ({"batch_size": 0}, ValueError, "batch_size is 0"),
    ({"batch_size": 71}, ValueError, "batch_size is 71, larger than the training set of 70"),
    ({"preset": "julia"}, ValueError, "'julia'; known presets: paper, authors, notebook, best"),
    ({"backend": "gpu"}, ValueError, "'gpu'; known backends"),
    ({"evaluation": "guess"}, ValueError, "'guess'; known evaluations"),
    ({"sigmas": 1}, TypeError, "unknown setting 'sigmas'; known settings: scaling, init, sigma"),
    ({"sigma": 0}, ValueError, "sigma is 0; expected a positive number or one of"),
    ({"sigma": float("nan")}, ValueError, "sigma is nan"),
    ({"sigma": "big"}, ValueError, "sigma is 'big'"),
    ({"annealing": "fast"}, ValueError, "annealing is 'fast'; expected one of"),
    ({"batches": "some"}, ValueError, "batches is 'some'"),
    ({"order": "random"}, ValueError, "order is 'random'"),
    ({"step": "levy"}, ValueError, "step is 'levy'"),
    ({"unit": "neuron"}, ValueError, "unit is 'neuron'"),
    ({"weight_decay": -1}, ValueError, "weight_decay is -1"),
    ({"trained": ("weights",)}, ValueError, "trained is .* out of"),
    ({"trained": "weight"}, ValueError, "expected a tuple"),
])
def test_bad_arguments_are_refused_at_once(small, arguments, error, message):
    network = build("one_conv", (1, 8, 8), rng=0)
    with pytest.raises(error, match=message):
        rso.trials(network, small, **({"rounds": 1, "batch_size": 10} | arguments))
    assert not network.layers[0].fitted


def test_data_that_does_not_fit_the_network(small):
    with pytest.raises(ValueError, match=r"images \(1, 28, 28\) in 10 classes, the data has \(1, 8, 8\)"):
        rso.trials(build("one_conv"), small, batch_size=10)
    with pytest.raises(ValueError, match="in 3 classes"):
        rso.trials(build("one_conv", (1, 8, 8), n_classes=3), small, batch_size=10)


def test_equal_weights_have_no_sigma(small):
    network = Network([Flatten(), Dense(10)], (1, 8, 8), 10)
    with pytest.raises(ValueError, match="sigma of layer dense1 is 0.0, because all its weights are equal"):
        run(network, small)
    assert run(network, small, n=1, sigma=0.1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_searched(bad, small):
    network = build("one_conv", (1, 8, 8), rng=0)
    network.weights[1] = bad
    with pytest.raises(FloatingPointError, match=r"conv1.weight holds 1 NaN or .* at index \(0, 0, 0, 1\)"):
        rso.trials(network, small, 1, 20)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("evaluation, unit, where", [
    ("delta", "weight", r"dense1.weight at \(0, 0\)"), ("full", "weight", r"dense1.weight at \(0, 0\)"),
    ("full", "filter", "dense1.weight at 0"), ("full", "layer", "dense1.weights"),
])
def test_a_trial_without_a_finite_loss_ends_the_search(evaluation, unit, where, small, backend):
    network = build("one_conv", (1, 8, 8), rng=0)
    network.weights *= np.float32(1e30)
    before = network.weights.copy()
    arguments = dict(sigma="fan_in", evaluation=evaluation, unit=unit, backend=backend, weight_decay=0.1)
    with pytest.raises(FloatingPointError, match=rf"round 1, {where}: no loss is finite \(nan, nan, nan\)"):
        run(network, small, **arguments)
    with pytest.raises(FloatingPointError, match="RSO, after round 0: 70 of 70 images have a loss"):
        rso.train(network, small, 1, 20, **arguments)
    np.testing.assert_array_equal(network.weights, before)


class AlwaysPlus:
    """An evaluator that finds w + Delta best, whatever it is."""

    def set_batch(self, images, labels, key=None):
        pass

    def losses(self, parameter, index, candidates):
        return np.array([2.0, 1.0, 3.0])

    def keep(self, parameter, index, value):
        parameter.value[index] = value


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("unit", ["weight", "filter", "network"])
def test_a_weight_never_becomes_infinite(unit, small):
    network = build("one_conv", (1, 8, 8), rng=0)
    with pytest.raises(FloatingPointError, match="RSO, round .*an infinite weight has the smallest loss"):
        run(network, small, rounds=50, sigma=1e38, unit=unit, evaluator=AlwaysPlus())
    assert np.isfinite(network.weights).all()
    assert unit == "network" or np.abs(network.weights).max() > 1e37  # whose first step is too long


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_weights_whose_squares_overflow_have_no_sigma(small):
    network = build("one_conv", (1, 8, 8), rng=0)
    network.weights *= np.float32(1e25)
    with pytest.raises(ValueError, match="sigma of layer .* is (inf|nan), because .*squares .* overflow"):
        run(network, small)


def test_callbacks_are_told_of_trials_layers_and_rounds(small):
    network, told = build("one_conv", (1, 8, 8), rng=0), {"trial": [], "layer": [], "round": []}
    history = rso.train(network, small, 2, 20, rng=0, backend="numpy", track_trials=True,
                        on_trial=told["trial"].append, on_layer=told["layer"].append,
                        on_round=told["round"].append)
    assert told["trial"] == history.trials
    assert [(trial.round, trial.layer, trial.parameter) for trial in told["layer"]] == [
        (1, "dense1", "bias"), (1, "conv1", "bias"), (2, "dense1", "bias"), (2, "conv1", "bias")]
    assert told["round"] == history.rounds[1:]


@pytest.mark.parametrize("name, visited", [("on_trial", 1), ("on_layer", 650), ("on_round", 690)])
def test_a_callback_that_returns_true_ends_the_training(small, name, visited):
    network = build("one_conv", (1, 8, 8), rng=0)
    history = rso.train(network, small, 3, 20, rng=0, backend="numpy", **{name: lambda _: True})
    assert [row.weights_visited for row in history.rounds] == [0, visited]
    # the last row is of the network as it is
    assert history.rounds[-1].test_loss == network.evaluate(small.test_images, small.test_labels, "numpy")[0]
