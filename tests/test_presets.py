"""Every row of the table of presets: what the paper, the authors and the notebook do differently."""

from itertools import islice

import naive
import numpy as np
import pytest
from networks import narrow

from rso_numba import models, rso
from rso_numba.batches import POLICIES, Fresh, LazyImages, Partition, Slices
from rso_numba.datasets import Dataset
from rso_numba.kernels import plain
from rso_numba.layers import BatchNorm, Conv2D, Dense, Flatten, Standardize
from rso_numba.models import Network, build
from rso_numba.presets import PRESETS, resolve
from rso_numba.visits import annealing_factor, draw_step, sigmas, visiting_order, visits, weight_indices


def some_trials(small, n=40, model="one_conv", **arguments):
    preset = arguments.get("preset", "paper")
    network = build(model, (1, 8, 8), rng=0, preset=preset)
    arguments = {"rounds": 1, "batch_size": 20, "rng": 0, "backend": "numpy"} | arguments
    return network, list(islice(rso.trials(network, small, **arguments), n))


# input and initial weights: tests/test_models.py


def test_sigma_paper_is_the_std_of_all_weights_of_the_layer():
    network = build("one_conv", rng=0)
    w, b, v, c = (p.value.ravel() for p in network.parameters())
    sigma = sigmas(network, PRESETS["paper"].sigma, None)
    assert sigma["conv1.weight"] == sigma["conv1.bias"] == pytest.approx(np.std([*w, *b]), rel=1e-5)
    assert sigma["dense1.weight"] == sigma["dense1.bias"] == pytest.approx(np.std([*v, *c]), rel=1e-5)


def test_sigma_authors_is_fan_in():
    sigma = sigmas(build("paper_mnist", preset="authors"), PRESETS["authors"].sigma, None)
    assert sigma["conv1.weight"] == pytest.approx(np.sqrt(2 / 9))
    assert sigma["conv2.weight"] == pytest.approx(np.sqrt(2 / 144))
    assert sigma["dense1.weight"] == pytest.approx(np.sqrt(2 / 16))
    assert {sigma[f"batchnorm{i}.{name}"] for i in range(1, 7) for name in ("gamma", "beta")} == {0.167}


def test_sigma_authors_of_the_residual_network():
    network = build("paper_cifar10", (3, 32, 32), preset="authors")
    sigma = sigmas(network, PRESETS["authors"].sigma, None)
    expected = {"conv1": 0.272, "conv2": 0.118, "conv3": 0.118, "conv4": 0.118, "shortcut_conv1": 0.0833,
                "dense1": 0.25, **{f"conv{i}": 0.0833 for i in range(5, 10)}}
    assert {name: pytest.approx(s, rel=5e-3) for name, s in expected.items()} == {
        name.removesuffix(".weight"): s for name, s in sigma.items() if name.endswith(".weight")}
    assert {s for name, s in sigma.items() if "batchnorm" in name} == {0.167}
    stds = {str(p): p.value.std() for p in network.parameters()}  # of the initial weights
    for name in ("conv2", "conv4", "conv5", "conv9"):
        assert stds[f"{name}.weight"] == pytest.approx(expected[name], rel=0.05)
    assert stds["shortcut_conv1.weight"] == pytest.approx(0.25, rel=0.1)


def test_sigma_notebook_pools_the_layers_from_the_first():
    sigma = sigmas(build("two_conv"), PRESETS["notebook"].sigma, np.random.default_rng(5))
    rng, pool, expected = np.random.default_rng(5), [], []
    for tensors in ((144, 16), (2304, 16), (7840, 10)):
        for size in tensors:
            pool += list(rng.normal(0, np.sqrt(2 / size), size))
        expected.append(np.std(pool, ddof=1))
    names = [str(p) for p in build("two_conv").parameters()]
    np.testing.assert_allclose([sigma[name] for name in names], np.repeat(expected, 2))


def test_sigma_may_be_a_number_for_every_parameter(small):
    network = build("one_conv", small.image_shape)
    numbers = {"conv1.weight": 1.0, "conv1.bias": 2.0, "dense1.weight": 3.0, "dense1.bias": 4.0}
    trials = rso.trials(network, small, 1, 16, sigma=numbers, step="fixed", rng=0)
    assert {f"{t.layer}.{t.parameter}": abs(t.delta) for t in trials} == numbers
    with pytest.raises(ValueError, match=r"conv1.weight, dense.weight; expected conv1.weight, conv1.bias"):
        rso.train(network, small, 1, 16, sigma={"conv1.weight": 1, "dense.weight": 1})
    with pytest.raises(ValueError, match=r"sigma is {'conv1.weight': 0}"):
        rso.train(network, small, 1, 16, sigma={"conv1.weight": 0})


def test_steps_have_standard_deviation_sigma(rng):
    for step in ("gaussian", "uniform", "fixed"):
        drawn = draw_step(rng, step, 0.3, (100_000,))
        assert drawn.std() == pytest.approx(0.3, rel=0.01)
        assert drawn.mean() == pytest.approx(0, abs=0.005)
        assert np.ndim(draw_step(rng, step, 0.3, ())) == 0
    assert np.abs(draw_step(rng, "uniform", 0.3, (1000,))).max() < 0.3 * np.sqrt(3)
    assert set(np.abs(draw_step(rng, "fixed", 0.3, (1000,)))) == {0.3}


def test_steps_of_the_loop_are_drawn_from_sigma(small):
    _, trials = some_trials(small, n=None, sigma=0.25)
    deltas = np.array([t.delta for t in trials])
    assert deltas.std() == pytest.approx(0.25, rel=0.1)
    assert len(set(deltas)) == len(deltas)


def test_annealing():
    assert [annealing_factor(PRESETS["paper"].annealing, e, 5) for e in range(5)] == [1] * 5
    assert [annealing_factor(PRESETS["notebook"].annealing, e, 5) for e in range(5)] == [1] * 5
    authors = [annealing_factor(PRESETS["authors"].annealing, e, 5) for e in range(5)]
    np.testing.assert_allclose(authors, [1, 0.82, 0.64, 0.46, 0.28])
    text = [annealing_factor("to_tenth", e, 4) for e in range(4)]
    np.testing.assert_allclose(text, [1, 0.7, 0.4, 0.1])
    assert annealing_factor("to_tenth", 0, 1) == 1


def test_annealing_reaches_the_steps(small):
    network, trials = some_trials(small, n=None, rounds=4, annealing="to_tenth", step="fixed", sigma=0.5)
    steps = {r: {round(abs(float(t.delta)), 6) for t in trials if t.round == r} for r in (1, 2, 3, 4)}
    assert steps == {1: {0.5}, 2: {0.35}, 3: {0.2}, 4: {0.05}}


def test_weight_decay_comes_before_the_three_losses(small):
    assert [p.weight_decay for p in PRESETS.values()] == [0, 1e-4, 0, 0]
    network, trials = some_trials(small, n=200, weight_decay=0.01, batch_size=70)
    kept = [t for t in trials if t.choice == "keep"]
    assert kept
    for t in trials:
        w = np.float32(t.before) * np.float32(0.99)
        assert t.after == {"keep": w, "plus": w + t.delta, "minus": w - t.delta}[t.choice]


def test_weight_decay_of_gamma_and_beta(small):
    _, trials = some_trials(small, n=None, model="paper_mnist", preset="authors", trained=("gamma", "beta"))
    gamma = [t for t in trials if t.parameter == "gamma" and t.choice == "keep"]
    assert gamma
    assert all(t.after == np.float32(t.before) * np.float32(1 - 1e-4) for t in gamma)


def _indices(policy, data):
    # which training images the next batch holds, by their position in the set
    images, labels, _ = policy.draw()
    found = [int(np.flatnonzero((data.train_images == image).all(axis=(1, 2, 3)))[0]) for image in images]
    np.testing.assert_array_equal(labels, data.train_labels[found])
    return found


def test_batches_paper_are_fresh_samples(small, rng):
    policy = Fresh(small, 30, rng)
    first, second = _indices(policy, small), _indices(policy, small)
    assert len(set(first)) == len(set(second)) == 30
    assert set(first) != set(second)


def test_batches_authors_are_slices_of_a_shuffled_set(small, rng):
    weight, _, beta, gamma = build("original", (1, 8, 8)).parameters()[:4]
    policy = Slices(small, 20, rng)  # 70 images: three slices, ten images wait
    policy.begin(weight)
    first = [_indices(policy, small) for _ in range(4)]
    assert first[0] == first[3]
    assert len(set(sum(first[:3], []))) == 60
    policy.begin(beta)  # the same order from its start
    assert [_indices(policy, small) for _ in range(2)] == first[:2]
    policy.begin(weight)
    assert [_indices(policy, small) for _ in range(3)] != first[:3]


def test_batches_notebook_are_a_fixed_partition(small, rng):
    policy = Partition(small, 20, rng)
    drawn = [tuple(_indices(policy, small)) for _ in range(60)]
    parts = set(drawn)
    assert sorted(map(len, parts)) == [10, 20, 20, 20]
    assert sorted(sum(parts, ())) == list(range(70))
    assert any(a == b for a, b in zip(drawn, drawn[1:], strict=False))  # with replacement


@pytest.mark.parametrize("preset, n_parts", [("authors", 3), ("notebook", 4)])
def test_images_are_copied_only_when_their_mini_batch_is_new_in_a_layer(small, preset, n_parts, monkeypatch):
    """What DeltaForward remembers of a mini-batch is enough: no trial asks for the images again."""
    copied, as_array = [], LazyImages.__array__
    monkeypatch.setattr(LazyImages, "__array__", lambda self, dtype=None, copy=None:
                        (copied.append(self), as_array(self, dtype))[1])
    how = dict(model="two_conv", preset=preset, trained=("weight",), backend="cpu")
    _, trials = some_trials(small, n=None, **how)
    layers = ["dense1", "conv2", "conv1"]
    assert len(trials) > 1000 and sorted({t.layer for t in trials}) == sorted(layers)
    assert len(copied) == n_parts * len(layers)


def test_lazy_images_are_those_of_the_training_set(small):
    images = LazyImages(small.train_images, np.array([3, 1, 2]))
    np.testing.assert_array_equal(np.asarray(images), small.train_images[[3, 1, 2]])
    np.testing.assert_array_equal(images[1:], small.train_images[[1, 2]])
    assert len(images) == 3 and len(images[1:]) == 2
    assert np.asarray(images, np.float64).dtype == np.float64


def test_presets_use_their_batches(small, monkeypatch):
    for preset, policy in (("paper", Fresh), ("authors", Slices), ("notebook", Partition)):
        begun = []
        monkeypatch.setattr(policy, "begin", lambda self, p, begun=begun, begin=policy.begin:
                            (begun.append(str(p)), begin(self, p)))
        some_trials(small, n=None, preset=preset, model="one_conv")
        assert begun[0] == "dense1.weight"
        assert begun[-1] == ("conv1.weight" if preset == "authors" else "conv1.bias")


def test_order_paper_is_last_layer_first():
    order = visiting_order(build("original"), "last_first", PRESETS["paper"].trained)
    assert [str(p) for p in order][:6] == [
        "dense1.weight", "dense1.bias", "batchnorm6.gamma", "batchnorm6.beta", "conv6.weight", "conv6.bias"]
    assert weight_indices(order[0], "last_first")[:3] == [(0, 0), (0, 1), (0, 2)]
    first = weight_indices(order[4], "last_first")[:4]
    assert first == [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2), (0, 0, 1, 0)]


def test_order_authors_is_dense_then_weights_beta_gamma_of_each_convolution():
    settings = PRESETS["authors"]
    network = build("paper_mnist")
    order = [str(p) for p in visiting_order(network, settings.order, settings.trained)]
    assert order == ["dense1.weight"] + [
        name for i in (6, 5, 4, 3, 2, 1)
        for name in (f"conv{i}.weight", f"batchnorm{i}.beta", f"batchnorm{i}.gamma")]
    conv6 = network.parameters()[-4]
    indices = weight_indices(conv6, settings.order)
    assert str(conv6) == "conv6.weight"
    assert indices == sorted(indices)  # output channel, input channel, row, column


def test_order_authors_of_the_residual_network():
    settings = PRESETS["authors"]
    order = visiting_order(build("paper_cifar10", (3, 32, 32)), settings.order, settings.trained)

    def block(conv, norm):
        return [f"{conv}.weight", f"{norm}.beta", f"{norm}.gamma"]

    expected = ["dense1.weight"]
    for i in range(9, 0, -1):
        expected += block(f"conv{i}", f"batchnorm{i}")
        expected += block("shortcut_conv1", "shortcut_batchnorm1") if i == 5 else []
    assert [str(p) for p in order] == expected


def test_settings_of_the_authors_for_both_data_sets():
    """With 50,000 images and batch 5000: 10 slices, shuffled anew for each tensor of weights."""
    settings = PRESETS["authors"]
    assert (settings.scaling, settings.weight_decay, settings.epsilon) == ("center", 1e-4, 1e-3)
    assert annealing_factor(settings.annealing, 0, 500) == 1
    assert annealing_factor(settings.annealing, 499, 500) == pytest.approx(0.1 + 0.9 / 500)
    images = np.arange(50, dtype=np.float32).reshape(50, 1, 1, 1) / 50
    data = Dataset(images, np.zeros(50, int), images, np.zeros(50, int), 2)
    batches = POLICIES[settings.batches](data, 5, np.random.default_rng(0))
    keys, network = [], build("paper_cifar10", (3, 32, 32))
    for parameter in visiting_order(network, settings.order, settings.trained):
        batches.begin(parameter)
        keys.append(batches.draw()[2])
    n_shuffles = np.cumsum([name.name == "weight" for name in visiting_order(
        network, settings.order, settings.trained)])
    assert keys == [(n, 0, 5) for n in n_shuffles.tolist()] and keys[-1] == (11, 0, 5)
    starts = [batches.draw()[2][1] for _ in range(11)]  # it was at slice 1 of 10
    assert starts == [5 * (i % 10) for i in range(1, 12)]
    mean = build("paper_cifar10", (3, 32, 32), preset="authors")
    mean.fit_scaling(np.random.default_rng(0).random((9, 3, 32, 32), np.float32))
    assert np.unique(mean.layers[0].mean).size == 3 and (mean.layers[0].std == 1).all()  # one of a channel


def test_order_notebook_is_julias_memory():
    settings, network = PRESETS["notebook"], build("original")
    order = visiting_order(network, settings.order, settings.trained)
    assert [str(p) for p in order][:6] == [
        "dense1.weight", "dense1.bias", "batchnorm6.beta", "batchnorm6.gamma", "conv6.weight", "conv6.bias"]
    assert weight_indices(order[0], settings.order)[:2] == [(0, 0), (1, 0)]
    assert weight_indices(order[0], settings.order)[10] == (0, 1)
    assert weight_indices(order[4], settings.order)[:2] == [(0, 0, 0, 0), (0, 0, 0, 1)]  # Julia: kW is first


def test_order_first_last_is_the_networks():
    network = build("original")
    assert visiting_order(network, "first_last", PRESETS["paper"].trained) == network.parameters()


def visits_of(network, settings):
    return visits(network, settings, sigmas(network, settings.sigma, np.random.default_rng(0)))


def test_trained_parameters():
    for preset, n_trained in (("paper", 7890), ("notebook", 7890), ("authors", 7890 - 4 - 10)):
        settings = PRESETS[preset]
        parts = visits_of(build("one_conv", rng=0), settings)
        assert sum(len(indices) for _, indices, _ in parts) == n_trained
    settings = PRESETS["authors"]
    parts = visits_of(build("paper_mnist", rng=0), settings)
    assert sum(len(indices) for _, indices, _ in parts) == 12016


@pytest.mark.parametrize("choose", ["smallest", "vertex"])  # three equal losses have no vertex
def test_a_tie_keeps_the_weight(small, choose):
    network = build("one_conv", (1, 8, 8), rng=0)
    network.parameters()[2].value[:] = 0  # a dead dense layer: no convolution weight matters
    trials = list(rso.trials(network, small, rounds=1, batch_size=20, trained=("weight",), sigma=0.1,
                             order="first_last", choose=choose, rng=0, backend="numpy"))
    for trial in trials[:36]:
        assert trial.layer == "conv1"
        assert len(set(trial.losses)) == 1
        assert trial.choice == "keep"


@pytest.mark.parametrize("unit", ["weight", "filter"])
def test_the_vertex_of_the_parabola(small, unit):
    network = build("one_conv", (1, 8, 8), rng=0)
    trials = list(rso.trials(network, small, 1, 20, "notebook", choose="vertex", unit=unit, weight_decay=1e-3,
                             rng=0, backend="numpy"))
    n_vertices = 0
    for trial in trials:
        w = trial.before * np.float32(1 - 1e-3)
        keep, plus, minus = trial.losses
        if plus + minus - 2 * keep > 1e-6:  # else rounding decides
            step = naive.vertex(1, trial.losses)
            np.testing.assert_allclose(trial.after, w + step * trial.delta, rtol=1e-4, atol=1e-5)
            assert trial.choice == "vertex" and trial.accepted
            n_vertices += 1
        elif plus + minus - 2 * keep <= 0:
            assert trial.choice == rso.CHOICES[naive.choose(trial.losses)]
    assert n_vertices > (100 if unit == "weight" else 5)


def test_the_vertex_is_better_than_three_candidates(digits):
    """On the digits, with the same images: in the first round by far."""
    accuracies = []
    for choose in ("smallest", "vertex"):
        network = build("one_conv", digits.image_shape, rng=0)
        history = rso.train(network, digits, 1, 256, choose=choose, rng=0)
        accuracies.append(history.rounds[-1].test_accuracy)
    assert accuracies[1] > accuracies[0] + 0.05


def test_losses_use_the_statistics_of_the_mini_batch(small):
    network = build("paper_mnist", (1, 8, 8), rng=0)
    for leaf in network.leaves:
        if leaf.name.startswith("batchnorm"):
            leaf.running_mean += 1e6
    trial = next(rso.trials(network, small, rounds=1, batch_size=20, rng=0, backend="numpy"))
    assert max(trial.losses) < 1e3


def test_test_statistics_notebook_are_a_running_average(small, monkeypatch):
    network = build("original", (1, 8, 8), rng=0, preset="notebook")
    norm = network.layers[2]
    images = []
    draw = Partition.draw
    monkeypatch.setattr(Partition, "draw", lambda self: images.append(draw(self)) or images[-1])
    stream = rso.trials(network, small, rounds=1, batch_size=20, rng=0, preset="notebook", backend="numpy")
    expected = np.zeros(16)
    for _ in range(5):
        next(stream)
        conv = network.layers[1]  # not visited yet: its output depends on the batch only
        z = plain.conv2d_forward(images[-1][0], conv.weight, conv.bias)
        expected += 0.1 * (z.mean(axis=(0, 2, 3)) - expected)
    np.testing.assert_allclose(norm.running_mean, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("preset, calibrated", [("paper", True), ("authors", True), ("notebook", False)])
def test_test_statistics_authors_are_those_of_the_first_2000(digits, preset, calibrated, monkeypatch):
    seen = []
    monkeypatch.setattr(Network, "calibrate", lambda self, images, backend: seen.append(images))
    monkeypatch.setattr(rso, "CALIBRATION_IMAGES", 100)
    network = build("paper_mnist", (1, 8, 8), rng=0, preset=preset)
    data = digits.subset(120, 10, rng=0)
    rso.train(network, data, rounds=1, batch_size=10, rng=0, preset=preset, unit="layer", backend="numpy",
              search_statistics="batch", evaluation="full")
    assert len(seen) == (2 if calibrated else 0)
    assert all(len(images) == 100 for images in seen)


@pytest.mark.parametrize("unit, n_trials", [
    ("weight", 690), ("filter", 4 + 4 + 10 + 10), ("layer", 2), ("network", 1)])
def test_units(small, unit, n_trials):
    network, trials = some_trials(small, n=None, unit=unit, batch_size=70)
    assert len(trials) == n_trials
    assert sum(np.size(t.delta) for t in trials) == 690 == network.n_weights
    names = {"layer": ["dense1", "conv1"], "network": ["network"]}.get(unit)
    if names:
        assert [t.layer for t in trials] == names
        assert all(t.parameter == "weights" for t in trials)
        np.testing.assert_array_equal(network.weights[trials[-1].index], trials[-1].after)


def test_a_larger_unit_takes_each_weights_own_sigma():
    network = build("one_conv", rng=0)
    settings = resolve("authors", unit="network")
    [(parameter, [positions], sigma)] = visits_of(network, settings)
    own = sigmas(network, settings.sigma, None)
    assert parameter.value is network.weights
    assert sorted(positions) == [*range(36), *range(40, 7880)]  # no biases
    np.testing.assert_array_equal(sigma[positions < 36], own["conv1.weight"])
    np.testing.assert_array_equal(sigma[positions >= 40], own["dense1.weight"])


def test_hold_filter_keeps_the_batch_of_an_output_channel(small, monkeypatch):
    drawn, draw = [], Fresh.draw
    monkeypatch.setattr(Fresh, "draw", lambda self: drawn.append(1) or draw(self))
    network, trials = some_trials(small, n=None, hold="filter")
    assert len(trials) == 690
    assert len(drawn) == 10 + 10 + 4 + 4  # rows of dense weights, each bias, filters, each bias
    drawn.clear()
    some_trials(small, n=None, hold="filter", order="column_major")
    assert len(drawn) == 640 + 10 + 4 + 4  # the channel changes with every dense weight
    with pytest.raises(ValueError, match="hold is 'filter' and unit is 'layer'"):
        some_trials(small, hold="filter", unit="layer")


@pytest.mark.parametrize("preset, epsilon", [("paper", 1e-5), ("authors", 1e-3), ("notebook", 1e-5)])
def test_epsilon_of_batchnorm(preset, epsilon, tmp_path):
    network = build("paper_mnist", (1, 8, 8), rng=0, preset=preset)
    network.save(tmp_path / "network.npz")
    for one in (network, Network.load(tmp_path / "network.npz")):
        assert {leaf.epsilon for leaf in one.leaves if isinstance(leaf, BatchNorm)} == {epsilon}
    with pytest.raises(ValueError, match="epsilon is -1"):
        resolve("paper", epsilon=-1)


def narrow_paper_mnist():
    """Return the authors' network with two filters a layer, for images of 4x4."""
    network = Network([Standardize(), *narrow(models.paper_mnist(10), 8)], (1, 4, 4), 10)
    network.initialize("authors", np.random.default_rng(0))
    return network


@pytest.mark.parametrize("evaluation, backend", [("full", "numpy"), ("delta", "numpy"), ("delta", "cpu")])
def test_the_authors_search_uses_fixed_statistics(evaluation, backend, few):
    """In the last layer all of them; before another layer those that the last calibration has left."""
    network, calibrated = narrow_paper_mnist(), narrow_paper_mnist()
    network.weights += np.random.default_rng(0).normal(0, 0.01, network.n_weights).astype(np.float32)
    calibrated.set_state(network.state())
    calibrated.fit_scaling(few.train_images)
    calibrated.calibrate(few.train_images)
    stream = rso.trials(network, few, 1, 70, "authors", rng=0, evaluation=evaluation, backend=backend)
    weight, decay = calibrated.parameters()[-1].value, np.float32(1 - 1e-4)
    for trial in stream:  # with slices of 70, every mini-batch is the whole training set
        if trial.layer != "dense1":
            break
        weight[trial.index] = trial.before * decay
        loss, _ = calibrated.evaluate(few.train_images, few.train_labels)
        assert trial.losses[0] == pytest.approx(loss, rel=1e-5)
        weight[trial.index] = trial.after


@pytest.mark.parametrize("evaluation, backend", [("full", "numpy"), ("delta", "numpy"), ("delta", "cpu")])
def test_fixed_statistics_hold_before_the_searched_layer_only(evaluation, backend, few):
    losses = {}
    for statistics in ("fixed", "batch"):
        stream = rso.trials(narrow_paper_mnist(), few, 1, 20, "authors", rng=0, search_statistics=statistics,
                            order="first_last", trained=("weight",), evaluation=evaluation, backend=backend)
        losses[statistics] = [trial.losses for trial in islice(stream, 20)]
    assert losses["fixed"][:18] == losses["batch"][:18]  # nothing stands before conv1
    assert losses["fixed"][18:] != losses["batch"][18:]  # batchnorm1 stands before conv2


@pytest.mark.parametrize("unit, n_trials", [("filter", 3), ("layer", 3), ("network", 1)])
def test_fixed_statistics_with_larger_units(unit, n_trials, small):
    network = build("paper_mnist", (1, 8, 8), rng=0, preset="authors")
    stream = rso.trials(network, small, 1, 20, "authors", rng=0, unit=unit, evaluation="full")
    assert all(np.isfinite(trial.losses).all() for trial in islice(stream, n_trials))


def test_fixed_statistics_need_a_graph(small):
    network = Network([Conv2D(2), Flatten(), BatchNorm(), Dense(10)], (1, 8, 8), 10)
    with pytest.raises(ValueError, match="stands behind a Flatten.*use search_statistics='batch'"):
        rso.trials(network, small, 1, 20, "authors", rng=0, evaluation="full")
