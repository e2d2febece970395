"""The handwriting: split without overlap, picked by class; random integers cover a range."""

import numpy as np

from mtl_jax.data.handwriting import Random, by_split


def test_train_and_test_come_from_different_handwriting():
  handwriting = by_split()
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
  for handwriting in by_split().values():
    picked = handwriting.pick(digit, Random("a test"))
    np.testing.assert_array_equal(target[picked], digit)
    assert len(set(picked)) > 200


def test_random_integers_cover_their_range():
  random = Random("a test")
  drawn = random.integers(-3, 4, (100, 100))
  assert drawn.shape == (100, 100) and drawn.dtype == np.int32
  counts = np.bincount(drawn.ravel() + 3)
  assert len(counts) == 8 and (abs(counts - 1250) < 200).all()
  np.testing.assert_array_equal(np.sort(random.permutation(1000)), np.arange(1000))
  noise = random.noise((100, 1024)) / 256
  assert noise.shape == (100, 1024) and abs(noise.mean()) < 0.01 and 0.38 < noise.std() < 0.43
