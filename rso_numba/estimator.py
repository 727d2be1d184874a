"""CNNClassifier: the networks of this package, trained by RSO or by SGD, as a classifier of scikit-learn.

There is no training loop here: `fit` turns rows of numbers into images, and calls `rso.train` or `sgd.train`.
"""

import contextlib
import math

import numpy as np
from joblib import effective_n_jobs
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from . import models, presets, rso, sgd
from .arguments import checked_image_shape, generator, number_below, whole_number
from .datasets import Dataset
from .visits import sigmas

try:
    from sklearn.utils.validation import validate_data
except ImportError:  # scikit-learn before 1.6

    def validate_data(estimator, *arguments, **options):
        """Check and convert X and y as scikit-learn does, and note (or compare) the number of features."""
        return estimator._validate_data(*arguments, **options)


DEFAULTS = {"rso": {"max_iter": 10, "batch_size": 1024}, "sgd": {"max_iter": 50, "batch_size": 32}}
ENLARGED = 4  # rows, and at least columns, of what an image of one row becomes: models have up to two pools
MOST_REPEATS = 10  # mean of whole sample weights that are taken as repeats: more could fill the memory


class CNNClassifier(ClassifierMixin, BaseEstimator):
    """Classify images, given as rows of pixels, by a small convolutional network.

    Parameters
    ----------
    solver : {"rso", "sgd"}, default="rso"
        Train one weight at a time, without gradients (`rso.train`), or by stochastic gradient descent
        (`sgd.train`).
    model : {"one_conv", "two_conv", "original", "paper_mnist"}, default="one_conv"
        See `models`.
    image_shape : tuple of int, default=None
        (C, H, W) of the image that a row of X is. None: a square image, if the number of features is a
        square; else an image of one row, (1, 1, n_features).
    max_iter : int, default=None
        Rounds of RSO, or epochs of SGD. None: 10 rounds, or 50 epochs.
    batch_size : int, default=None
        Images of a mini-batch, at most the whole training set. None: 1024 for RSO, 32 for SGD.
    preset : str or Preset, default="paper"
        Input scaling, initial weights, and the settings of RSO: see `presets.Preset`.
    learning_rate, momentum : float, default=0.01 and 0.9
        Of SGD; RSO has none.
    early_stopping : bool, default=False
        Keep a part of the training set for validation, stop when the loss on it has not reached a new minimum
        for `n_iter_no_change` rounds, and end with the weights of the minimum. (Not in `partial_fit`.)
    validation_fraction : float, default=0.1
        Size of that part, with the same fraction of each class.
    n_iter_no_change : int, default=5
    warm_start : bool, default=False
        Let `fit` go on with the network and the random numbers of the last `fit`, instead of beginning anew.
    random_state : None, int, RandomState or Generator, default=None
        Draws initial weights, the validation part, mini-batches and steps. The same int gives the same
        network, to the last bit. None is NumPy's global RandomState, as everywhere in scikit-learn.
    verbose : bool, default=False
        Show a progress bar.
    n_jobs : int, default=None
        Threads of the `cpu` backend during `fit` and `predict`; -1 is all. None: as many as are set, see
        `numba.set_num_threads`. No result depends on it.
    backend : {"cpu", "numpy", "cuda", "auto"}, default="cpu"

    Attributes
    ----------
    classes_ : ndarray (n_classes,)
        The labels, sorted.
    network_ : Network
    image_shape_ : tuple of int
        (C, H, W) that rows of X are taken as.
    pixel_range_ : tuple of float
        Smallest and largest number of the first training set, which become 0 and 1.
    n_iter_ : int
        Rounds or epochs since the network was new.
    loss_curve_ : list of float
        Loss on the training set after each of them, in nats.
    history_ : History
        Of the last training. Its test columns are those of the validation part; without `early_stopping`, of
        the training set itself.
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        If X was a data frame.

    Notes
    -----
    Features may have any range; they are computed with as float32. An image of one row is enlarged by
    repeating its pixels, to four rows and at least four columns, because the models' pools need as many.

    A `sample_weight` of 2 means that the image is in the training set twice, 0 that it is not. Weights that
    are no whole numbers, or whole numbers of a mean above 10, are divided by their mean and rounded up or
    down at random, such that the expected number is right (systematic resampling). The network does not
    depend on the order of the training images.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from rso_numba import CNNClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> classifier = CNNClassifier(random_state=0).fit(X[:1500], y[:1500])
    >>> bool(classifier.score(X[1500:], y[1500:]) > 0.85)
    True
    """

    def __init__(self, solver="rso", model="one_conv", image_shape=None, *, max_iter=None, batch_size=None,
                 preset="paper", learning_rate=0.01, momentum=0.9, early_stopping=False,
                 validation_fraction=0.1, n_iter_no_change=5, warm_start=False, random_state=None,
                 verbose=False, n_jobs=None, backend="cpu"):
        self.solver = solver
        self.model = model
        self.image_shape = image_shape
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.preset = preset
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose
        self.n_jobs = n_jobs
        self.backend = backend

    def fit(self, X, y, sample_weight=None):
        """Train a new network; with `warm_start`, go on training the one that there is.

        Parameters
        ----------
        X : array_like (n_samples, n_features)
        y : array_like (n_samples,)
            Labels: numbers or text.
        sample_weight : array_like (n_samples,), default=None

        Returns
        -------
        CNNClassifier
            This object.

        Raises
        ------
        ValueError, TypeError
            If an argument is out of range, there is only one class, or the images are too small for the
            model.
        FloatingPointError
            If the loss becomes NaN or infinite.
        """
        goes_on = self.warm_start and hasattr(self, "network_")
        X, y, weights = self._checked(X, y, sample_weight, reset=not goes_on)
        if not goes_on:
            self._begin(X, np.unique(y))
        return self._train(X, y, weights, self._number("max_iter"), self.early_stopping)

    def partial_fit(self, X, y, classes=None, sample_weight=None):
        """Train for one more round of RSO or epoch of SGD, on these images.

        Parameters
        ----------
        X : array_like (n_samples, n_features)
        y : array_like (n_samples,)
        classes : array_like (n_classes,), default=None
            All labels that will ever come; needed in the first call.
        sample_weight : array_like (n_samples,), default=None

        Returns
        -------
        CNNClassifier
            This object.

        Raises
        ------
        ValueError, TypeError, FloatingPointError
            See `fit`; or if labels are new.
        """
        is_first = not hasattr(self, "network_")
        X, y, weights = self._checked(X, y, sample_weight, reset=is_first)
        if is_first and classes is None:
            raise ValueError("classes is None; the first call of partial_fit needs all labels that will come")
        if is_first:
            self._begin(X, np.unique(classes))
        elif classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            raise ValueError(f"classes is {classes!r}; it was {self.classes_.tolist()} in the first call")
        return self._train(X, y, weights, 1, early_stopping=False)

    def predict(self, X):
        """Return the most probable label of each row of X, an array (n_samples,)."""
        numbers = self._forward(X, "predict")
        return self.classes_[numbers]

    def predict_proba(self, X):
        """Return the probability of each class, an array (n_samples, n_classes), float64.

        The columns are in the order of `classes_`.
        """
        return softmax(self._forward(X, "forward").astype(np.float64), axis=1)

    def _forward(self, X, method):
        check_is_fitted(self)
        X = validate_data(self, X, dtype=(np.float64, np.float32), reset=False)
        with _threads(self.n_jobs):
            return getattr(self.network_, method)(self._images(X), self.backend)

    def _checked(self, X, y, sample_weight, reset):
        """Return X, y and the weights, without the samples of weight 0."""
        if self.solver not in DEFAULTS:
            raise ValueError(f"solver is {self.solver!r}; expected one of {', '.join(DEFAULTS)}")
        for name in ("max_iter", "batch_size"):
            self._number(name)  # before the network is built
        X, y = validate_data(self, X, y, dtype=(np.float64, np.float32), reset=reset)
        check_classification_targets(y)
        if sample_weight is None:
            return X, y, np.ones(len(X))
        weights = np.asarray(sample_weight, np.float64)
        if weights.shape != y.shape or not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError(f"sample_weight has shape {weights.shape}; expected {len(X)} numbers, none of "
                             "them negative, NaN or infinite")
        if not weights.any():
            raise ValueError("every sample_weight is zero; expected at least one larger")
        return X[weights > 0], y[weights > 0], weights[weights > 0]

    def _begin(self, X, classes):
        """Build a network for rows such as those of X."""
        if len(classes) < 2:
            raise ValueError(f"there is only one class, {classes.tolist()}; expected at least two classes")
        shape, rng = _image_shape(X.shape[1], self.image_shape), _generator(self.random_state)
        self.network_ = models.build(self.model, _enlarged(shape), len(classes), rng, self.preset)
        self.classes_, self.image_shape_, self._rng = classes, shape, rng
        self.pixel_range_ = float(X.min()), float(X.max())
        self.loss_curve_, self._sigma = [], None

    def _number(self, name):
        """Return a parameter that is a whole number, or what it is by default."""
        value = getattr(self, name)
        return DEFAULTS[self.solver][name] if value is None else whole_number(value, name)

    def _images(self, X):
        """Return rows of X as images for the network; the range of the first training set becomes 0..1."""
        low, high = self.pixel_range_
        images = ((X - low) / (high - low or 1)).astype(np.float32).reshape(-1, *self.image_shape_)
        for axis in (2, 3):
            images = images.repeat(self.network_.image_shape[axis - 1] // images.shape[axis], axis)
        return images

    def _train(self, X, y, weights, rounds, early_stopping):
        validation_fraction = number_below(self.validation_fraction, "validation_fraction", 1)
        data = _training_set(self._images(X), self._numbered(y), weights, len(self.classes_),
                             validation_fraction if early_stopping else 0, self._rng)
        stopping = _EarlyStopping(self.network_, self.n_iter_no_change) if early_stopping else None
        batch_size = min(self._number("batch_size"), len(data.train_images))
        options = {"backend": self.backend, "rng": self._rng, "progress": self.verbose, "on_round": stopping}
        with _threads(self.n_jobs):
            if self.solver == "rso":
                # measured once: a training that goes on has the steps that it began with
                rule = presets.resolve(self.preset).sigma
                self._sigma = self._sigma or sigmas(self.network_, rule, self._rng)
                self.history_ = rso.train(self.network_, data, rounds, batch_size, self.preset,
                                          sigma=self._sigma, **options)
            else:
                self.history_ = sgd.train(self.network_, data, rounds, batch_size, self.learning_rate,
                                          self.momentum, **options)
        if early_stopping:
            stopping.restore()
        self.loss_curve_ = self.loss_curve_ + self.history_["train_loss"][1:]  # row 0 is before the training
        self.n_iter_ = len(self.loss_curve_)
        return self

    def _numbered(self, y):
        """Return labels as numbers 0..n_classes-1."""
        new = np.setdiff1d(y, self.classes_)
        if len(new):
            raise ValueError(f"y has the labels {new.tolist()}; the classes are {self.classes_.tolist()}")
        return np.searchsorted(self.classes_, y)


class _EarlyStopping:
    """Ends a training if the loss on the validation part reached no new minimum for `patience` rounds."""

    def __init__(self, network, patience):
        self.network, self.patience = network, whole_number(patience, "n_iter_no_change")
        self.best_loss, self.best_round, self.best_state = math.inf, 0, None

    def __call__(self, row):
        if row.test_loss < self.best_loss:
            self.best_loss, self.best_round = row.test_loss, row.round
            self.best_state = self.network.copied_state()
        return row.round - self.best_round >= self.patience

    def restore(self):
        """Give the network the weights of the minimum."""
        self.network.set_state(self.best_state)


def _image_shape(n_features, given):
    """Return the shape (C, H, W) of the image that a row of X is: `given`, a square or one row."""
    if given is not None:
        shape = checked_image_shape(given)
        if math.prod(shape) != n_features:
            raise ValueError(f"image_shape is {given!r}, which has {math.prod(shape)} pixels; expected as "
                             f"many as X has features, {n_features}")
        return shape
    side = math.isqrt(n_features)
    return (1, side, side) if side * side == n_features else (1, 1, n_features)


def _enlarged(shape):
    """Return the shape of images for the network: of images of one row, the pixels are repeated."""
    channels, height, width = shape
    return shape if height > 1 else (channels, ENLARGED, width * -(-ENLARGED // width))


def _generator(random_state):
    """Return a Generator from what scikit-learn takes, or one that is given."""
    if isinstance(random_state, np.random.Generator):
        return random_state
    return generator(check_random_state(random_state).randint(2**31 - 1))


@contextlib.contextmanager
def _threads(n_jobs):
    """Let Numba use `n_jobs` threads inside, at most as many as there are; None changes nothing."""
    if n_jobs is None:
        yield
        return
    import numba  # here, for the numpy backend does without

    before = numba.get_num_threads()
    numba.set_num_threads(min(effective_n_jobs(n_jobs), numba.config.NUMBA_NUM_THREADS))
    try:
        yield
    finally:
        numba.set_num_threads(before)


def _training_set(images, labels, weights, n_classes, validation_fraction, rng):
    """Return a Dataset that has each image as often as its weight says; the validation part is its test set.

    Equal images are counted first, so that weights are the same as repeats, and no image is in both parts.
    Without a validation part, the training set is the test set, too.
    """
    if (weights != np.floor(weights)).any() or weights.mean() > MOST_REPEATS:
        weights = weights / weights.mean()  # then as many images as there are weights
    # an image and its label are one text of bytes, which NumPy can sort
    rows = np.column_stack([images.reshape(len(images), -1), labels.astype(np.float32)])
    _, first, inverse = np.unique(rows.view(f"V{rows[0].nbytes}").ravel(), return_index=True,
                                  return_inverse=True)
    counts = _rounded(np.bincount(inverse, weights), rng)
    train, held_out = np.flatnonzero(counts), None
    if validation_fraction:
        train, held_out = train_test_split(
            train, test_size=validation_fraction, stratify=labels[first[train]],
            random_state=int(rng.integers(2**31)))
    # shuffled, because BatchNorm takes its statistics from the first images
    chosen = first[rng.permutation(train.repeat(counts[train]))]
    train_images, train_labels = images[chosen], labels[chosen]
    test_images, test_labels = train_images, train_labels
    if validation_fraction:
        chosen = first[held_out.repeat(counts[held_out])]
        test_images, test_labels = images[chosen], labels[chosen]
    # the next images of partial_fit may go beyond 0..1, and a small validation part be darker than the rest
    return Dataset(train_images, train_labels, test_images, test_labels, n_classes, any_range=True)


def _rounded(weights, rng):
    """Round each weight up or down at random, so that the mean is the weight (systematic resampling)."""
    sums = np.floor(np.cumsum(weights) + rng.random())
    return np.diff(sums, prepend=0).astype(np.int64)
