"""Where the files of a data set are looked for, and a download from OpenML for those who have none.

Used by `mnist.py` and `cifar10.py`. All of it is bytes; nothing here unpickles.
"""

import http.client
import os
import warnings
from pathlib import Path

import numpy as np


def data_homes(data_home=None):
    """Return the folders in which data sets are looked for.

    Parameters
    ----------
    data_home : str or path, optional
        See `datasets.load_mnist`.

    Returns
    -------
    homes : list of Path
        The one that the user named, or else the usual ones, which need not exist.

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        If the user named what is no folder. (It may be a slip: nothing is made or downloaded there.)
    """
    named, origin = data_home, ""
    if data_home is None:
        named, origin = os.environ.get("RSO_NUMBA_DATA"), " (from the environment variable RSO_NUMBA_DATA)"
    if data_home is None and not named:
        return list(dict.fromkeys([Path("data").resolve(), Path(__file__).resolve().parents[1] / "data"]))
    home = Path(os.path.expanduser(named))
    if not home.exists():
        raise FileNotFoundError(f"the data home {home}{origin} does not exist; name a folder that does, or "
                                "make this one first")
    if not home.is_dir():
        raise NotADirectoryError(f"the data home {home}{origin} is not a folder; name the folder that holds "
                                 "the files of the data set, or one to download them to")
    return [home]


def from_openml(name, title, shape, homes, advice):
    """Download a data set of ten classes from OpenML, or take what was downloaded before.

    Parameters
    ----------
    name, title : str
        That of its version 1 on OpenML; and what messages call it.
    shape : tuple of int
        (N, pixels), expected.
    homes : list of Path
        See `data_homes`. The first that exists gets the download, else scikit-learn's cache.
    advice : str
        Which files to put into the folder {home} instead, for who has no network.

    Returns
    -------
    pixels : ndarray, shape (N, pixels), uint8
    labels : ndarray, shape (N,), int64
    mend : str
        What to do if they are not as they should be.

    Raises
    ------
    FileNotFoundError
        If it cannot be downloaded.
    ValueError
        If it has another shape, or other numbers than the whole ones 0..255 and the labels 0..9.
    """
    from sklearn import datasets as sklearn_datasets  # here, for importing scikit-learn takes a second

    home = next((home for home in homes if home.is_dir()), None)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "A network error occurred")  # that the error below tells
            bunch = sklearn_datasets.fetch_openml(
                name, version=1, data_home=home and str(home), as_frame=False, n_retries=1,
                parser="liac-arff")  # the parser that needs no pandas
    except (OSError, http.client.HTTPException) as error:
        raise FileNotFoundError(
            f"{title} is not on this machine and could not be downloaded ({type(error).__name__}: {error}). "
            f"{advice.format(home=home or homes[0])}, or give the folder that has them as data_home (on the "
            "command line: --data-home). The data sets digits and digits28 need no files."
        ) from None  # what failed inside scikit-learn helps nobody
    data, target = np.asarray(bunch.data), np.asarray(bunch.target)
    cache = Path(sklearn_datasets.get_data_home(home and str(home))) / "openml"
    mend = f"delete the folder {cache} and try again"
    if data.shape != shape or target.shape != shape[:1]:
        raise ValueError(f"OpenML sent {title} as data {data.shape} and target {target.shape}, expected "
                         f"{shape} and {shape[:1]}; {mend}")
    with np.errstate(invalid="ignore"):
        pixels = data.astype(np.uint8)
    if not np.array_equal(pixels, data):  # NaN, fractions, and numbers outside 0..255 do not survive uint8
        raise ValueError(f"OpenML sent {title} with pixels other than the whole numbers 0..255; {mend}")
    if not np.isin(target.astype(str), list("0123456789")).all():
        raise ValueError(f"OpenML sent {title} with labels {np.unique(target.astype(str))[:20]}; {mend}")
    return pixels, target.astype(np.int64), mend  # the labels come as '0' to '9'
