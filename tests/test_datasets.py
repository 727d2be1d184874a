"""Data sets: what is accepted, what is refused with which words, and hostile files."""

import gzip
import hashlib
import os
import struct
import tracemalloc
import types
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets

from rso_numba import datasets
from rso_numba.datasets import Dataset, check_images, check_labels


def idx_bytes(array, magic=None, shape=None):
    """Return the content of an IDX file; `magic` and `shape` replace what the header would truly say."""
    shape = array.shape if shape is None else shape
    magic = bytes([0, 0, 8, len(shape)]) if magic is None else magic
    return magic + struct.pack(f">{len(shape)}i", *shape) + array.astype(np.uint8).tobytes()


def arrays(n_train=6, n_test=4, shape=(1, 3, 2), n_classes=3):
    rng = np.random.default_rng(0)
    return dict(train_images=rng.random((n_train, *shape), dtype=np.float32),
                train_labels=np.arange(n_train) % n_classes,
                test_images=rng.random((n_test, *shape), dtype=np.float32),
                test_labels=np.arange(n_test) % n_classes, n_classes=n_classes, name="toy")


# ---- check_images, check_labels, Dataset ----


def test_dataset_keeps_what_it_is_given():
    given = arrays()
    data = Dataset(**given)
    for field, value in given.items():
        assert np.array_equal(getattr(data, field), value)
    assert data.image_shape == (1, 3, 2)
    assert data.train_images is given["train_images"]  # no copy of a large array
    assert repr(data) == "Dataset('toy': 6 training and 4 test images of shape (1, 3, 2), 3 classes)"
    with pytest.raises(AttributeError):
        data.n_classes = 4


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_dataset_converts_floats_and_integers(dtype):
    given = arrays()
    data = Dataset(**given | dict(train_images=given["train_images"].astype(dtype),
                                  train_labels=given["train_labels"].astype(np.uint8)))
    assert data.train_images.dtype == np.float32 and data.train_images.dtype.isnative
    assert data.train_labels.dtype == np.int64 and data.train_labels.tolist() == [0, 1, 2, 0, 1, 2]
    np.testing.assert_allclose(data.train_images, given["train_images"], rtol=1e-3, atol=1e-6)


def test_images_become_contiguous():
    images = np.ones((4, 2, 3, 5), np.float32).transpose(0, 1, 3, 2)
    assert check_images(images).flags.c_contiguous


def test_pixels_that_are_not_numbers_are_counted_and_located():
    images = np.zeros((4, 1, 3, 2))
    images[2, 0, 1, 1] = np.nan
    images[3, 0, 0, 0] = -np.inf
    with pytest.raises(ValueError, match=r"test_images has 2 NaN.*first is nan at index \(2, 0, 1, 1\)"):
        Dataset(**arrays() | dict(test_images=images))
    images[2, 0, 1, 1] = 1e300  # finite as float64, but not as float32
    with pytest.raises(ValueError, match=r"images has 2 NaN or inf.*first is inf at index \(2, 0, 1, 1\)"):
        check_images(images)


@pytest.mark.parametrize("images, error, words", [
    (np.zeros((4, 3, 2)), ValueError, r"3 dimensions \(shape \(4, 3, 2\)\), expected 4.*images\[:, None\]"),
    (np.zeros((4, 6)), ValueError, "2 dimensions"),
    (np.float32(1), ValueError, "0 dimensions"),
    (np.zeros((0, 1, 3, 2)), ValueError, "is empty"),
    (np.zeros((4, 1, 0, 2)), ValueError, "is empty"),
    (np.zeros((4, 1, 2, 3)), ValueError, r"\(1, 2, 3\), expected \(1, 3, 2\)"),
    (np.zeros((4, 1, 3, 2), np.uint8), TypeError, "uint8.*divide by 255"),
    (np.zeros((4, 1, 3, 2), int), TypeError, "int64.*divide by 255"),
    (np.zeros((4, 1, 3, 2), bool), TypeError, "bool.*astype"),
    (np.zeros((4, 1, 3, 2), complex), TypeError, "complex128"),
    (np.full((4, 1, 3, 2), None), TypeError, "object"),
])
def test_unsuitable_images_are_refused(images, error, words):
    with pytest.raises(error, match=words):
        check_images(images, image_shape=(1, 3, 2))
    with pytest.raises(error, match="test_images.*" + words):
        Dataset(**arrays() | dict(test_images=images))


@pytest.mark.parametrize("labels, error, words", [
    ([0, 1, 2], ValueError, r"shape \(3,\).*each of 4 images"),
    (np.eye(4, dtype=int), ValueError, r"shape \(4, 4\).*argmax"),
    ([], ValueError, r"shape \(0,\)"),
    ([0, 1, 3, 4], ValueError, r"value 3 at 2, expected 0\.\.2"),
    ([0, -1, 2, 0], ValueError, r"value -1 at 1, expected 0\.\.2"),
    (np.array([0, 1, 2, 2**64 - 1], np.uint64), ValueError, "value 18446744073709551615 at 3"),
    ([0.0, 1.0, 2.0, 0.5], TypeError, r"float64.*0\.0.*astype"),
    ([True, False, True, False], TypeError, "bool"),
    (list("0120"), TypeError, "<U1.*'0'"),
])
def test_unsuitable_labels_are_refused(labels, error, words):
    with pytest.raises(error, match=words):
        check_labels(labels, 3, 4)
    with pytest.raises(error, match="test_labels.*" + words):
        Dataset(**arrays() | dict(test_labels=labels))


def test_zero_images_are_refused_with_zero_labels():
    with pytest.raises(ValueError, match="at least one"):
        check_labels(np.zeros(0, int), 3, 0)


@pytest.mark.parametrize("n_classes, error", [
    (1, ValueError), (-3, ValueError), (3.0, TypeError), (True, TypeError)])
def test_number_of_classes_is_checked(n_classes, error):
    with pytest.raises(error, match=f"n_classes is {n_classes}"):
        Dataset(**arrays() | dict(n_classes=n_classes))


def test_subset_draws_pairs_without_replacement():
    given = arrays(n_train=50, n_test=20, n_classes=50)
    data = Dataset(**given).subset(n_train=30, rng=0)
    assert len(set(data.train_labels.tolist())) == 30  # every label occurs once in the whole set
    assert data.train_labels.tolist() != list(range(30))
    assert np.array_equal(data.train_images, given["train_images"][data.train_labels])
    assert np.array_equal(data.test_images, given["test_images"])  # None keeps all, in order
    assert (data.n_classes, data.name) == (50, "toy")
    assert len(Dataset(**given).subset(n_test=20, rng=0).test_labels) == 20


def test_subset_is_seeded():
    data = Dataset(**arrays(n_train=50, n_test=20, n_classes=50))
    draw = [data.subset(10, 5, rng).train_labels.tolist() for rng in (0, 0, np.random.default_rng(0), 1)]
    assert draw[0] == draw[1] == draw[2] != draw[3]


@pytest.mark.parametrize("sizes, error, words", [
    (dict(n_train=7), ValueError, "n_train is 7, expected 1 to 6"),
    (dict(n_test=5), ValueError, "n_test is 5, expected 1 to 4"),
    (dict(n_train=0), ValueError, "n_train is 0"),
    (dict(n_train=2.0), TypeError, "n_train is 2.0, expected an integer"),
])
def test_subset_refuses_impossible_sizes(sizes, error, words):
    with pytest.raises(error, match=words):
        Dataset(**arrays()).subset(**sizes)


# ---- digits ----


def test_digits_are_a_stratified_split_of_the_bundled_set():
    data = datasets.load_digits()
    assert data.image_shape == (1, 8, 8) and data.n_classes == 10 and data.name == "digits"
    assert (len(data.train_images), len(data.test_images)) == (1437, 360)
    assert data.train_images.min() == 0 and data.train_images.max() == 1
    counts = np.bincount(data.test_labels, minlength=10)
    assert counts.min() >= 34 and counts.max() <= 37  # about a fifth of 174..183 of each digit
    bundled = sklearn.datasets.load_digits()
    pairs = {(image.tobytes(), label) for image, label in zip(
        (bundled.images / 16).astype(np.float32), bundled.target, strict=True)}
    loaded = {(image.tobytes(), label) for images, labels in (
        (data.train_images, data.train_labels), (data.test_images, data.test_labels))
        for image, label in zip(images, labels, strict=True)}
    assert loaded == pairs


def test_digits_of_size_28_show_the_same_pixels():
    small, large = datasets.load_digits(rng=3), datasets.load_digits(size=28, rng=3)
    assert large.image_shape == (1, 28, 28) and large.name == "digits28"
    assert np.array_equal(large.train_labels, small.train_labels)
    for row in range(3):
        for column in range(3):
            assert np.array_equal(large.train_images[:, :, 2 + row:26:3, 2 + column:26:3], small.train_images)
    border = np.ones((28, 28), bool)
    border[2:26, 2:26] = False
    assert not large.train_images[:, 0, border].any()


def test_digits_split_follows_the_seed():
    draw = [datasets.load_digits(rng=rng).test_labels.tolist() for rng in (0, 0, np.random.default_rng(0), 1)]
    assert draw[0] == draw[1] == draw[2] != draw[3]


@pytest.mark.parametrize("options, words", [
    (dict(size=16), "size is 16, expected 8.*28"),
    (dict(test_fraction=0), "test_fraction is 0,"),
    (dict(test_fraction=1.0), "test_fraction is 1.0"),
    (dict(test_fraction=360), "test_fraction is 360"),
    (dict(test_fraction=float("nan")), "test_fraction is nan"),
    (dict(test_fraction="0.2"), "test_fraction is '0.2'"),
])
def test_digits_refuse_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        datasets.load_digits(**options)


# ---- IDX files ----


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4)])
def test_read_idx_returns_what_was_written(tmp_path, shape, pack):
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape) + 200
    (tmp_path / "a").write_bytes(pack(idx_bytes(array)))
    result = datasets.read_idx(tmp_path / "a", expected_shape=shape, max_bytes=array.size)
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
    (idx_bytes(IMAGES, shape=HUGE), "2147483647, 2147483647, 2147483647.*over max_bytes=268435456"),
    (idx_bytes(IMAGES, shape=(2**14, 2**14)), "cut short: 24 bytes"),  # as large as is allowed
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
            datasets.read_idx(path)
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
        datasets.read_idx(tmp_path / "a.gz")


def test_a_gzip_bomb_is_not_unpacked(tmp_path):
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(idx_bytes(IMAGES) + bytes(64 * 2**20)))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="bomb.gz: more bytes follow the 24"):
            datasets.read_idx(tmp_path / "bomb.gz")
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


def test_read_idx_expects_the_shape_it_is_told(tmp_path):
    (tmp_path / "a").write_bytes(idx_bytes(IMAGES))
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\), expected \(2,\): is it another file"):
        datasets.read_idx(tmp_path / "a", expected_shape=(2,))


# ---- MNIST ----


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Make the loader expect four tiny files; return their contents, and stand where there is no data/."""
    rng = np.random.default_rng(0)
    shapes = ((5, 28, 28), (5,), (3, 28, 28), (3,))
    values = [rng.integers(0, 256 if len(shape) == 3 else 10, shape, dtype=np.uint8) for shape in shapes]
    values[0][0, 0, :2] = 0, 255
    contents = dict(zip(datasets.MNIST_FILES, map(idx_bytes, values), strict=True))
    table = {name: (value.shape, hashlib.sha256(contents[name]).hexdigest())
             for name, value in zip(contents, values, strict=True)}
    monkeypatch.setattr(datasets, "MNIST_FILES", table)
    monkeypatch.delenv("RSO_NUMBA_DATA", raising=False)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")

    def no_download(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", no_download)
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
@pytest.mark.parametrize("subfolder", ["", "mnist"])
def test_mnist_files_are_read_from_data_home(tiny, tmp_path, subfolder, end, pack):
    put(tiny.contents, tmp_path / "home" / subfolder, end, pack)
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
    monkeypatch.setattr(datasets, "__file__", str(tmp_path / "checkout" / "rso_numba" / "datasets.py"))
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


@pytest.mark.parametrize("name", list(datasets.MNIST_FILES))
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
    data = datasets.load_mnist(tmp_path / "home")
    (args, kwargs), = calls
    assert args == ("mnist_784",) and kwargs["version"] == 1 and kwargs["as_frame"] is False
    assert kwargs["data_home"] == str(tmp_path / "home")
    assert kwargs["parser"] == "liac-arff"  # "auto" and "pandas" need pandas
    assert data.train_images.shape == (60000, 1, 28, 28) and data.test_images.shape == (10000, 1, 28, 28)
    assert data.train_images.dtype == np.float32 and data.train_labels.dtype == np.int64
    numbers = np.arange(70000)
    images = np.concatenate([data.train_images, data.test_images]).reshape(70000, 784)
    np.testing.assert_allclose(images[numbers, numbers % 784], numbers % 256 / 255, rtol=1e-6)
    assert np.array_equal(np.concatenate([data.train_labels, data.test_labels]), numbers % 7)


@pytest.mark.parametrize("place, expected", [("", None), ("data", "data")])
def test_a_download_goes_to_the_data_folder_where_there_is_one(tiny, tmp_path, monkeypatch, place, expected):
    monkeypatch.setattr(datasets, "__file__", str(tmp_path / "site-packages" / "rso_numba" / "datasets.py"))
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
    with pytest.raises(ValueError, match=f"OpenML sent MNIST .*{words}.*; delete the folder openml in"):
        datasets.load_mnist(tmp_path)


def test_offline_and_without_files_the_error_says_what_to_put_where(tiny, tmp_path, monkeypatch):
    error = urllib.error.URLError("name resolution failed")

    def fetch_openml(*args, **kwargs):
        raise error

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch_openml)
    with pytest.raises(FileNotFoundError) as caught:
        datasets.load_mnist(tmp_path / "home")
    assert caught.value.__cause__ is error
    message = str(caught.value)
    for words in (*datasets.MNIST_FILES, f"{tmp_path / 'home'}\n", f"{tmp_path / 'home' / 'mnist'}\n",
                  "RSO_NUMBA_DATA", "name resolution failed", "load_digits"):
        assert words in message
    with pytest.raises(FileNotFoundError) as caught:
        datasets.load_mnist()
    assert str(tmp_path / "empty" / "data" / "mnist") + "\n" in str(caught.value)


@pytest.mark.filterwarnings("ignore:A network error occurred")
def test_scikit_learn_itself_offline_gives_the_same_error(monkeypatch, tmp_path):
    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("sklearn.datasets._openml.urlopen", urlopen)
    with pytest.raises(FileNotFoundError, match="no network"):
        datasets.load_mnist(tmp_path)


def real_mnist_folder():
    root = Path(os.environ.get("RSO_NUMBA_DATA", "data"))
    for folder in (root, root / "mnist"):
        if all(list(folder.glob(name + "*")) for name in datasets.MNIST_FILES):
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


# ---- load ----


def test_load_by_name(tiny, tmp_path):
    assert datasets.load("digits").image_shape == (1, 8, 8)
    assert datasets.load("digits28", data_home=tmp_path, test_fraction=0.5).image_shape == (1, 28, 28)
    assert len(datasets.load("digits28", test_fraction=0.5).test_images) == 899
    put(tiny.contents, tmp_path)
    check_tiny(datasets.load("mnist", tmp_path), tiny.values)


def test_load_refuses_unknown_names_and_options():
    with pytest.raises(ValueError, match="no data set 'minst', expected one of digits, digits28, mnist"):
        datasets.load("minst")
    with pytest.raises(TypeError, match="size"):
        datasets.load("mnist", size=8)
