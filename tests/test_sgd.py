"""Backpropagation against differences, and stochastic gradient descent."""

import naive
import networks
import numpy as np
import pytest

from rso_numba import models, sgd
from rso_numba.models import Network, build


@pytest.mark.parametrize("name", models.MODELS)
def test_gradients_equal_central_differences_of_nested_loops(name, rng):
    """Every layer kind of every model, with fewer filters, in float64."""
    network = networks.small_network(name, rng, np.float64)
    images, labels = rng.random((3, *networks.IMAGE_SHAPE), np.float32), np.array([0, 1, 2])
    found = sgd.gradients(network, images, labels, backend="numpy")

    def loss(_):
        return naive.mean_loss(networks.naive_logits(network, images, batch_statistics=True), labels)

    for parameter, gradient in zip(network.parameters(), found, strict=True):
        assert gradient.shape == parameter.value.shape
        indices = list(np.ndindex(parameter.value.shape))
        index = indices[rng.integers(len(indices))]
        expected = naive.central_difference(loss, parameter.value, index, step=1e-6)
        assert gradient[index] == pytest.approx(expected, rel=1e-4, abs=1e-8), str(parameter)


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("n", [3, 17])
def test_backends_have_the_same_gradients(name, n, small):
    network = build(name, (1, 8, 8), rng=3)
    network.fit_scaling(small.train_images)
    images, labels = small.train_images[:n], small.train_labels[:n]
    cpu, numpy = (sgd.gradients(network, images, labels, backend) for backend in ("cpu", "numpy"))
    layers = [parameter.layer for parameter in network.parameters()]
    # rounding is measured by the layer's largest gradient: before a BatchNorm that of a bias is 0
    largest = {layer: max(np.abs(b).max() for own, b in zip(layers, numpy, strict=True) if own == layer)
               for layer in layers}
    for parameter, a, b in zip(network.parameters(), cpu, numpy, strict=True):
        atol = 1e-4 * largest[parameter.layer]
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=atol, err_msg=str(parameter))


def test_plain_step_is_gradient_descent(backend, small):
    network, judge = build("one_conv", (1, 8, 8), rng=0), build("one_conv", (1, 8, 8), rng=0)
    judge.fit_scaling(small.train_images)
    gradient = sgd.gradients(judge, small.train_images, small.train_labels, backend)
    history = sgd.train(network, small, epochs=1, batch_size=70, learning_rate=0.1, rng=0, backend=backend)
    expected = judge.weights - np.float32(0.1) * np.concatenate([g.ravel() for g in gradient])
    np.testing.assert_allclose(network.weights, expected, rtol=1e-4, atol=1e-6)
    assert history.rounds[-1].images_forwarded == 70
    assert history.rounds[-1].weights_visited == network.n_weights


def test_momentum_and_weight_decay(small):
    arguments = {"batch_size": 70, "learning_rate": 0.1, "rng": 0, "backend": "numpy"}
    network, judge = build("one_conv", (1, 8, 8), rng=0), build("one_conv", (1, 8, 8), rng=0)
    judge.fit_scaling(small.train_images)
    sgd.train(network, small, epochs=3, momentum=0.9, weight_decay=0.01, **arguments)
    velocity = 0
    for _ in range(3):
        gradient = sgd.gradients(judge, small.train_images, small.train_labels, "numpy")
        velocity = 0.9 * velocity + np.concatenate([g.ravel() for g in gradient]) + 0.01 * judge.weights
        judge.weights -= (0.1 * velocity).astype(np.float32)
    np.testing.assert_allclose(network.weights, judge.weights, rtol=1e-3, atol=1e-5)


def test_every_image_is_used_once_an_epoch(small, monkeypatch):
    seen, gradients = [], sgd._gradients

    def recording(network, images, *arguments):
        seen.append(images)
        return gradients(network, images, *arguments)

    monkeypatch.setattr(sgd, "_gradients", recording)
    sgd.train(build("one_conv", (1, 8, 8), rng=0), small, epochs=1, batch_size=32, rng=0, backend="numpy")
    assert [len(images) for images in seen] == [32, 32, 6]
    used = np.sort(np.concatenate(seen).reshape(70, -1), axis=0)
    np.testing.assert_array_equal(used, np.sort(small.train_images.reshape(70, -1), axis=0))


def test_training_learns_and_repeats(backend, digits):
    results = []
    for _ in range(2):
        network = build("one_conv", (1, 8, 8), rng=0)
        history = sgd.train(network, digits, epochs=3, learning_rate=0.1, rng=0, backend=backend)
        results.append(network.weights.tobytes())
    assert history.rounds[-1].test_accuracy > 0.85
    assert results[0] == results[1]


@pytest.mark.parametrize("name", ["original", "paper_mnist"])
def test_batchnorm_networks_learn(small, name):
    network = build(name, (1, 8, 8), rng=0)
    history = sgd.train(network, small, epochs=15, batch_size=10, learning_rate=0.1, momentum=0.9, rng=0)
    assert history.rounds[-1].train_accuracy > 0.5
    assert network.layers[2].running_variance.min() != 1


def test_validation_keeps_a_copy_of_the_best_weights(small, monkeypatch):
    network = build("one_conv", (1, 8, 8), rng=0)
    losses, states = iter([3.0, 1.0, 2.0, 4.0]), []
    evaluate = Network.evaluate

    def scripted(self, images, labels, backend):
        if len(images) == 14:  # the validation split: a fifth of 70
            states.append(self.weights.copy())
            return next(losses), 0.0
        return evaluate(self, images, labels, backend)

    monkeypatch.setattr(Network, "evaluate", scripted)
    history = sgd.train(network, small, 4, validation_fraction=0.2, learning_rate=0.1, rng=0, backend="numpy")
    np.testing.assert_array_equal(network.weights, states[1])
    assert (states[1] != states[3]).any()
    assert history.rounds[-1].images_forwarded == 4 * 56


@pytest.mark.parametrize("arguments, message", [
    ({"epochs": 0}, "epochs is 0"),
    ({"batch_size": 71}, "batch_size is 71, larger than the training set of 70"),
    ({"batch_size": 60, "validation_fraction": 0.5}, "batch_size is 60; 35 images are left"),
    ({"learning_rate": -0.1}, "learning_rate is -0.1"),
    ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ({"momentum": 1.0}, "momentum is 1.0; expected 0 <= momentum < 1"),
    ({"weight_decay": -1}, "weight_decay is -1"),
    ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
    ({"backend": "gpu"}, "unknown backend 'gpu'"),
])
def test_bad_arguments(small, arguments, message):
    with pytest.raises(ValueError, match=message):
        sgd.train(build("one_conv", (1, 8, 8)), small, **arguments)


def test_bad_batches(small):
    network = build("one_conv", (1, 8, 8))
    with pytest.raises(ValueError, match="value 11 at 0"):
        sgd.gradients(network, small.train_images[:1], [11])
    with pytest.raises(ValueError, match="shape"):
        sgd.gradients(network, small.train_images[:2], [1])


@pytest.mark.parametrize("name", ["one_conv", "original"])
@pytest.mark.parametrize("validation_fraction", [0.0, 0.2])
def test_a_loss_that_is_not_finite_ends_the_training(name, validation_fraction, small, backend, monkeypatch):
    network, states, gradients = build(name, (1, 8, 8), rng=0), [], sgd._gradients

    def recording(network, *arguments):
        states.append({name: array.copy() for name, array in network.state().items()})
        return gradients(network, *arguments)

    monkeypatch.setattr(sgd, "_gradients", recording)
    message = r"SGD, epoch \d, step \d of [67]: the loss is not finite; .*Try a smaller learning_rate"
    with pytest.raises(FloatingPointError, match=message):
        sgd.train(network, small, 9, 10, 1e5, 0.9, validation_fraction=validation_fraction, rng=0,
                  backend=backend)
    assert len(states) > 2
    for array_name, array in network.state().items():  # of the step before, whose loss was finite
        np.testing.assert_array_equal(array, states[-2][array_name])
        assert np.isfinite(array).all()


def test_a_loss_that_is_not_finite_after_an_epoch_ends_it_too(small):
    network = build("one_conv", (1, 8, 8), rng=0)
    before = network.weights.copy()
    with pytest.raises(FloatingPointError, match=r"SGD, epoch 1, step 1 of 1: 70 of 70 images have a loss"):
        sgd.train(network, small, 2, 70, 1e36, rng=0, backend="numpy")
    np.testing.assert_array_equal(network.weights, before)


def test_weights_that_are_not_finite_are_not_trained(small):
    network = build("one_conv", (1, 8, 8), rng=0)
    network.weights[1] = np.nan
    with pytest.raises(FloatingPointError, match=r"conv1.weight holds 1 NaN .* at index \(0, 0, 0, 1\)"):
        sgd.train(network, small)


def test_a_callback_that_returns_true_ends_the_training(small):
    network, told = build("one_conv", (1, 8, 8), rng=0), []
    history = sgd.train(network, small, 5, 20, rng=0, backend="numpy",
                        on_round=lambda row: told.append(row) or row.round == 2)
    assert told == history.rounds[1:] and len(history.rounds) == 3
