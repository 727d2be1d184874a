"""Images and labels to learn from: scikit-learn's digits (bundled) and MNIST (files or download).

Every loader returns a `Dataset`, whose arrays have been checked. Nothing here unpickles, and no number
in the header of a file is believed before it is checked.
"""

import gzip
import hashlib
import http.client
import math
import numbers
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .arguments import generator, whole_number

# The four files of MNIST: shape of the array of bytes, and SHA-256 of the decompressed file.
MNIST_FILES = {
    "train-images-idx3-ubyte": (
        (60000, 28, 28), "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    "train-labels-idx1-ubyte": (
        (60000,), "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "t10k-images-idx3-ubyte": (
        (10000, 28, 28), "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "t10k-labels-idx1-ubyte": (
        (10000,), "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
}


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
    if images.dtype.kind != "f":
        mend = ("divide by 255 first: images.astype('float32') / 255" if images.dtype.kind in "iu"
                else "convert them: images.astype('float32')")
        raise TypeError(f"{name} has dtype {images.dtype}, expected floating-point numbers in [0, 1]; {mend}")
    if images.ndim != 4:
        raise ValueError(f"{name} has {images.ndim} dimensions (shape {images.shape}), expected 4: (N, C, H, "
                         "W); grey images (N, H, W) become (N, 1, H, W) by images[:, None]")
    if images.size == 0:
        raise ValueError(f"{name} is empty (shape {images.shape}), expected at least one image of one pixel")
    if image_shape is not None and images.shape[1:] != tuple(image_shape):
        raise ValueError(f"{name} has images of shape (C, H, W) = {images.shape[1:]}, expected "
                         f"{tuple(image_shape)}; resize them, or build the network for this shape")
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
        raise ValueError(f"{name} has shape {labels.shape}, expected one label for each of {n_images} images "
                         "(at least one); one-hot rows become labels by labels.argmax(axis=1)")
    if labels.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {labels.dtype} (the first is {labels[0]!r}), expected integers "
                        f"0..{n_classes - 1}; convert them: labels.astype('int64')")
    outside = (labels < 0) | (labels >= n_classes)
    if outside.any():
        first = int(np.argmax(outside))
        raise ValueError(f"{name} has the value {labels[first]} at {first}, expected 0..{n_classes - 1}: "
                         "number the classes from 0, or set n_classes to the largest label + 1")
    return np.ascontiguousarray(labels, dtype=np.int64)


def _check_count(value, smallest, largest, name):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r}, expected an integer from {smallest} to {largest}")
    if not smallest <= value <= largest:
        raise ValueError(f"{name} is {value}, expected {smallest} to {largest}")
    return int(value)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test images with their labels, checked once, when the data set is made.

    Attributes
    ----------
    train_images, test_images : ndarray, shape (N, C, H, W), float32, in [0, 1]
        float64 is converted; integers are refused: 1 may mean white (of 0..1) or nearly black (of 0..255).
    train_labels, test_labels : ndarray, shape (N,), int64, in 0..n_classes-1
    n_classes : int
    name : str
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    n_classes: int
    name: str = "unnamed"

    def __post_init__(self):
        n_classes = _check_count(self.n_classes, 2, 2**31 - 1, "n_classes")
        train_images = check_images(self.train_images, name="train_images")
        test_images = check_images(self.test_images, train_images.shape[1:], name="test_images")
        train_labels = check_labels(self.train_labels, n_classes, len(train_images), "train_labels")
        test_labels = check_labels(self.test_labels, n_classes, len(test_images), "test_labels")
        checked = dict(train_images=train_images, train_labels=train_labels,
                       test_images=test_images, test_labels=test_labels, n_classes=n_classes)
        for field, value in checked.items():
            object.__setattr__(self, field, value)  # the way to set a field of a frozen dataclass

    def __repr__(self):
        return (f"Dataset({self.name!r}: {len(self.train_images)} training and {len(self.test_images)} test "
                f"images of shape {self.image_shape}, {self.n_classes} classes)")

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
        parts = []
        for images, labels, n, argument in ((self.train_images, self.train_labels, n_train, "n_train"),
                                            (self.test_images, self.test_labels, n_test, "n_test")):
            if n is not None:
                chosen = rng.choice(len(images), _check_count(n, 1, len(images), argument), replace=False)
                images, labels = images[chosen], labels[chosen]
            parts += [images, labels]
        return Dataset(*parts, n_classes=self.n_classes, name=self.name)


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
    if not (isinstance(test_fraction, numbers.Real) and 0 < test_fraction < 1):
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


def read_idx(path, expected_shape=None, max_bytes=2**28):
    """Read an array of unsigned bytes from an IDX file (the format of MNIST), gzipped or not.

    Parameters
    ----------
    path : str or path
    expected_shape : tuple of int, optional
        Refuse any other shape.
    max_bytes : int
        Refuse arrays larger than this. Memory is taken for what the file holds, not for what it claims.

    Returns
    -------
    array : ndarray, uint8

    Raises
    ------
    ValueError
        If the file is anything but one whole IDX file of unsigned bytes; names the file and the reason.
    """
    with open(path, "rb") as raw:
        gzipped = raw.read(2) == b"\x1f\x8b"  # look inside: browsers unpack files, but leave .gz in the name
        raw.seek(0)
        try:
            return _read_idx(gzip.GzipFile(fileobj=raw) if gzipped else raw, expected_shape, max_bytes)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: damaged or cut short gzip file ({error}); replace it") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}; replace the file") from None


def _read_idx(file, expected_shape, max_bytes):
    # 0, 0, type code (8: unsigned byte), number of dimensions; the sizes, signed, high byte first; the bytes
    magic = file.read(4)
    if magic[:2] != b"\0\0"[:len(magic)]:
        raise ValueError(f"not an IDX file: starts with the bytes {magic.hex(' ')}, expected 00 00 08")
    n_dimensions = magic[3] if len(magic) == 4 else 0
    sizes = file.read(4 * n_dimensions)
    if len(magic) < 4 or len(sizes) < 4 * n_dimensions:
        raise ValueError(f"cut short: the file ends inside its IDX header, after {len(magic + sizes)} bytes")
    if magic[2] != 8:
        raise ValueError(f"the IDX type code is 0x{magic[2]:02x}, expected 0x08 (unsigned bytes)")
    shape = struct.unpack(f">{n_dimensions}i", sizes)
    if not 1 <= n_dimensions <= 8 or min(shape) < 1:
        raise ValueError(f"the IDX header declares {n_dimensions} dimensions of sizes {shape[:8]}, expected "
                         "1 to 8 dimensions of sizes from 1")
    if expected_shape is not None and shape != tuple(expected_shape):
        raise ValueError(f"the IDX header declares shape {shape}, expected {tuple(expected_shape)}: is it "
                         "another file, renamed?")
    n_bytes = math.prod(shape)
    if n_bytes > max_bytes:
        raise ValueError(f"the header declares shape {shape}, {n_bytes} bytes, over max_bytes={max_bytes}")
    body = bytearray()
    while piece := file.read(min(2**20, n_bytes + 1 - len(body))):  # at most one byte more than needed
        body += piece
    if len(body) < n_bytes:
        raise ValueError(f"cut short: {len(body)} bytes after the IDX header, which declares {n_bytes}")
    if len(body) > n_bytes:
        raise ValueError(f"more bytes follow the {n_bytes} that the IDX header declares")
    return np.frombuffer(body, np.uint8).reshape(shape)


def load_mnist(data_home=None):
    """Load MNIST: 60000 training and 10000 test images of handwritten digits, 28 x 28.

    Reads the four files of `MNIST_FILES` (gzipped, with .gz, or not). Without them, scikit-learn downloads
    a copy from OpenML (some 15 MB, once; being text, it takes far longer to read than the four files).

    Parameters
    ----------
    data_home : str or path, optional
        The folder of the files, or of a folder ``mnist`` with the files; a download goes there too.
        None: the environment variable RSO_NUMBA_DATA names it; else it is ``data`` in the current directory
        or in the checkout of this package; else a download goes to scikit-learn's own cache.

    Raises
    ------
    ValueError
        If a file is damaged, misnamed, or not the published one (by its SHA-256).
    FileNotFoundError
        If files are missing and cannot be downloaded: says which files to put where.
    """
    given = data_home if data_home is not None else os.environ.get("RSO_NUMBA_DATA") or None
    if given is not None:
        roots = cache = [Path(given).expanduser()]
    else:
        roots = [Path("data").resolve(), Path(__file__).resolve().parents[1] / "data"]
        cache = [root for root in roots if root.is_dir()]
    folders = list(dict.fromkeys(folder for root in roots for folder in (root, root / "mnist")))
    found = [{name: folder / (name + end) for name in MNIST_FILES for end in ("", ".gz")
              if (folder / (name + end)).is_file()} for folder in folders]
    paths = max(found, key=len)  # the first of the fullest
    if not paths:
        return _mnist_from_openml(cache[0] if cache else None, folders)
    missing = [name for name in MNIST_FILES if name not in paths]
    if missing:
        raise FileNotFoundError(f"{folders[found.index(paths)]} lacks {', '.join(missing)} (.gz or not); put "
                                "all four files of MNIST there, or none to have them downloaded")
    arrays = []
    for name, (shape, expected) in MNIST_FILES.items():
        array = read_idx(paths[name], expected_shape=shape)
        header = struct.pack(f">4B{array.ndim}i", 0, 0, 8, array.ndim, *shape)
        sha256 = hashlib.sha256(header + array.tobytes()).hexdigest()  # of the whole decompressed file
        if sha256 != expected:
            raise ValueError(f"{paths[name]}: the SHA-256 of the decompressed file is {sha256}, expected "
                             f"{expected}; replace it, for it is damaged or belongs to another data set "
                             "(the files of Fashion-MNIST have the same names)")
        arrays.append(array)
    return _mnist_dataset(*arrays)


def _mnist_from_openml(cache, folders):
    from sklearn import datasets as sklearn_datasets

    try:
        bunch = sklearn_datasets.fetch_openml(
            "mnist_784", version=1, data_home=cache and str(cache), as_frame=False, n_retries=1,
            parser="liac-arff")  # the parser that needs no pandas
    except (OSError, http.client.HTTPException) as error:
        names, places = ("\n  ".join(map(str, lines)) for lines in (MNIST_FILES, folders))
        raise FileNotFoundError(
            f"MNIST is not on this machine and could not be downloaded ({type(error).__name__}: {error}). "
            f"Put these four files, gzipped (with .gz) or not,\n  {names}\n"
            f"into one of these folders\n  {places}\n"
            "or set the environment variable RSO_NUMBA_DATA to the folder that holds them. "
            "load_digits(size=28) needs no download.") from error
    data, target = np.asarray(bunch.data), np.asarray(bunch.target)
    mend = f"delete the folder openml in {cache or '~/scikit_learn_data'} and try again"
    if data.shape != (70000, 784) or target.shape != (70000,):
        raise ValueError(f"OpenML sent MNIST as data {data.shape} and target {target.shape}, expected "
                         f"(70000, 784) and (70000,); {mend}")
    with np.errstate(invalid="ignore"):
        pixels = data.astype(np.uint8)
    if not np.array_equal(pixels, data):  # NaN, fractions, and numbers outside 0..255 do not survive uint8
        raise ValueError(f"OpenML sent MNIST with pixels other than the whole numbers 0..255; {mend}")
    if not np.isin(target.astype(str), list("0123456789")).all():
        raise ValueError(f"OpenML sent MNIST with labels {np.unique(target.astype(str))[:20]}; {mend}")
    images, labels = pixels.reshape(-1, 28, 28), target.astype(np.int64)  # the labels come as '0' to '9'
    return _mnist_dataset(images[:60000], labels[:60000], images[60000:], labels[60000:])


def _mnist_dataset(train_images, train_labels, test_images, test_labels):
    # (N, 28, 28) bytes -> (N, 1, 28, 28) float32 in [0, 1]
    train_images, test_images = (
        np.divide(images[:, None], 255, dtype=np.float32) for images in (train_images, test_images))
    return Dataset(train_images, train_labels, test_images, test_labels, n_classes=10, name="mnist")


LOADERS = {
    "digits": lambda data_home, **options: load_digits(**options),
    "digits28": lambda data_home, **options: load_digits(size=28, **options),
    "mnist": lambda data_home, **options: load_mnist(data_home, **options),
}


def load(name, data_home=None, **options):
    """Load the data set called `name` ('digits', 'digits28' or 'mnist').

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
