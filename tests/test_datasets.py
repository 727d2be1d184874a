"""Data sets: what is accepted, and what is refused or warned of with which words."""

import re
import warnings

import numpy as np
import pytest
import sklearn.datasets

from rso_numba import datasets
from rso_numba.datasets import Dataset, check_images, check_labels


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
    (np.full((4, 1, 3, 2), 255, np.uint8), TypeError, "uint8.*divide by 255"),
    (np.full((4, 1, 3, 2), 200), TypeError, "int64.*divide by 255"),
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
    (np.eye(4, 3, dtype=int), ValueError, r"shape \(4, 3\).*at least one\)$"),  # the last row is of zeros
    (np.eye(4, dtype=int), ValueError, r"shape \(4, 4\).*at least one\)$"),
    (np.full((4, 3), 1 / 3), ValueError, r"shape \(4, 3\).*at least one\)$"),
    ([], ValueError, r"shape \(0,\)"),
    ([0, 1, 3, 4], ValueError, r"value 3 at 2, expected 0\.\.2.*, set n_classes to 5 or more$"),
    ([0, -1, 2, 0], ValueError, r"value -1 at 1, expected 0\.\.2.*from 0 \(in training and test\)$"),
    (np.array([0, 1, 2, 2**64 - 1], np.uint64), ValueError, "value 18446744073709551615 at 3"),
    ([0.0, 1.0, 2.0, 0.5], TypeError, r"float64.*0\.0.*number the classes from 0$"),
    ([0.0, 1.0, 2.0, np.nan], TypeError, "number the classes from 0$"),
    (["ant", "bee", "cat", "ant"], TypeError, "number the classes from 0$"),
    ([True, False, True, False], TypeError, "bool"),
    (list("0120"), TypeError, "<U1.*'0'"),
])
def test_unsuitable_labels_are_refused(labels, error, words):
    with pytest.raises(error, match=words):
        check_labels(labels, 3, 4)
    with pytest.raises(error, match="test_labels.*" + words):
        Dataset(**arrays() | dict(test_labels=labels))


COUNT = np.array([0, 1, 2, 0])


@pytest.mark.parametrize("labels", [
    COUNT[:, None], COUNT[None], COUNT[:, None, None], np.eye(3)[COUNT], np.eye(3, dtype=bool)[COUNT],
    COUNT.astype(float), COUNT.astype(str), COUNT.astype(str).astype(object),
], ids=lambda labels: f"{labels.dtype}{labels.shape}")
def test_the_advice_for_labels_is_right(labels):
    with pytest.raises((ValueError, TypeError)) as caught:
        check_labels(labels, 3, 4)
    advice = re.search(r"labels\.\w+\(.*\)$", str(caught.value)).group()
    assert np.array_equal(check_labels(eval(advice), 3, 4), COUNT)


PICTURES = np.linspace(0, 1, 4 * 3 * 5 * 7).reshape(4, 3, 5, 7)


@pytest.mark.parametrize("images, expected", [
    ((PICTURES * 255).astype(np.uint8), PICTURES), ((PICTURES * 16).astype(np.uint8), PICTURES),
    ((PICTURES * 65535).astype(np.uint16), PICTURES), ((PICTURES * 100).astype(int), PICTURES * 100 / 255),
    ((PICTURES * 3).astype(int), PICTURES), (PICTURES > 0.5, PICTURES > 0.5),
    (PICTURES[1], PICTURES[1:2]), (PICTURES.transpose(0, 2, 3, 1), PICTURES),
], ids=lambda images: f"{images.dtype}{images.shape}")
def test_the_advice_for_images_is_right(images, expected):
    with pytest.raises((ValueError, TypeError)) as caught:
        check_images(images, (3, 5, 7))
    mended = check_images(eval(re.search(r"images(\.|\[).*$", str(caught.value)).group()), (3, 5, 7))
    np.testing.assert_allclose(mended, expected, atol=0 if images.dtype.kind in "bf" else 1 / images.max(),
                               rtol=1e-6)


def test_zero_images_are_refused_with_zero_labels():
    with pytest.raises(ValueError, match="at least one"):
        check_labels(np.zeros(0, int), 3, 0)


@pytest.mark.parametrize("n_classes, error", [
    (1, ValueError), (-3, ValueError), (3.0, TypeError), (True, TypeError)])
def test_number_of_classes_is_checked(n_classes, error):
    with pytest.raises(error, match=f"n_classes is {n_classes}"):
        Dataset(**arrays() | dict(n_classes=n_classes))


def standardized(images):
    return (images - images.mean()) / images.std()


def same(images):
    return images


@pytest.mark.parametrize("train, test, words", [
    (same, same, None),
    (standardized, standardized, None),
    (lambda x: 2 * x - 1, lambda x: 2 * x - 1, None),
    (lambda x: x - x.mean(axis=0), lambda x: x - x.mean(axis=0), None),
    (lambda x: x * np.float32(1.0000002), same, None),
    (same, lambda x: x / 3, None),  # darker
    (same, lambda x: 0 * x, None),
    (lambda x: 1.1 * x - 0.05, same, None),  # images that were turned overshoot a little
    (lambda x: 16 * x, lambda x: 15 * x, "expected 0..1; divide by 16, both"),
    (lambda x: 255 * x, lambda x: 254 * x, r"train_images lie in 0\.\.255 and .*; divide by 255, both"),
    (lambda x: 2.5 * x, lambda x: 2.5 * x, "divide by 3, both"),
    (same, lambda x: 255 * x, r"train_images lie in 0\.\.1 and test_images in 0\.\.255: .*not scaled alike"),
    (lambda x: 255 * x, same, "not scaled alike"),
    (same, lambda x: x / 255, "not scaled alike"),  # twice
    (standardized, same, "not scaled alike"),
    (same, standardized, "not scaled alike"),
])
def test_images_of_an_unlikely_range_are_warned_of_once(digits, train, test, words):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = Dataset(train(digits.train_images), digits.train_labels,
                       test(digits.test_images), digits.test_labels, 10)
        data.subset(20, 20, rng=0)
    if words is None:
        assert not caught
    else:
        (warning,) = caught
        assert re.search(words, str(warning.message)) and warning.filename == __file__


@pytest.mark.parametrize("shape, is_warned_of", [
    ((32, 32, 3), True), ((28, 28, 1), True), ((48, 64, 4), True),
    ((3, 32, 32), False), ((1, 8, 8), False), ((16, 4, 4), False), ((1, 3, 2), False)])
def test_channels_behind_the_pixels_are_warned_of(shape, is_warned_of):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = Dataset(**arrays(shape=shape))
    assert [bool(re.search(r"images\.transpose\(0, 3, 1, 2\)$", str(warning.message)))
            for warning in caught] == [True] * is_warned_of
    if is_warned_of:  # as it says
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            moved = [images.transpose(0, 3, 1, 2) for images in (data.train_images, data.test_images)]
            Dataset(moved[0], data.train_labels, moved[1], data.test_labels, 3)


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


# ---- load ----


def test_load_by_name(tmp_path):
    assert datasets.load("digits").image_shape == (1, 8, 8)
    assert datasets.load("digits28", data_home=tmp_path, test_fraction=0.5).image_shape == (1, 28, 28)
    assert len(datasets.load("digits28", test_fraction=0.5).test_images) == 899


def test_load_refuses_unknown_names_and_options():
    with pytest.raises(ValueError, match="no data set 'minst', expected one of digits, digits28, mnist"):
        datasets.load("minst")
    with pytest.raises(TypeError, match="size"):
        datasets.load("mnist", size=8)
