"""Writing files so that nothing already saved is lost."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path


def make_folder(path):
    """Make the folder `path`, if need be, and try to write there: better an error now than after the work."""
    Path(path).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()


@contextmanager
def written_beside(path):
    """Give a temporary path beside `path` to write to, and rename it to `path` at the end.

    If the block raises, the temporary file is removed and a former `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
