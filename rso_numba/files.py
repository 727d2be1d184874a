"""Writing files so that nothing already saved is lost, and reading arrays from files that may be damaged."""

import errno
import io
import math
import os
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's share of it, or the largest file


def make_folder(path):
    """Make the folder `path`, if need be, and try to write there: better an error now than after the work."""
    Path(path).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()


@contextmanager
def written_beside(path):
    """Give a temporary path beside `path` to write to, and rename it to `path` at the end.

    At any time, even after a power failure, `path` is the former file or the new one, whole. If the block
    raises, the temporary file is removed and a former `path` stays as it was.

    Raises
    ------
    OSError
        If the file cannot be written, because the disk is full for example: names `path` and what to do.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield beside
        _flush(beside)  # or the disk may get the new name before it gets what is in the file
        os.replace(beside, path)
    except OSError as error:
        mend = "make room there, or name" if error.errno in FULL else "name"
        text = (f"{path} could not be written ({error.strerror or error}); {mend} another place. A former "
                "file of this name stays as it was")
        raise (OSError(text) if error.errno is None else OSError(error.errno, text)) from error
    finally:
        beside.unlink(missing_ok=True)


def _flush(path):
    with open(path, "r+b") as file:  # "+": Windows flushes only what may be written to
        os.fsync(file.fileno())


def read_npz(file):
    """Read the arrays of a file that numpy.savez wrote. Nothing is unpickled.

    No more memory is taken than the file has bytes, whatever it promises: `savez` compresses nothing, so
    each array has to be as long in the file as its header says.

    Parameters
    ----------
    file : binary file, open for reading

    Returns
    -------
    dict of ndarray, read-only, by name

    Raises
    ------
    Exception
        Of any kind, if the file is damaged: the readers of zip files and of NumPy's headers do.
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED or m.compress_size != m.file_size for m in members):
            raise ValueError("its arrays are compressed")
        if sum(m.file_size for m in members) > file.seek(0, os.SEEK_END):
            raise ValueError("its arrays are longer than the file")
        return {m.filename.removesuffix(".npy"): _array(archive.read(m), m.filename) for m in members}


def _array(content, name):
    # content: one .npy file, its header and its numbers
    header = io.BytesIO(content)
    if np.lib.format.read_magic(header) != (1, 0):
        raise ValueError(f"the header of {name} is of a version that Network.save does not write")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(header)
    n_promised, n_bytes = math.prod(shape) * dtype.itemsize, len(content) - header.tell()
    if n_promised != n_bytes:
        raise ValueError(f"the header of {name} promises {n_promised} bytes, and {n_bytes} follow")
    array = np.frombuffer(content, dtype, offset=header.tell())
    return array.reshape(shape, order="F" if fortran else "C")
