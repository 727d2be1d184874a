"""Writing files so that nothing already saved is lost."""

import os
from contextlib import contextmanager
from pathlib import Path


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
