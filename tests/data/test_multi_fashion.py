"""Multi-Fashion: two garments where they belong, the same pairs everywhere, nothing shared."""

import hashlib
import pickle

import numpy as np
import pytest

from mtl_jax.data import multi_fashion as module
from mtl_jax.data.multi_fashion import multi_fashion
from mtl_jax.data.source import Label
from mtl_jax.errors import MissingData, UserError
from tests.data.test_idx import write

COUNTS = {"train": 40, "t10k": 10}


def garments():
  """Each a flat square of a brightness of its own: train of 1 to 40, test of 201 to 210."""
  shade = {"train": 1 + np.arange(40), "t10k": 201 + np.arange(10)}
  return {split: {"images": np.broadcast_to(shade[split][:, None, None], (count, 28, 28)
                                            ).astype(np.uint8),
                  "labels": (np.arange(count) % 10).astype(np.uint8)}
          for split, count in COUNTS.items()}


@pytest.fixture
def folder(tmp_path):
  write(tmp_path, garments(), zipped=True)
  return str(tmp_path)


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch, tmp_path):
  monkeypatch.setattr(module, "_INSTALLED", str(tmp_path / "not" / "installed"))


def source(folder, **arguments):
  return multi_fashion("unused", path=folder, **{"train_examples": 40, "test_examples": 10,
                                                 **arguments})


def test_garments_lie_in_their_corners_and_the_brighter_wins(folder):
  made = source(folder)
  assert made.labels == {"left": Label("class", 10, module.CLASSES),
                         "right": Label("class", 10, module.CLASSES)}
  assert tuple(made.augmentation) == () and made.origin.endswith(":40+10:0")
  for split, first in (("train", 1), ("test", 201)):
    columns = made.splits[split].arrays()
    image = columns["image"][..., 0]
    assert image.dtype == np.uint8 and image.shape[1:] == (36, 36)
    left, right = image[:, 0, 0], image[:, 35, 35]
    np.testing.assert_array_equal((left - first) % 10, columns["left"])
    np.testing.assert_array_equal((right - first) % 10, columns["right"])
    assert columns["left"].dtype == np.int32
    assert (image[:, :8, :28] == left[:, None, None]).all()
    assert (image[:, 28:, 8:] == right[:, None, None]).all()
    assert (image[:, 8:28, 8:28] == np.maximum(left, right)[:, None, None]).all()
    assert (image[:, :8, 28:] == 0).all() and (image[:, 28:, :8] == 0).all()


def test_every_garment_is_used_as_often_and_test_apart_from_train(folder):
  made = source(folder, train_examples=80, test_examples=5)
  train, test = (made.splits[split].arrays()["image"][..., 0] for split in ("train", "test"))
  for place in (0, 35):
    np.testing.assert_array_equal(np.sort(train[:, place, place]), np.repeat(1 + np.arange(40), 2))
    assert len(set(test[:, place, place])) == 5 and test[:, place, place].min() > 200


def test_pairs_follow_from_the_seed(folder):
  images = [source(folder, seed=seed).splits["train"].arrays()["image"] for seed in (0, 0, 1)]
  np.testing.assert_array_equal(images[0], images[1])
  assert (images[0] != images[2]).any()
  assert hashlib.sha256(images[0].tobytes()).hexdigest()[:16] == "6dd3b7ee48f7293f"


def test_the_right_garment_is_to_be_had_alone(folder):
  plain, made = source(folder), source(folder, reconstruct=True)
  assert made.labels["right_image"] == Label("map")
  for split in ("train", "test"):
    examples = made.splits[split]
    columns = examples.arrays()
    for name, column in plain.splits[split].arrays().items():
      np.testing.assert_array_equal(columns[name], column)
    alone = columns["right_image"]
    assert alone.dtype == np.float32 and alone.shape == (len(examples), 36, 36, 1)
    shade = columns["image"][:, 35:, 35:].astype(np.float32) / 255
    assert (alone[:, 8:, 8:] == shade).all()
    assert (alone[:, :8] == 0).all() and (alone[:, :, :8] == 0).all()
    for read in (examples, pickle.loads(pickle.dumps(examples))):
      for name, value in read[3].items():
        np.testing.assert_array_equal(value, columns[name][3])
        assert value.dtype == columns[name].dtype


def test_it_comes_from_tfds_where_that_has_it(tmp_path):
  from PIL import Image
  from tensorflow_datasets import features as kinds
  from tests.data.test_tfds import prepare

  def draw(i):
    return {"image": Image.fromarray(np.full((28, 28), i + 1, np.uint8)), "label": i % 10}

  prepare(tmp_path, "fashion_mnist", draw=draw, counts={"train": 40, "test": 10}, made=lambda: {
      "image": kinds.Image(shape=(28, 28, 1)), "label": kinds.ClassLabel(num_classes=10)})
  made = multi_fashion(tmp_path, train_examples=40, test_examples=10)
  assert made.origin == "multi_fashion:tfds:fashion_mnist:1.2.0:40+10:0"
  columns = made.splits["train"].arrays()
  np.testing.assert_array_equal((columns["image"][:, 0, 0, 0] - 1) % 10, columns["left"])


def test_the_installed_package_is_found(folder, monkeypatch):
  monkeypatch.setattr(module, "_INSTALLED", folder)
  assert len(multi_fashion("unused", train_examples=3, test_examples=2).splits["train"]) == 3


def test_missing_and_unfit_files_are_told(tmp_path, folder):
  with pytest.raises(MissingData, match="apt-get install dataset-fashion-mnist") as caught:
    multi_fashion(tmp_path / "empty")
  assert len(str(caught.value).splitlines()) == 2
  other = garments()
  other["t10k"]["labels"][0] = 10
  write(tmp_path, other, zipped=True)
  with pytest.raises(UserError, match="test: expected images of 28x28 of 10 classes, found 28x28"):
    source(folder)
  with pytest.raises(UserError, match="at least 1 of each, found 0 and 10"):
    source(folder, train_examples=0)
