"""The six files of CIFAR-10: their format, the folders where they are looked for, and a copy from OpenML.

An image of the binary version is 3073 bytes: its label, and three channels (red, green, blue) of 32 rows of
32 pixels. The python version holds the same in pickles, which can run any code when they are opened: nobody
opens them here. All of it is bytes; `datasets.load_cifar10` makes a `Dataset` of them.
"""

import hashlib
import math

import numpy as np

from .sources import data_homes, from_openml

# The six files of CIFAR-10, and the MD5 that is published for each.
CIFAR10_FILES = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",  # the last one: all others are for training
}
IMAGES, SHAPE = 10_000, (3, 32, 32)  # in a file, and of each
PIXELS = math.prod(SHAPE)
FOLDERS = ("", "cifar10", "cifar-10-batches-bin")  # of a data home; the archive unpacks into the last
PICKLES = ("", "cifar10", "cifar-10-batches-py")
ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"


def find_files(home):
    """Return the paths of the files of CIFAR-10, by name, in the folder at or below `home` with most."""
    return max(({name: home / folder / name for name in CIFAR10_FILES if (home / folder / name).is_file()}
                for folder in FOLDERS), key=len)  # the first of the fullest


def read_file(path):
    """Read one of the six files.

    Returns
    -------
    images : ndarray, shape (10000, 3, 32, 32), uint8
    labels : ndarray, shape (10000,), uint8

    Raises
    ------
    ValueError
        If the file is not the published one of its name; says what is wrong with it.
    """
    n_bytes = IMAGES * (1 + PIXELS)
    with open(path, "rb") as file:
        content = file.read(n_bytes + 1)  # at most one byte more than needed
    if len(content) != n_bytes:
        found = (f"cut short, {len(content)} bytes" if len(content) < n_bytes else
                 f"too long, more than {n_bytes} bytes")
        raise ValueError(f"{path}: {found}, expected {n_bytes}; replace it by the file of {ARCHIVE}")
    md5, expected = _md5(content), CIFAR10_FILES[path.name]
    if md5 != expected:
        other = next((name for name, one in CIFAR10_FILES.items() if one == md5), None)
        reason = f"this is {other} under another name" if other else "it is damaged, or of another data set"
        raise ValueError(f"{path}: its MD5 is {md5}, expected {expected}: {reason}; replace it by the file "
                         f"of {ARCHIVE}")
    return _images_and_labels(content)


def _md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _images_and_labels(content):
    records = np.frombuffer(content, np.uint8).reshape(IMAGES, -1)
    return records[:, 1:].reshape(-1, *SHAPE), records[:, 0]


def read_cifar10(data_home=None):
    """Return training images and labels, test images and labels, uint8; see `datasets.load_cifar10`."""
    homes = data_homes(data_home)
    paths = max(map(find_files, homes), key=len)
    if not paths:
        parts = _download(homes)
    else:
        missing = [name for name in CIFAR10_FILES if name not in paths]
        if missing:
            folder = next(iter(paths.values())).parent
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; put all six files of CIFAR-10 "
                                    f"there, they are in {ARCHIVE}")
        parts = [read_file(paths[name]) for name in CIFAR10_FILES]
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images[:-1]), np.concatenate(labels[:-1]), images[-1], labels[-1]


def _download(homes):
    pickles = next((home / folder for home in homes for folder in PICKLES
                    if (home / folder / "data_batch_1").is_file()), None)
    if pickles:
        raise FileNotFoundError(
            f"{pickles} holds the python version of CIFAR-10, pickles, which can run any code when they are "
            f"opened; get the binary version, {ARCHIVE}, and unpack it beside them")
    names = "\n  ".join(CIFAR10_FILES)
    pixels, labels, mend = from_openml(
        "CIFAR_10", "CIFAR-10", (IMAGES * len(CIFAR10_FILES), PIXELS), homes,
        f"Get {ARCHIVE}, and put its six files\n  {names}\ninto the folder {{home}}")
    records = np.concatenate([labels.astype(np.uint8)[:, None], pixels], axis=1)
    contents = [records[first : first + IMAGES].tobytes() for first in range(0, len(records), IMAGES)]
    found = {_md5(content): content for content in contents}
    if set(found) != set(CIFAR10_FILES.values()):  # in whichever order the files come
        raise ValueError("OpenML sent CIFAR-10 with other images, or in another order, than the files of "
                         f"{ARCHIVE} (by their MD5); {mend}, or get those files")
    return [_images_and_labels(found[md5]) for md5 in CIFAR10_FILES.values()]
