"""The bundled sample: CIFAR's schema, true labels, separate handwriting, the same bytes always."""

import functools
import hashlib

import numpy as np
import pytest

from mtl_jax.data import sample
from mtl_jax.data.handwriting import Random, by_split

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


def test_the_left_digit_is_the_tens():
  """A one has less ink than an eight, on its own side."""
  handwriting = by_split()["test"]
  ink = {number: sample._draw_two(handwriting, np.full(64, number), Random("a test"))
         .reshape(-1, 32, 32).astype(np.int64) for number in (18, 81)}
  left = {number: i[:, :, :15].sum() for number, i in ink.items()}
  right = {number: i[:, :, 16:].sum() for number, i in ink.items()}
  assert left[81] > left[18] and right[18] > right[81]


def test_digits_stay_within_the_image():
  """Almost no ink touches the edge, of one digit or of two."""
  handwriting = by_split()["train"]
  for draw, classes in ((sample._draw_one, 10), (sample._draw_two, 100)):
    ink = draw(handwriting, np.arange(1000) % classes, Random("a test"))
    ink = ink.reshape(-1, 32, 32) > 32
    assert ink[:, 1:-1, 1:-1].sum() > 0.99 * ink.sum()
    assert ink.any((1, 2)).all()


def test_unknown_name_lists_the_known():
  with pytest.raises(ValueError, match="cifar10 or cifar100, found 'mnist'"):
    sample.digits("mnist")
