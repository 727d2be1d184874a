"""CNNClassifier: scikit-learn's own checks, and what they do not look at."""

import os
import pickle
import subprocess
import sys

import joblib
import numba
import numpy as np
import pytest
from matplotlib.figure import Figure
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.metrics import ConfusionMatrixDisplay
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from rso_numba import CNNClassifier, estimator
from rso_numba.presets import Preset

SOLVERS = pytest.mark.parametrize("solver", ["rso", "sgd"])


@parametrize_with_checks([CNNClassifier("rso", max_iter=3), CNNClassifier("sgd")])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def rows():
    """400 of scikit-learn's digits: rows of 64 pixels, 0..16, and their labels."""
    X, y = load_digits(return_X_y=True)
    return X[:400], y[:400]


def quick(solver="sgd", **parameters):
    return CNNClassifier(solver, **{"max_iter": 1 if solver == "rso" else 10, "random_state": 0} | parameters)


def weights(classifier):
    return classifier.network_.weights


@SOLVERS
def test_digits_are_learned_with_the_defaults(solver, digits):
    classifier = CNNClassifier(solver, random_state=0)
    classifier.fit(16 * digits.train_images.reshape(-1, 64), digits.train_labels)
    assert classifier.score(16 * digits.test_images.reshape(-1, 64), digits.test_labels) > 0.93
    assert classifier.image_shape_ == (1, 8, 8) and classifier.n_iter_ == {"rso": 10, "sgd": 50}[solver]
    assert len(classifier.loss_curve_) == classifier.n_iter_ == len(classifier.history_.rounds) - 1
    assert classifier.loss_curve_[-1] < 0.2 * classifier.loss_curve_[0]


def test_rows_become_images(rows):
    X, y = rows
    assert quick().fit(X[:, :63], y).image_shape_ == (1, 1, 63)
    assert quick(image_shape=(1, 7, 9)).fit(X[:, :63], y).network_.image_shape == (1, 7, 9)
    with pytest.raises(ValueError, match=r"image_shape is \(1, 8, 9\), which has 72 pixels; .* features, 64"):
        quick(image_shape=(1, 8, 9)).fit(X, y)
    classifier = quick().fit(X[:, :3], y)
    assert classifier.network_.image_shape == (1, 4, 6)  # each pixel 4 x 2 times
    expected = np.float32(X[0, :3] / X[:, :3].max()).repeat(2)
    np.testing.assert_array_equal(classifier._images(X[:1, :3])[0, 0], [expected] * 4)


def test_a_model_too_deep_for_the_images_says_so(rows):
    X, y = rows
    with pytest.raises(ValueError, match="maxpool2 gets maps of 1x1 pixels; .* too small for this model"):
        quick(model="two_conv").fit(X[:, :9], y)  # 3x3


@SOLVERS
def test_the_range_of_the_features_does_not_matter(solver, rows, recwarn):
    X, y = rows
    X = X / 16
    small, large = (quick(solver).fit(scale * X - shift, y) for scale, shift in ((1, 0), (2.0**20, 2.0**21)))
    np.testing.assert_array_equal(weights(small), weights(large))
    assert not recwarn


def test_images_that_come_later_may_go_beyond_the_range_of_the_first(rows, recwarn):
    X, y = rows
    classifier = quick().partial_fit(X / 16, y, classes=range(10)).partial_fit(X, y)
    assert classifier.pixel_range_ == (0, 1) and not recwarn


@SOLVERS
@pytest.mark.parametrize("early_stopping", [False, True])
def test_weights_are_repeats_in_any_order(solver, early_stopping, rows, rng):
    X, y = rows
    repeats = rng.integers(0, 4, len(X))
    shuffled = rng.permutation(len(X))
    weighted = quick(solver, early_stopping=early_stopping).fit(X[shuffled], y[shuffled], repeats[shuffled])
    repeated = quick(solver, early_stopping=early_stopping).fit(X.repeat(repeats, axis=0), y.repeat(repeats))
    np.testing.assert_array_equal(weights(weighted), weights(repeated))
    assert len(weighted.classes_) == 10


def test_fractions_of_weights_are_rounded_at_random_to_the_right_mean(rng):
    fractions = rng.uniform(0, 3, 50)
    counts = [estimator._rounded(fractions, rng) for _ in range(4000)]
    assert np.abs(counts - fractions).max() < 1
    np.testing.assert_allclose(np.mean(counts, axis=0), fractions, atol=0.04)  # 5 standard errors


def test_weights_of_any_size_leave_the_training_set_its_size(rows):
    X, y = rows
    for weight in (0.01, 1e9):
        assert quick(max_iter=1).fit(X, y, np.full(len(X), weight)).history_["images_forwarded"] == [0, 400]


def test_labels_may_be_text_and_predictions_are_the_most_probable(rows):
    X, y = rows
    names = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])[y]
    classifier = quick().fit(X, names)
    assert classifier.classes_.tolist() == sorted(set(names))
    probabilities = classifier.predict_proba(X)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    np.testing.assert_array_equal(classifier.classes_[probabilities.argmax(axis=1)], classifier.predict(X))
    assert classifier.score(X, names) > 0.9


@SOLVERS
def test_a_rare_class_is_learned_though_most_batches_miss_it(solver, rows):
    X, y = rows
    chosen = np.concatenate([np.flatnonzero(y == 0)[:38], np.flatnonzero(y == 1)[:2]])  # 95 : 5
    classifier = quick(solver, batch_size=8, max_iter=10).fit(X[chosen], y[chosen])
    assert classifier.score(X[chosen], y[chosen]) == 1


def test_one_class_is_an_error_that_names_it(rows):
    X, y = rows
    with pytest.raises(ValueError, match=r"only one class, \[7\]"):
        quick().fit(X, np.full(len(X), 7))


@SOLVERS
def test_warm_start_goes_on(solver, rows):
    X, y = rows
    classifier = quick(solver, warm_start=True).fit(X, y)
    network, first = classifier.network_, list(classifier.loss_curve_)
    classifier.fit(X, y)
    assert classifier.network_ is network and classifier.n_iter_ == 2 * len(first)
    assert classifier.loss_curve_[: len(first)] == first and classifier.loss_curve_[-1] < first[-1]
    assert classifier.history_["train_loss"][0] == first[-1]
    cold = quick(solver).fit(X, y).fit(X, y)
    assert cold.loss_curve_ == first


@SOLVERS
def test_partial_fit_is_a_round(solver, rows):
    X, y = rows
    classifier = quick(solver)
    with pytest.raises(ValueError, match="classes is None"):
        classifier.partial_fit(X, y)
    classifier.partial_fit(X[:100], y[:100] % 2, classes=[0, 1, 2])  # 2 comes later
    assert classifier.n_iter_ == 1 and classifier.predict_proba(X).shape == (400, 3)
    classifier.partial_fit(X[100:], y[100:] % 3)
    assert classifier.n_iter_ == len(classifier.loss_curve_) == 2
    with pytest.raises(ValueError, match=r"labels \[3, 4, 5, 6, 7, 8, 9\]; the classes are \[0, 1, 2\]"):
        classifier.partial_fit(X, y)
    with pytest.raises(ValueError, match="in the first call"):
        classifier.partial_fit(X, y % 2, classes=[0, 1])


def test_steps_of_rso_do_not_grow_with_the_weights_from_call_to_call(rows):
    X, y = rows
    one, many = (quick("rso", max_iter=4, preset="notebook").fit(X, y), quick("rso", preset="notebook"))
    assert not np.array_equal(weights(one), weights(many.partial_fit(X, y, classes=range(10))))
    sigma = dict(many._sigma)
    many.partial_fit(X, y)
    assert many._sigma == sigma == one._sigma


@SOLVERS
def test_early_stopping_ends_with_the_weights_of_the_smallest_validation_loss(solver, rows):
    X, y = rows
    restless = {"learning_rate": 0.2, "batch_size": 10, "early_stopping": True}
    classifier = quick(solver, max_iter=12, n_iter_no_change=2, **restless).fit(X[:100], y[:100])
    losses = classifier.history_["test_loss"][1:]
    best = int(np.argmin(losses))
    assert classifier.n_iter_ == len(losses) == best + 3 < 12
    shorter = quick(solver, max_iter=best + 1, n_iter_no_change=12, **restless).fit(X[:100], y[:100])
    np.testing.assert_array_equal(weights(classifier), weights(shorter))


@pytest.mark.parametrize("parameters, error, message", [
    ({"solver": "adam"}, ValueError, "solver is 'adam'; expected one of rso, sgd"),
    ({"max_iter": 0}, ValueError, "max_iter is 0"),
    ({"batch_size": 2.5}, TypeError, "batch_size is 2.5"),
    ({"model": "three_conv"}, ValueError, "unknown model 'three_conv'"),
    ({"early_stopping": True, "validation_fraction": 1.5}, ValueError, "validation_fraction is 1.5"),
    ({"early_stopping": True, "n_iter_no_change": 0}, ValueError, "n_iter_no_change is 0"),
    ({"n_jobs": 0}, ValueError, "n_jobs"),
    ({"random_state": "zero"}, ValueError, "'zero' cannot be used to seed"),
])
def test_what_is_wrong_is_named(rows, parameters, error, message):
    with pytest.raises(error, match=message):
        CNNClassifier(**{"solver": "sgd"} | parameters).fit(*rows)


def test_sgd_that_diverges_says_where(rows):
    with pytest.raises(FloatingPointError, match="SGD, epoch"):
        quick(learning_rate=1e30).fit(*rows)


@pytest.mark.parametrize("random_state", [0, np.random.RandomState, np.random.default_rng],
                         ids=["int", "RandomState", "Generator"])
def test_random_states(random_state, rows):
    def fitted(seed):
        state = random_state(seed) if callable(random_state) else seed
        return weights(quick(random_state=state, max_iter=1).fit(*rows))

    np.testing.assert_array_equal(fitted(0), fitted(0))
    assert not np.array_equal(fitted(0), fitted(1))


def test_no_random_state_is_numpys_global_one(rows):
    def fitted(seed):
        np.random.seed(seed)  # noqa: NPY002
        return weights(quick(random_state=None, max_iter=1).fit(*rows))

    np.testing.assert_array_equal(fitted(5), fitted(5))
    assert not np.array_equal(fitted(5), fitted(6))


def test_n_jobs_is_scoped_and_changes_no_result(rows, monkeypatch):
    X, y = rows
    before, used = numba.get_num_threads(), []
    train = estimator.sgd.train
    monkeypatch.setattr(estimator.sgd, "train", lambda *a, **k: (used.append(numba.get_num_threads()),
                                                                 train(*a, **k))[1])
    one, all_ = (quick(n_jobs=n_jobs).fit(X, y) for n_jobs in (1, -1))
    assert used == [1, numba.config.NUMBA_NUM_THREADS] and numba.get_num_threads() == before
    np.testing.assert_array_equal(one.predict_proba(X), all_.predict_proba(X))
    with pytest.raises(FloatingPointError):
        quick(n_jobs=1, learning_rate=1e30).fit(X, y)
    assert numba.get_num_threads() == before


def test_backends_agree(rows):
    X, y = rows
    one, other = (quick(backend=backend).fit(X, y).predict_proba(X) for backend in ("cpu", "numpy"))
    np.testing.assert_allclose(one, other, atol=1e-3)


def test_cross_validation_and_pipeline(rows):
    pipeline = make_pipeline(MinMaxScaler(), quick())
    assert cross_val_score(pipeline, *rows, cv=3).min() > 0.8


# a process of its own: the threads of this one have begun, and their number is fixed
GRID_SEARCH = """
import numba
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from rso_numba import CNNClassifier

class Counting(CNNClassifier):
    def score(self, X, y):
        return numba.config.NUMBA_NUM_THREADS

X, y = load_digits(n_class=3, return_X_y=True)
CNNClassifier("sgd", max_iter=1).fit(X, y)
search = GridSearchCV(Counting(max_iter=1, random_state=0), {"solver": ["rso", "sgd"]}, cv=2, n_jobs=2)
print(*search.fit(X, y).cv_results_["mean_test_score"])
"""


def test_a_grid_search_shares_the_cores_among_its_processes():
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_NUM_THREADS"}
    shown = subprocess.run([sys.executable, "-c", GRID_SEARCH], env=environment, capture_output=True,
                           text=True, check=True, timeout=300)
    assert shown.stdout.split() == [f"{max(1, joblib.cpu_count() // 2):.1f}"] * 2


def test_clone_and_pickle(rows):
    X, y = rows
    classifier = quick(image_shape=(1, 8, 8), preset=Preset(sigma=0.1)).fit(X, y)
    assert clone(classifier).get_params() == classifier.get_params()
    copy = pickle.loads(pickle.dumps(classifier))
    np.testing.assert_array_equal(copy.predict_proba(X), classifier.predict_proba(X))
    for one in (copy, classifier):  # the stream of random numbers goes on, too
        one.partial_fit(X, y)
    np.testing.assert_array_equal(weights(copy), weights(classifier))


def test_confusion_matrix_display(rows):
    display = ConfusionMatrixDisplay.from_estimator(quick().fit(*rows), *rows, ax=Figure().subplots())
    assert display.confusion_matrix.trace() > 360


def test_scikit_learn_is_imported_when_the_class_is_asked_for():
    code = ("import sys, rso_numba; before = 'sklearn' in sys.modules; rso_numba.CNNClassifier; "
            "print(before, 'sklearn' in sys.modules)")
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "True"]
