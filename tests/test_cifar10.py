"""CIFAR-10: damaged, short, swapped and missing files, pickles, and the download."""

import hashlib
import os
import pickle
import types
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets

from rso_numba import cifar10, datasets, sources
from rso_numba.__main__ import main

N = 20  # images of a file, here
NAMES = list(cifar10.CIFAR10_FILES)


@pytest.fixture
def tiny(monkeypatch, nowhere, tmp_path):
    """Make the loader expect six files of 20 images; return them, and stand where there is no data/."""
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (6, N, 3073), dtype=np.uint8)
    records[:, :, 0] %= 10
    records[0, 0, 1:3] = 0, 255
    contents = {name: part.tobytes() for name, part in zip(NAMES, records, strict=True)}
    monkeypatch.setattr(cifar10, "IMAGES", N)
    monkeypatch.setattr(cifar10, "CIFAR10_FILES",
                        {name: hashlib.md5(content).hexdigest() for name, content in contents.items()})
    monkeypatch.setattr(sources, "__file__", str(tmp_path / "site-packages" / "rso_numba" / "sources.py"))
    return types.SimpleNamespace(contents=contents, records=records)


def put(contents, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def check_tiny(data, records):
    assert data.name == "cifar10" and data.n_classes == 10 and data.image_shape == (3, 32, 32)
    assert data.train_images.dtype == np.float32 and data.train_images[0, 0, 0, :2].tolist() == [0.0, 1.0]
    train, test = records[:5].reshape(-1, 3073), records[5]
    for images, labels, part in ((data.train_images, data.train_labels, train),
                                 (data.test_images, data.test_labels, test)):
        pixels = part[:, 1:].reshape(-1, 3, 32, 32).astype(np.float32) / np.float32(255)
        assert np.array_equal(images, pixels) and np.array_equal(labels, part[:, 0])


@pytest.mark.parametrize("folder", ["", "cifar10", "cifar-10-batches-bin"])
def test_files_are_read_from_data_home(tiny, tmp_path, monkeypatch, folder):
    put(tiny.contents, tmp_path / "home" / folder)
    check_tiny(datasets.load_cifar10(tmp_path / "home"), tiny.records)
    monkeypatch.setenv("RSO_NUMBA_DATA", str(tmp_path / "home"))
    check_tiny(datasets.load("cifar10"), tiny.records)


@pytest.mark.filterwarnings("ignore:train_images lie in")
def test_an_image_has_its_red_rows_first(tiny, tmp_path):
    record = np.zeros((N, 3073), np.uint8)
    record[:, 1:4] = 255
    record[7, 1 + 1024 + 3 * 32 + 5] = 51  # green, row 3, column 5
    content = record.tobytes()
    cifar10.CIFAR10_FILES["test_batch.bin"] = hashlib.md5(content).hexdigest()
    put(tiny.contents | {"test_batch.bin": content}, tmp_path)
    images = datasets.load_cifar10(tmp_path).test_images
    assert np.argwhere(images[:, 1:]).tolist() == [[7, 0, 3, 5]] and images[7, 1, 3, 5] == np.float32(0.2)


@pytest.mark.parametrize("name", [NAMES[0], NAMES[3], NAMES[5]])
@pytest.mark.parametrize("change, words", [
    (lambda content: content[:-1], "cut short, 61459 bytes, expected 61460"),
    (lambda content: b"", "cut short, 0 bytes"),
    (lambda content: content + b"\0", "too long, more than 61460 bytes"),
    (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "its MD5 is .*damaged, or of another data set"),
])
def test_a_damaged_file_is_named(tiny, tmp_path, name, change, words):
    put(tiny.contents | {name: change(tiny.contents[name])}, tmp_path)
    with pytest.raises(ValueError, match=f"{name}: {words}.*cifar-10-binary"):
        datasets.load_cifar10(tmp_path)


def test_swapped_files_are_named(tiny, tmp_path):
    put(tiny.contents | {NAMES[1]: tiny.contents[NAMES[5]], NAMES[5]: tiny.contents[NAMES[1]]}, tmp_path)
    with pytest.raises(ValueError, match=f"{NAMES[1]}: .*this is {NAMES[5]} under another name"):
        datasets.load_cifar10(tmp_path)


def test_missing_files_are_named(tiny, tmp_path):
    put({name: tiny.contents[name] for name in NAMES[:4]}, tmp_path / "cifar10")
    with pytest.raises(FileNotFoundError, match=f"cifar10 lacks {NAMES[4]}, {NAMES[5]}; put all six"):
        datasets.load_cifar10(tmp_path)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("opened",)


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-py"])
def test_pickles_are_not_opened(tiny, tmp_path, folder):
    put({name.removesuffix(".bin"): pickle.dumps(Trap()) for name in NAMES}, tmp_path / "home" / folder)
    with pytest.raises(FileNotFoundError, match="pickles.*get the binary version, https.*cifar-10-binary"):
        datasets.load_cifar10(tmp_path / "home")
    assert not Path("opened").exists()
    put(tiny.contents, tmp_path / "home" / "cifar-10-batches-bin")  # as it says
    check_tiny(datasets.load_cifar10(tmp_path / "home"), tiny.records)


@pytest.mark.parametrize("order", [range(6), (5, 0, 1, 2, 3, 4)], ids=str)
def test_without_files_it_comes_from_openml_in_whichever_order(tiny, tmp_path, monkeypatch, order):
    records = tiny.records[list(order)].reshape(-1, 3073)
    bunch = types.SimpleNamespace(data=records[:, 1:].astype(float), target=records[:, 0].astype(str))

    def fetch_openml(name, version, **arguments):
        assert name == "CIFAR_10" and version == 1 and arguments["data_home"] == str(tmp_path)
        return bunch

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch_openml)
    check_tiny(datasets.load_cifar10(tmp_path), tiny.records)
    bunch.data[3, 3] = 255 - bunch.data[3, 3]
    with pytest.raises(ValueError, match="other images, or in another order.*delete the folder.*get those"):
        datasets.load_cifar10(tmp_path)


def test_offline_and_without_files_the_error_says_what_to_put_where(tiny, tmp_path, monkeypatch, capsys):
    def fetch_openml(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch_openml)
    with pytest.raises(FileNotFoundError) as caught:
        datasets.load_cifar10(tmp_path)
    for words in (*NAMES, cifar10.ARCHIVE, f"into the folder {tmp_path}, ", "--data-home", "no network"):
        assert words in str(caught.value)
    assert main(["compare", "--data", "cifar10", "--data-home", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("rso-numba: error: CIFAR-10 is not on this machine")


def test_info_counts_the_files(tiny, tmp_path, monkeypatch, capsys):
    put({NAMES[0]: tiny.contents[NAMES[0]]}, tmp_path / "cifar10")
    monkeypatch.setenv("RSO_NUMBA_DATA", str(tmp_path))
    assert main(["info"]) == 0
    assert f"{tmp_path / 'cifar10'} has 1 of the 6 files of CIFAR-10" in capsys.readouterr().out


def real_folder():
    root = Path(os.environ.get("RSO_NUMBA_DATA", "data"))
    for folder in cifar10.FOLDERS:
        if all((root / folder / name).is_file() for name in NAMES):
            return root / folder
    return None


@pytest.mark.skipif(real_folder() is None, reason="needs the six CIFAR-10 files in $RSO_NUMBA_DATA")
def test_real_cifar10():
    data = datasets.load_cifar10(real_folder())
    assert data.train_images.shape == (50000, 3, 32, 32) and data.test_images.shape == (10000, 3, 32, 32)
    assert data.train_labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert data.test_labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert np.bincount(data.train_labels).tolist() == [5000] * 10
    mean = data.train_images.mean((0, 2, 3), dtype=np.float64)
    np.testing.assert_allclose(mean, [0.49140, 0.48216, 0.44653], atol=1e-5)
