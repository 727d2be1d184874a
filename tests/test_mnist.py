"""MNIST: hostile IDX files, where files are looked for, and the download."""

import gzip
import hashlib
import os
import struct
import traceback
import tracemalloc
import types
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets

from rso_numba import datasets, mnist, sources
from rso_numba.__main__ import main


def idx_bytes(array, magic=None, shape=None):
    """Return the content of an IDX file; `magic` and `shape` replace what the header would truly say."""
    shape = array.shape if shape is None else shape
    magic = bytes([0, 0, 8, len(shape)]) if magic is None else magic
    return magic + struct.pack(f">{len(shape)}i", *shape) + array.astype(np.uint8).tobytes()


# ---- IDX files ----


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4)])
def test_read_idx_returns_what_was_written(tmp_path, shape, pack):
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape) + 200
    (tmp_path / "a").write_bytes(pack(idx_bytes(array)))
    result = mnist.read_idx(tmp_path / "a", expected_shape=shape, max_bytes=array.size)
    assert result.dtype == np.uint8 and np.array_equal(result, array)


IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
HUGE = (2**31 - 1, 2**31 - 1, 2**31 - 1)


@pytest.mark.parametrize("content, words", [
    (b"", "cut short.*after 0 bytes"),
    (b"\0\0\x08", "cut short.*after 3 bytes"),
    (idx_bytes(IMAGES)[:11], "cut short.*after 11 bytes"),
    (idx_bytes(IMAGES)[:-1], "cut short: 23 bytes.*24"),
    (idx_bytes(IMAGES)[:16], "cut short: 0 bytes.*24"),
    (idx_bytes(IMAGES) + b"\0", "more bytes follow the 24"),
    (idx_bytes(IMAGES, magic=b"\x80\x04\x95\x03"), "not an IDX file.*80 04 95 03"),
    (b"<html>404</html>", "not an IDX file"),
    (idx_bytes(IMAGES, magic=b"\0\0\x0d\x03"), "type code is 0x0d, expected 0x08"),
    (idx_bytes(IMAGES, shape=(2, -3, -4)), r"\(2, -3, -4\)"),
    (idx_bytes(IMAGES, shape=(0, 3, 4)), r"\(0, 3, 4\)"),
    (idx_bytes(IMAGES, shape=HUGE), "2147483647, 2147483647, 2147483647.*over max_bytes=134217728"),
    (idx_bytes(IMAGES, shape=(2**14, 2**13)), "cut short: 24 bytes"),  # as large as is allowed
    (b"\0\0\x08\0", "0 dimensions"),
    (idx_bytes(IMAGES, shape=(1,) * 9), "9 dimensions"),
    (b"\0\0\x08\xff", "cut short"),
])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_bad_idx_files_are_refused_by_name_and_reason_and_in_little_memory(tmp_path, content, words, pack):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(pack(content))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="train-images-idx3-ubyte: .*" + words):
            mnist.read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("damage", [
    lambda packed: packed[:-12],  # cut short
    lambda packed: packed[:12] + bytes([packed[12] ^ 0xFF]) + packed[13:],
    lambda packed: packed[:-6] + bytes([packed[-6] ^ 1]) + packed[-5:],  # the checksum inside gzip
    lambda packed: packed + b"garbage",
])
def test_damaged_gzip_files_are_refused(tmp_path, damage):
    (tmp_path / "a.gz").write_bytes(damage(gzip.compress(idx_bytes(IMAGES))))
    with pytest.raises(ValueError, match="a.gz: damaged or cut short gzip file"):
        mnist.read_idx(tmp_path / "a.gz")


def test_read_idx_expects_the_shape_it_is_told(tmp_path):
    (tmp_path / "a").write_bytes(idx_bytes(IMAGES))
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\), expected \(2,\): is it another file"):
        mnist.read_idx(tmp_path / "a", expected_shape=(2,))


# ---- MNIST ----


@pytest.fixture
def tiny(monkeypatch, nowhere):
    """Make the loader expect four tiny files; return their contents, and stand where there is no data/."""
    rng = np.random.default_rng(0)
    shapes = ((5, 28, 28), (5,), (3, 28, 28), (3,))
    values = [rng.integers(0, 256 if len(shape) == 3 else 10, shape, dtype=np.uint8) for shape in shapes]
    values[0][0, 0, :2] = 0, 255
    contents = dict(zip(mnist.MNIST_FILES, map(idx_bytes, values), strict=True))
    table = {name: (value.shape, hashlib.sha256(contents[name]).hexdigest())
             for name, value in zip(contents, values, strict=True)}
    monkeypatch.setattr(mnist, "MNIST_FILES", table)
    return types.SimpleNamespace(contents=contents, values=values)


def put(contents, folder, end="", pack=bytes):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / (name + end)).write_bytes(pack(content))


def check_tiny(data, values):
    assert data.name == "mnist" and data.n_classes == 10 and data.image_shape == (1, 28, 28)
    assert data.train_images.dtype == np.float32
    assert data.train_images[0, 0, 0, :2].tolist() == [0.0, 1.0]
    for images, value in ((data.train_images, values[0]), (data.test_images, values[2])):
        assert np.array_equal(images[:, 0], value.astype(np.float32) / np.float32(255))
    assert data.train_labels.tolist() == values[1].tolist()
    assert data.test_labels.tolist() == values[3].tolist()


@pytest.mark.parametrize("end, pack", [("", bytes), (".gz", gzip.compress), (".gz", bytes)])
@pytest.mark.parametrize("before_idx", ["-", "."])
@pytest.mark.parametrize("subfolder", ["", "mnist", "MNIST/raw"])
def test_mnist_files_are_read_from_data_home(tiny, tmp_path, subfolder, before_idx, end, pack):
    named = {name.replace("-idx", before_idx + "idx"): content for name, content in tiny.contents.items()}
    put(named, tmp_path / "home" / subfolder, end, pack)
    check_tiny(datasets.load_mnist(tmp_path / "home"), tiny.values)
    check_tiny(datasets.load_mnist(str(tmp_path / "home")), tiny.values)


def test_mnist_files_are_read_from_the_environment_variable(tiny, tmp_path, monkeypatch):
    put(tiny.contents, tmp_path / "env" / "mnist")
    monkeypatch.setenv("RSO_NUMBA_DATA", str(tmp_path / "env"))
    check_tiny(datasets.load_mnist(), tiny.values)


@pytest.mark.parametrize("subfolder", ["data", "data/mnist"])
def test_mnist_files_are_read_from_the_current_directory(tiny, subfolder):
    put(tiny.contents, Path(subfolder))
    check_tiny(datasets.load_mnist(), tiny.values)


def test_mnist_files_are_read_from_the_checkout(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "__file__", str(tmp_path / "checkout" / "rso_numba" / "sources.py"))
    put(tiny.contents, tmp_path / "checkout" / "data")
    check_tiny(datasets.load_mnist(), tiny.values)


def test_data_home_goes_before_the_environment_variable(tiny, tmp_path, monkeypatch):
    put({name: b"" for name in tiny.contents}, tmp_path / "env")
    put(tiny.contents, tmp_path / "home")
    monkeypatch.setenv("RSO_NUMBA_DATA", str(tmp_path / "env"))
    check_tiny(datasets.load_mnist(tmp_path / "home"), tiny.values)


def test_an_incomplete_folder_is_named_with_what_it_lacks(tiny, tmp_path):
    del tiny.contents["t10k-labels-idx1-ubyte"]
    put(tiny.contents, tmp_path / "home" / "mnist")
    with pytest.raises(FileNotFoundError, match="home.mnist lacks t10k-labels-idx1-ubyte "):
        datasets.load_mnist(tmp_path / "home")


def test_info_counts_the_files_that_the_loader_finds(tiny, tmp_path, monkeypatch, capsys):
    halves = [dict(list(tiny.contents.items())[i:i + 2]) for i in (0, 2)]
    put(halves[0], tmp_path / "mnist")
    put(halves[1], tmp_path)
    monkeypatch.setenv("RSO_NUMBA_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} lacks train-images-idx3-ubyte, train-labels"):
        datasets.load_mnist()
    assert main(["info"]) == 0
    assert f"{tmp_path} has 2 of the 4 files of MNIST" in capsys.readouterr().out
    put(tiny.contents, tmp_path / "MNIST" / "raw")
    check_tiny(datasets.load_mnist(), tiny.values)
    assert main(["info"]) == 0
    assert f"{tmp_path / 'MNIST' / 'raw'} has 4 of the 4 files of MNIST" in capsys.readouterr().out


@pytest.mark.parametrize("home, words", [
    ("typo", "does not exist; name a"), ("~nobody-here", "does not exist"), ("file", "is not a folder; name"),
])
def test_a_data_home_that_is_no_folder_is_an_error_and_not_made(tiny, monkeypatch, capsys, home, words):
    Path("file").write_text("")
    for load in (lambda: datasets.load_mnist(home), lambda: datasets.load("mnist", Path(home))):
        with pytest.raises(OSError, match=f"the data home {home} {words}"):
            load()
    assert main(["compare", "--data", "mnist", "--data-home", home]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rso-numba: error: the data home {home} {words}") and error.count("\n") == 1
    monkeypatch.setenv("RSO_NUMBA_DATA", home)
    with pytest.raises(OSError, match=rf"the data home {home} \(from .* RSO_NUMBA_DATA\) {words}"):
        datasets.load_mnist()
    assert main(["info"]) == 0
    assert f"the data home {home} (from the environment variable" in capsys.readouterr().out
    assert os.listdir() == ["file"]


@pytest.mark.parametrize("name", list(mnist.MNIST_FILES))
def test_a_changed_byte_is_found_by_its_checksum(tiny, tmp_path, name):
    content = bytearray(tiny.contents[name])
    content[-1] ^= 1
    put(tiny.contents | {name: content}, tmp_path)
    expected = hashlib.sha256(tiny.contents[name]).hexdigest()
    found = hashlib.sha256(content).hexdigest()
    with pytest.raises(ValueError, match=f"{name}: .*SHA-256.* is {found}, expected {expected}; replace it"):
        datasets.load_mnist(tmp_path)


@pytest.mark.parametrize("change, words", [
    (lambda images, labels: images, r"shape \(5, 28, 28\), expected \(5,\): is it another file"),
    (lambda images, labels: labels[:-1], "cut short: 4 bytes"),
    (lambda images, labels: labels + b"\0", "more bytes follow the 5"),
    (lambda images, labels: b"\0\0\x0c\x01" + labels[4:], "type code is 0x0c"),
])
def test_structural_errors_are_reported_before_the_checksum(tiny, tmp_path, change, words):
    labels = "train-labels-idx1-ubyte"
    bad = change(tiny.contents["train-images-idx3-ubyte"], tiny.contents[labels])
    put(tiny.contents | {labels: bad}, tmp_path)
    with pytest.raises(ValueError, match=f"{labels}: .*{words}"):
        datasets.load_mnist(tmp_path)


def openml_bunch():
    data = np.zeros((70000, 784))
    data[np.arange(70000), np.arange(70000) % 784] = np.arange(70000) % 256
    return types.SimpleNamespace(data=data, target=(np.arange(70000) % 7).astype(str).astype(object))


def test_without_files_mnist_comes_from_openml(tiny, tmp_path, monkeypatch):
    calls = []

    def fetch_openml(*args, **kwargs):
        calls.append((args, kwargs))
        return openml_bunch()

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch_openml)
    data = datasets.load_mnist(tmp_path)
    (args, kwargs), = calls
    assert args == ("mnist_784",) and kwargs["version"] == 1 and kwargs["as_frame"] is False
    assert kwargs["data_home"] == str(tmp_path)
    assert kwargs["parser"] == "liac-arff"  # "auto" and "pandas" need pandas
    assert data.train_images.shape == (60000, 1, 28, 28) and data.test_images.shape == (10000, 1, 28, 28)
    assert data.train_images.dtype == np.float32 and data.train_labels.dtype == np.int64
    numbers = np.arange(70000)
    images = np.concatenate([data.train_images, data.test_images]).reshape(70000, 784)
    np.testing.assert_allclose(images[numbers, numbers % 784], numbers % 256 / 255, rtol=1e-6)
    assert np.array_equal(np.concatenate([data.train_labels, data.test_labels]), numbers % 7)


@pytest.mark.parametrize("place, expected", [("", None), ("data", "data")])
def test_a_download_goes_to_the_data_folder_where_there_is_one(tiny, tmp_path, monkeypatch, place, expected):
    monkeypatch.setattr(sources, "__file__", str(tmp_path / "site-packages" / "rso_numba" / "sources.py"))
    Path(place).mkdir(exist_ok=True)
    homes = []

    def fetch_openml(*args, data_home, **kwargs):
        homes.append(data_home)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch_openml)
    with pytest.raises(FileNotFoundError):
        datasets.load_mnist()
    assert homes == [expected and str(Path(expected).resolve())]


def spoil_shape(bunch):
    bunch.data = bunch.data[:-1]


def spoil_target(bunch):
    bunch.target = bunch.target[:-1]


def spoil_label(bunch):
    bunch.target[5] = "A"


def spoil_pixel(value):
    def spoil(bunch):
        bunch.data[7, 8] = value
    return spoil


@pytest.mark.parametrize("spoil, words", [
    (spoil_shape, r"data \(69999, 784\)"), (spoil_target, r"target \(69999,\)"),
    (spoil_label, "labels .*'A'"),
    (spoil_pixel(256), "pixels"), (spoil_pixel(-1), "pixels"), (spoil_pixel(0.5), "pixels"),
    (spoil_pixel(np.nan), "pixels"),
])
def test_what_openml_sends_is_checked(tiny, tmp_path, monkeypatch, spoil, words):
    bunch = openml_bunch()
    spoil(bunch)
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", lambda *args, **kwargs: bunch)
    monkeypatch.setattr(sources, "__file__", str(tmp_path / "site-packages" / "rso_numba" / "sources.py"))
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "cache"))
    mend = f"; delete the folder {tmp_path / 'cache' / 'openml'} and try again"
    with pytest.raises(ValueError, match=f"OpenML sent MNIST .*{words}.*{mend}"):
        datasets.load_mnist()


def test_offline_and_without_files_the_error_says_what_to_put_where(tiny, tmp_path, monkeypatch):
    def fetch_openml(*args, **kwargs):
        raise urllib.error.URLError("name resolution failed")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch_openml)
    monkeypatch.setattr(sources, "__file__", str(tmp_path / "site-packages" / "rso_numba" / "sources.py"))
    for data_home, place in ((tmp_path, tmp_path), (None, Path("data").resolve())):
        with pytest.raises(FileNotFoundError) as caught:
            datasets.load_mnist(data_home)
        message = str(caught.value)
        for words in (*mnist.MNIST_FILES, mnist.MIRROR, f"into the folder {place}, ", "--data-home",
                      "digits28", "name resolution failed"):
            assert words in message
    place.mkdir()
    put(tiny.contents, place, ".gz", gzip.compress)  # as it says
    check_tiny(datasets.load_mnist(), tiny.values)


@pytest.mark.filterwarnings("error")
def test_scikit_learn_itself_offline_gives_the_same_error_without_its_own(monkeypatch, tmp_path):
    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("sklearn.datasets._openml.urlopen", urlopen)
    with pytest.raises(FileNotFoundError, match="no network") as caught:
        datasets.load_mnist(tmp_path)
    printed = "".join(traceback.format_exception(caught.value))
    assert "MNIST is not on this machine" in printed and "urlopen(" not in printed


def real_mnist_folder():
    root = Path(os.environ.get("RSO_NUMBA_DATA", "data"))
    for folder in (root, root / "mnist"):
        if all(list(folder.glob(name + "*")) for name in mnist.MNIST_FILES):
            return folder
    return None


@pytest.mark.skipif(real_mnist_folder() is None, reason="needs the four MNIST files in $RSO_NUMBA_DATA")
def test_real_mnist():
    data = datasets.load_mnist(real_mnist_folder())
    assert data.train_images.shape == (60000, 1, 28, 28) and data.test_images.shape == (10000, 1, 28, 28)
    assert data.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert data.test_labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(data.train_labels).tolist() == counts
    assert data.train_images.mean(dtype=np.float64) == pytest.approx(0.1306605, abs=1e-6)
    assert data.train_images.min() == 0 and data.train_images.max() == 1
