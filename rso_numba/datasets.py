"""Images and labels to learn from: scikit-learn's digits (bundled), MNIST and CIFAR-10 (files or download).

Every loader returns a `Dataset`, whose arrays have been checked. The files of MNIST are
read in `mnist.py`, those of CIFAR-10 in `cifar10.py`.
"""

import copy
import math
import warnings
import zlib
from dataclasses import InitVar, dataclass

import numpy as np

from . import cifar10, mnist
from .arguments import generator, is_number, is_whole, whole_number
from .mnist import read_idx  # noqa: F401 (for data sets of one's own in that format)


def check_images(images, image_shape=None, name="images"):
    """Return `images` as a C-contiguous float32 array (N, C, H, W), or say what is wrong with them.

    Parameters
    ----------
    images : array_like, shape (N, C, H, W), floating point
        Expected, but not forced, to lie in [0, 1]. Not copied if it has the right form already.
    image_shape : tuple (C, H, W), optional
        The shape that each image must have.
    name : str
        What the error messages call them.
    """
    images = np.asarray(images)
    if images.ndim != 4:
        raise ValueError(f"{name} has {images.ndim} dimensions (shape {images.shape}), expected 4: (N, C, H, "
                         f"W); {_how_to_get_four_dimensions(images.shape, image_shape)}")
    if images.size == 0:
        raise ValueError(f"{name} is empty (shape {images.shape}), expected at least one image of one pixel")
    if images.dtype.kind != "f":
        mend, converted = "", "images.astype('float32')"
        if images.dtype.kind == "b":
            mend = f"; convert them: {converted}"
        elif images.dtype.kind in "iu" and (white := _white(images.max())) > 1:
            mend = f"; divide by {white} first: {converted} / {white}"
        elif images.dtype.kind in "iu":  # 0 and 1, or all black
            mend = f"; convert them: {converted}, and divide by 255 if that is white"
        raise TypeError(f"{name} has dtype {images.dtype}, expected floating-point numbers in [0, 1]{mend}")
    if image_shape is not None and images.shape[1:] != tuple(image_shape):
        channels_last = images.shape[1:] == (*image_shape[1:], image_shape[0])
        mend = ("move the channels: images.transpose(0, 3, 1, 2)" if channels_last else
                "resize them, or use a network and training images of this shape")
        raise ValueError(f"{name} has images of shape (C, H, W) = {images.shape[1:]}, expected "
                         f"{tuple(image_shape)}; {mend}")
    with np.errstate(over="ignore"):  # a number too large for float32 becomes inf, which is reported below
        images = np.ascontiguousarray(images, dtype=np.float32)
    flat = images.ravel()
    # one fast pass: a pixel that is not finite spoils the sum of squares (huge ones do too: look again)
    finite = np.isfinite(images) if not np.isfinite(np.dot(flat, flat)) else np.True_
    if not finite.all():
        first = tuple(int(i) for i in np.unravel_index(np.argmin(finite), images.shape))
        raise ValueError(f"{name} has {np.sum(~finite)} NaN or infinite pixels (in float32), the first is "
                         f"{images[first]} at index {first}; mend them, or leave these images out")
    return images


def _how_to_get_four_dimensions(shape, image_shape):
    if image_shape is not None and shape == tuple(image_shape):
        return "a single image becomes (1, C, H, W) by images[None]"
    if len(shape) == 3:
        return "grey images (N, H, W) become (N, 1, H, W) by images[:, None]"
    return "rows of C * H * W pixels become (N, C, H, W) by images.reshape(-1, C, H, W)"


def _white(largest):
    """Return what stands for white in images whose largest pixel is `largest`, as far as can be told."""
    largest = math.ceil(largest)
    return next((white for white in (16, 255, 65535) if white / 4 <= largest <= white), largest)


def check_labels(labels, n_classes, n_images, name="labels"):
    """Return `labels` as an int64 array (N,), or say what is wrong with them.

    Parameters
    ----------
    labels : array_like, shape (N,), integer
        Not copied if it has the right form already.
    n_classes : int
        Each label must be one of 0, 1, ..., n_classes - 1.
    n_images : int
        The number of images that the labels belong to.
    name : str
        What the error messages call them.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or len(labels) != n_images or n_images == 0:
        mend = ""
        if labels.size == n_images == max(labels.shape, default=1) and n_images > 0:
            mend = "; one axis is enough: labels.ravel()"
        elif labels.shape == (n_images, n_classes) and _are_one_hot(labels):
            mend = "; one-hot rows become labels by labels.argmax(axis=1)"
        raise ValueError(f"{name} has shape {labels.shape}, expected one label for each of {n_images} images "
                         f"(at least one){mend}")
    if labels.dtype.kind not in "iu":
        mend = "convert them: labels.astype('int64')" if _are_whole(labels) else "number the classes from 0"
        raise TypeError(f"{name} has dtype {labels.dtype} (the first is {labels[0]!r}), expected integers "
                        f"0..{n_classes - 1}; {mend}")
    outside = (labels < 0) | (labels >= n_classes)
    if outside.any():
        first, largest = int(np.argmax(outside)), int(labels.max())
        mend = "" if labels.min() < 0 else f", or, if they are, set n_classes to {largest + 1} or more"
        raise ValueError(f"{name} has the value {labels[first]} at {first}, expected 0..{n_classes - 1}: "
                         f"number the classes from 0 (in training and test){mend}")
    return np.ascontiguousarray(labels, dtype=np.int64)


def _are_one_hot(rows):
    return rows.dtype.kind in "biuf" and np.isin(rows, (0, 1)).all() and (rows.sum(axis=1) == 1).all()


def _are_whole(labels):
    """Say whether labels that are not integers, but text perhaps, can be converted without loss."""
    try:
        with np.errstate(invalid="ignore"):  # NaN
            numbers = labels.astype(np.int64).tolist()
    except (ValueError, TypeError, OverflowError):
        return False
    return all(isinstance(label, (str, bytes)) or label == number
               for label, number in zip(labels.tolist(), numbers, strict=True))


def _check_count(value, smallest, largest, name):
    if not is_whole(value):
        raise TypeError(f"{name} is {value!r}, expected an integer from {smallest} to {largest}")
    if not smallest <= value <= largest:
        raise ValueError(f"{name} is {value}, expected {smallest} to {largest}")
    return int(value)


def _warn_of_layout(image_shape):
    channels, height, width = image_shape
    if width in (1, 3, 4) and min(channels, height) > 4:  # as many as colours, and hardly a width
        warnings.warn(f"each image has {channels} channels of {height}x{width} pixels; if the arrays are "
                      "(N, H, W, C), make both (N, C, H, W) by images.transpose(0, 3, 1, 2)", stacklevel=4)


def _warn_of_range(train_images, test_images):
    """Warn of pixels above 1, and of training and test images that were not scaled alike.

    Who subtracts a mean has negative pixels, so that images without any were not standardized.
    """
    (low, high, size), (test_low, test_high, test_size) = map(_extent, (train_images, test_images))
    ranges = f"train_images lie in {low:g}..{high:g} and test_images in {test_low:g}..{test_high:g}"
    is_centred, test_is_centred = low < -0.3 * size, test_low < -0.3 * test_size
    if is_centred != test_is_centred or size > 4 * test_size > 0 or test_size > 4 * size > 0:
        warnings.warn(f"{ranges}: it seems that they were not scaled alike; scale both in the same way",
                      stacklevel=4)
    elif min(low, test_low) >= 0 and max(high, test_high) > 1.001:  # more than an error of rounding
        white = _white(max(high, test_high))
        warnings.warn(f"{ranges}, expected 0..1; divide by {white}, both of them", stacklevel=4)


def _extent(images):
    flat = images.ravel()
    return float(flat.min()), float(flat.max()), math.sqrt(np.dot(flat, flat) / flat.size)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test images with their labels, checked once, when the data set is made.

    Warns (`UserWarning`) of images that can be trained on, but hardly as they are: with pixels up to 16 or
    255, scaled in training or test only, or of shape (N, H, W, C). Standardized images are fine.

    Attributes
    ----------
    train_images, test_images : ndarray, shape (N, C, H, W), float32, in [0, 1]
        float64 is converted; integers are refused: 1 may mean white (of 0..1) or nearly black (of 0..255).
    train_labels, test_labels : ndarray, shape (N,), int64, in 0..n_classes-1
    n_classes : int
    name : str

    Parameters
    ----------
    any_range : bool
        Pixels are meant as they are: no warning of their range.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    n_classes: int
    name: str = "unnamed"
    any_range: InitVar[bool] = False

    def __post_init__(self, any_range):
        n_classes = _check_count(self.n_classes, 2, 2**31 - 1, "n_classes")
        train_images = check_images(self.train_images, name="train_images")
        _warn_of_layout(train_images.shape[1:])
        test_images = check_images(self.test_images, train_images.shape[1:], name="test_images")
        if not any_range:
            _warn_of_range(train_images, test_images)
        train_labels = check_labels(self.train_labels, n_classes, len(train_images), "train_labels")
        test_labels = check_labels(self.test_labels, n_classes, len(test_images), "test_labels")
        self._set(train_images=train_images, train_labels=train_labels,
                  test_images=test_images, test_labels=test_labels, n_classes=n_classes)

    def _set(self, **fields):
        for field, value in fields.items():
            object.__setattr__(self, field, value)  # the way to set a field of a frozen dataclass

    def __repr__(self):
        return (f"Dataset({self.name!r}: {len(self.train_images)} training and {len(self.test_images)} test "
                f"images of shape {self.image_shape}, {self.n_classes} classes)")

    def __sizeof__(self):
        # Dask asks, and sends what is large to each worker once
        return sum(array.nbytes for array in self._arrays())

    def checksum(self):
        """Return a number that tells data sets apart: a checksum of all images and labels."""
        checksum = 0
        for array in self._arrays():
            checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
        return checksum

    def _arrays(self):
        return self.train_images, self.train_labels, self.test_images, self.test_labels

    @property
    def image_shape(self):
        """Shape of one image: (C, H, W)."""
        return self.train_images.shape[1:]

    def subset(self, n_train=None, n_test=None, rng=None):
        """Draw a smaller data set at random, without replacement (the classes are not balanced).

        Parameters
        ----------
        n_train, n_test : int, optional
            How many images to draw; None keeps all of them, in their order.
        rng : None, int or numpy.random.Generator
        """
        rng = generator(rng)
        part = copy.copy(self)  # which checks, and warns of, nothing anew
        for kind, n in (("train", n_train), ("test", n_test)):
            images, labels = getattr(self, f"{kind}_images"), getattr(self, f"{kind}_labels")
            if n is not None:
                chosen = rng.choice(len(images), _check_count(n, 1, len(images), f"n_{kind}"), replace=False)
                part._set(**{f"{kind}_images": images[chosen], f"{kind}_labels": labels[chosen]})
        return part


def load_digits(size=8, test_fraction=0.2, rng=0):
    """Load the 1797 handwritten digits that come with scikit-learn; needs no download.

    Parameters
    ----------
    size : 8 or 28
        28 makes every pixel a block of 3 x 3 and adds a black border of 2 (3 * 8 + 2 + 2 = 28), so that
        networks made for MNIST run unchanged. It adds no detail.
    test_fraction : float
        The part kept for testing, between 0 and 1, the same in each class.
    rng : None, int or numpy.random.Generator
        Draws the split.
    """
    from sklearn import datasets as sklearn_datasets  # here, for importing scikit-learn takes a second
    from sklearn.model_selection import train_test_split

    if size not in (8, 28):
        raise ValueError(f"size is {size!r}, expected 8 (as bundled) or 28 (enlarged to the size of MNIST)")
    if not (is_number(test_fraction) and 0 < test_fraction < 1):
        raise ValueError(f"test_fraction is {test_fraction!r}, expected a number between 0 and 1, like 0.2")
    digits = sklearn_datasets.load_digits()
    images = digits.images[:, None].astype(np.float32) / 16  # (1797, 1, 8, 8); bundled as 0..16
    if size == 28:
        images = images.repeat(3, axis=2).repeat(3, axis=3)  # (1797, 1, 24, 24)
        images = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))  # (1797, 1, 28, 28)
    seed = int(generator(rng).integers(2**31))  # scikit-learn takes no Generator
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, digits.target, test_size=float(test_fraction), stratify=digits.target, random_state=seed)
    return Dataset(train_images, train_labels, test_images, test_labels, n_classes=10,
                   name="digits" if size == 8 else "digits28")


def load_mnist(data_home=None):
    """Load MNIST: 60000 training and 10000 test images of handwritten digits, 28 x 28.

    Reads the four files of `mnist.MNIST_FILES`, gzipped (with .gz) or not, with a dash or a dot before idx.
    Without them, scikit-learn downloads a copy from OpenML (some 15 MB, once; being text, it takes far longer
    to read than the four files).

    Parameters
    ----------
    data_home : str or path, optional
        A folder that exists. The files are in it, or below it in ``mnist`` or in ``MNIST/raw``; a download
        goes there too. None: the environment variable RSO_NUMBA_DATA names it; else it is ``data`` in the
        current directory or in the checkout of this package; else a download goes to scikit-learn's cache.

    Raises
    ------
    ValueError
        If a file is damaged, misnamed, or not the published one (by its SHA-256).
    FileNotFoundError, NotADirectoryError
        If the folder that was named is none, or if files are missing and cannot be downloaded: says which
        files to put where.
    """
    train_images, train_labels, test_images, test_labels = mnist.read_mnist(data_home)
    # (N, 28, 28) bytes -> (N, 1, 28, 28)
    return _of_bytes(train_images[:, None], train_labels, test_images[:, None], test_labels, "mnist")


def load_cifar10(data_home=None):
    """Load CIFAR-10: 50000 training and 10000 test photographs of ten kinds of things, 3 x 32 x 32.

    Reads the six files of `cifar10.CIFAR10_FILES`, the binary version. Without them, scikit-learn downloads a
    copy from OpenML (text, of which reading alone takes minutes and some gigabytes of memory).

    Parameters
    ----------
    data_home : str or path, optional
        See `load_mnist`. The files are in it, or below it in ``cifar10`` or in ``cifar-10-batches-bin``.

    Raises
    ------
    ValueError
        If a file is damaged, misnamed, or not the published one (by its MD5).
    FileNotFoundError, NotADirectoryError
        If the folder that was named is none, or if files are missing and cannot be downloaded: says which
        files to put where. Or if there are pickles only, the python version, which nobody opens here.
    """
    return _of_bytes(*cifar10.read_cifar10(data_home), "cifar10")


def _of_bytes(train_images, train_labels, test_images, test_labels, name):
    """Return the Dataset of images of bytes, which become float32 in [0, 1]."""
    train_images, test_images = (
        np.divide(images, 255, dtype=np.float32) for images in (train_images, test_images))
    return Dataset(train_images, train_labels, test_images, test_labels, n_classes=10, name=name)


LOADERS = {
    "digits": lambda data_home, **options: load_digits(**options),
    "digits28": lambda data_home, **options: load_digits(size=28, **options),
    "mnist": lambda data_home, **options: load_mnist(data_home, **options),
    "cifar10": lambda data_home, **options: load_cifar10(data_home, **options),
}


def load(name, data_home=None, **options):
    """Load the data set called `name` ('digits', 'digits28', 'mnist' or 'cifar10').

    `data_home` goes to the loaders that read files, `options` to each loader: ``test_fraction`` and ``rng``
    for the digits.
    """
    if name not in LOADERS:
        raise ValueError(f"there is no data set {name!r}, expected one of {', '.join(LOADERS)}")
    return LOADERS[name](data_home, **options)


def check_training(network, data, count, batch_size, count_name, size_name="batch_size"):
    """Raise ValueError or TypeError unless the arguments of a training fit together."""
    whole_number(count, count_name)
    whole_number(batch_size, size_name)
    if batch_size > len(data.train_images):
        raise ValueError(f"{size_name} is {batch_size}, larger than the training set of "
                         f"{len(data.train_images)} images; expected at most that")
    if data.image_shape != network.image_shape or data.n_classes != network.n_classes:
        raise ValueError(
            f"the network was built for images {network.image_shape} in {network.n_classes} classes, "
            f"the data has {data.image_shape} in {data.n_classes}; build it with "
            "image_shape=data.image_shape, n_classes=data.n_classes"
        )
