"""Numbers that callers give: NumPy's are as good as Python's, anything else is refused by name."""

from functools import partial

import numpy as np
import pytest

from rso_numba import bench, experiments, rso, sgd
from rso_numba.layers import BatchNorm, Conv2D, Dense, Flatten
from rso_numba.models import Network, build

NO_NUMBERS = ["3", None, True, np.True_, 1j, [0.5], np.array([2, 3])]


def small_build(**arguments):
    return build("one_conv", **({"image_shape": (1, 8, 8)} | arguments))


def search(data, **arguments):
    arguments = {"rounds": 1, "batch_size": 8, "backend": "numpy"} | arguments
    return rso.trials(small_build(rng=0), data, **arguments)


def descend(data, **arguments):
    arguments = {"epochs": 1, "batch_size": 35, "backend": "numpy", "rng": 0} | arguments
    return sgd.train(small_build(rng=0), data, **arguments)


# what takes a whole number, and the smallest that it takes: a function of the data and of the argument
WHOLE = {
    "n_classes": (1, lambda data, n: small_build(n_classes=n)),
    r"image_shape\[1\]": (2, lambda data, n: small_build(image_shape=(1, n, 8))),
    "filters": (1, lambda data, n: Conv2D(n)),
    "size": (1, lambda data, n: Conv2D(2, n)),
    "units": (1, lambda data, n: Dense(n)),
    "rounds": (1, lambda data, n: search(data, rounds=n)),
    "batch_size": (1, lambda data, n: search(data, batch_size=n)),
    "epochs": (1, lambda data, n: descend(data, epochs=n)),
    "seed": (0, lambda data, n: bench.Job("one_conv", data, 8, "paper", n)),
    "rng": (0, lambda data, n: small_build(rng=n)),
}
# what takes a number, 0 included, and up to which it may go: what is there is too large
REAL = {
    "learning_rate": (np.inf, lambda data, x: descend(data, learning_rate=x)),
    "momentum": (1, lambda data, x: descend(data, momentum=x)),
    "weight_decay": (1, lambda data, x: search(data, weight_decay=x)),
    "validation_fraction": (1, lambda data, x: descend(data, validation_fraction=x)),
    "epsilon": (np.inf, lambda data, x: BatchNorm(x)),
    "sigma": (np.inf, lambda data, x: search(data, sigma=x)),
    "growth": (np.inf, lambda data, x: search(data, growth=x)),
    "gate": (np.inf, lambda data, x: search(data, gate=x, batch_size=20)),
    "fraction": (1.5, lambda data, x: search(data, fraction=x)),
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [*NO_NUMBERS, 3.7, np.float32(2), np.nan, -1], ids=repr)
def test_what_is_no_whole_number_is_refused_by_name(small, name, value):
    smallest, function = WHOLE[name]
    if name == "rng" and (value is None or np.ndim(value)):
        pytest.skip("draws the seed, or is one")
    with pytest.raises((TypeError, ValueError), match=rf"{name} is .*; expected"):
        function(small, value)
    with pytest.raises(ValueError, match=rf"{name} is {smallest - 1}; expected|gets maps of 1x8"):
        function(small, smallest - 1)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("kind", [int, np.int64, np.uint8])
def test_whole_numbers_of_numpy_are_whole_numbers(small, name, kind):
    smallest, function = WHOLE[name]
    function(small, kind(smallest))


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("value", [*NO_NUMBERS, np.array(0.5), np.nan, -0.5], ids=repr)
def test_what_is_no_number_is_refused_by_name(small, name, value):
    high, function = REAL[name]
    for bad in (value, high):
        with pytest.raises((TypeError, ValueError), match=rf"{name} is .*; expected"):
            function(small, bad)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("value", [0.5, np.float64(0.5), np.float32(0.5), np.float16(0.5)], ids=repr)
def test_numbers_of_numpy_are_numbers(small, name, value):
    REAL[name][1](small, value)


def test_numbers_of_numpy_can_be_saved(tmp_path):
    layers = [Conv2D(np.int64(2), np.int32(1)), BatchNorm(np.float32(0.5)), Flatten(), Dense(np.uint8(3))]
    Network(layers, np.array([1, 4, 4]), np.int16(3)).save(tmp_path / "network.npz")
    assert Network.load(tmp_path / "network.npz").layers[1].epsilon == 0.5


@pytest.mark.parametrize("shape", [28, None, "128", (28, 28), (1, 8.5, 8.5), ("1", 8, 8), (1, 8, True)])
def test_image_shape_is_three_whole_numbers(shape):
    with pytest.raises((TypeError, ValueError), match=r"image_shape(\[\d\])? is .*; expected .*positive"):
        build("one_conv", shape)


@pytest.mark.parametrize("rng", ["3", 0.5, -1, True, np.random.RandomState(0), [-1], np.array(2)], ids=repr)
def test_random_numbers_come_from_a_seed_or_a_generator(small, rng):
    for function in (small_build, partial(search, small), partial(descend, small), partial(small.subset, 5),
                     partial(small_build().initialize, "he")):
        with pytest.raises((TypeError, ValueError), match=r"rng is .*numpy\.random\.default_rng\(0\)"):
            function(rng=rng)


@pytest.mark.parametrize("rng", [np.int64(5), [5], np.random.SeedSequence(5), np.random.default_rng(5)],
                         ids=repr)
def test_seeds_that_numpy_takes_are_the_same_seed(rng):
    np.testing.assert_array_equal(small_build(rng=rng).weights, small_build(rng=5).weights)


@pytest.mark.parametrize("arguments, message", [
    ({"sgd_batch_size": 0}, "sgd_batch_size is 0; expected"),
    ({"sgd_batch_size": 71}, "sgd_batch_size is 71, larger than the training set"),
    ({"sgd_epochs": 1.5}, "epochs is 1.5; expected"),
    ({"seed": "3"}, "seed is '3'; expected"),
])
def test_compare_refuses_before_it_begins(small, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr(experiments, "example_trial", lambda *_: pytest.fail("began"))
    with pytest.raises((TypeError, ValueError), match=message):
        experiments.compare(small, batch_size=8, out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
