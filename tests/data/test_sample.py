"""The bundled sample: CIFAR's schema, true labels, separate handwriting, the same bytes always."""

import functools
import hashlib

import numpy as np
import pytest

from mtl_jax.data import sample

NAMES = ("cifar10", "cifar100")
source = functools.cache(sample.digits)


@pytest.mark.parametrize("name", NAMES)
def test_schema_is_that_of_cifar(name):
  drawn = source(name)
  assert drawn.origin == "sample" and tuple(drawn.augmentation) == ()
  assert dict(drawn.labels) == sample.LABELS[name]
  assert {split: len(examples) for split, examples in drawn.splits.items()} == {
      "train": 10_000, "test": 2_000}
  for examples in drawn.splits.values():
    columns = examples.arrays()
    assert set(columns) == {"image", *drawn.labels}
    assert columns["image"].shape == (len(examples), 32, 32, 3)
    assert columns["image"].dtype == np.uint8
    for key, label in drawn.labels.items():
      assert columns[key].dtype == np.int32
      np.testing.assert_array_equal(
          np.bincount(columns[key], minlength=label.num_classes), len(examples) // label.num_classes)


def test_coarse_label_follows_from_the_number():
  for examples in source("cifar100").splits.values():
    columns = examples.arrays()
    np.testing.assert_array_equal(columns["coarse_label"], columns["label"] // 5)


@pytest.mark.parametrize("name, train, test", [
    ("cifar10", "bb9b8bad4517d008", "c9ad5d678ca8f323"),
    ("cifar100", "336a9e8dda012466", "adb2802abb7dec60"),
])
def test_every_machine_draws_the_same_bytes(name, train, test):
  for split, expected in (("train", train), ("test", test)):
    columns = source(name).splits[split].arrays()
    found = hashlib.sha256()
    for key in sorted(columns):
      found.update(columns[key][:500].tobytes())
    assert found.hexdigest()[:16] == expected, split


def test_drawing_again_changes_nothing():
  again = sample.digits("cifar10").splits["test"].arrays()
  for key, column in source("cifar10").splits["test"].arrays().items():
    np.testing.assert_array_equal(again[key], column)


def test_train_and_test_come_from_different_handwriting():
  handwriting = sample._handwriting()
  for digit in range(10):
    train, test = (handwriting[split].by_class[digit] for split in ("train", "test"))
    assert not set(train) & set(test)
    assert 4 * len(test) < len(train) < 6 * len(test)
  everything = np.concatenate([i for part in handwriting.values() for i in part.by_class])
  np.testing.assert_array_equal(np.sort(everything), np.arange(1797))


def test_handwriting_is_of_the_digit_that_was_asked_for():
  from sklearn.datasets import load_digits
  target = load_digits().target
  digit = np.arange(1000) % 10
  for handwriting in sample._handwriting().values():
    picked = handwriting.pick(digit, sample._Random("a test"))
    np.testing.assert_array_equal(target[picked], digit)
    assert len(set(picked)) > 200


def test_the_left_digit_is_the_tens():
  """A one has less ink than an eight, on its own side."""
  handwriting = sample._handwriting()["test"]
  ink = {number: sample._draw_two(handwriting, np.full(64, number), sample._Random("a test"))
         .reshape(-1, 32, 32).astype(np.int64) for number in (18, 81)}
  left = {number: i[:, :, :15].sum() for number, i in ink.items()}
  right = {number: i[:, :, 16:].sum() for number, i in ink.items()}
  assert left[81] > left[18] and right[18] > right[81]


def test_digits_stay_within_the_image():
  """Almost no ink touches the edge, of one digit or of two."""
  handwriting = sample._handwriting()["train"]
  for draw, classes in ((sample._draw_one, 10), (sample._draw_two, 100)):
    ink = draw(handwriting, np.arange(1000) % classes, sample._Random("a test"))
    ink = ink.reshape(-1, 32, 32) > 32
    assert ink[:, 1:-1, 1:-1].sum() > 0.99 * ink.sum()
    assert ink.any((1, 2)).all()


def test_random_integers_cover_their_range():
  random = sample._Random("a test")
  drawn = random.integers(-3, 4, (100, 100))
  assert drawn.shape == (100, 100) and drawn.dtype == np.int32
  counts = np.bincount(drawn.ravel() + 3)
  assert len(counts) == 8 and (abs(counts - 1250) < 200).all()
  np.testing.assert_array_equal(np.sort(random.permutation(1000)), np.arange(1000))
  noise = random.noise((100, 1024)) / 256
  assert noise.shape == (100, 1024) and abs(noise.mean()) < 0.01 and 0.38 < noise.std() < 0.43


def test_unknown_name_lists_the_known():
  with pytest.raises(ValueError, match="cifar10 or cifar100, found 'mnist'"):
    sample.digits("mnist")
