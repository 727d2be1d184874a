"""The four files of MNIST: their format, the folders where they are looked for, and a copy from OpenML.

All of it is bytes; `datasets.load_mnist` makes a `Dataset` of them. Nothing here unpickles, and no number in
the header of a file is believed before it is checked.
"""

import gzip
import hashlib
import math
import struct
import zlib

import numpy as np

from .sources import data_homes, from_openml

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
FOLDERS = ("", "mnist", "MNIST/raw")  # of a data home; torchvision puts the files into the last
MAX_BYTES = 2**27  # of an array that is read: nearly three times the largest file of MNIST
MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"


def read_idx(path, expected_shape=None, max_bytes=MAX_BYTES):
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
        raise ValueError(f"the header declares shape {shape}, {n_bytes} bytes, over max_bytes={max_bytes} "
                         "(if the file is meant to be so large, give more)")
    body = bytearray()
    while piece := file.read(min(2**20, n_bytes + 1 - len(body))):  # at most one byte more than needed
        body += piece
    if len(body) < n_bytes:
        raise ValueError(f"cut short: {len(body)} bytes after the IDX header, which declares {n_bytes}")
    if len(body) > n_bytes:
        raise ValueError(f"more bytes follow the {n_bytes} that the IDX header declares")
    return np.frombuffer(body, np.uint8).reshape(shape)


def find_files(home):
    """Return the paths of the files of MNIST, a dict by name, in that folder at or below `home` with most."""
    return max((_files_in(home / folder) for folder in FOLDERS), key=len)  # the first of the fullest


def _files_in(folder):
    paths = {}
    for name in MNIST_FILES:
        dotted = name.replace("-idx", ".idx")  # some sites offer them so, and gunzip -N restores it
        for path in (folder / (spelling + end) for spelling in (dotted, name) for end in ("", ".gz")):
            if path.is_file():
                paths[name] = path
    return paths


def read_mnist(data_home=None):
    """Return the four arrays of MNIST, uint8, in the order of `MNIST_FILES`; see `datasets.load_mnist`."""
    homes = data_homes(data_home)
    paths = max(map(find_files, homes), key=len)
    if not paths:
        return _download(homes)
    missing = [name for name in MNIST_FILES if name not in paths]
    if missing:
        folder = next(iter(paths.values())).parent
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)} (.gz or not); put all four files of "
                                f"MNIST there, they are at {MIRROR}")
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
    return arrays


def _download(homes):
    names = "\n  ".join(name + ".gz" for name in MNIST_FILES)
    pixels, labels, _ = from_openml(
        "mnist_784", "MNIST", (70000, 784), homes,
        f"Put these four files, which are at {MIRROR},\n  {names}\ninto the folder {{home}}")
    images = pixels.reshape(-1, 28, 28)
    return images[:60000], labels[:60000], images[60000:], labels[60000:]
