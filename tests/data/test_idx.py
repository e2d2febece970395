"""IDX files in the true format: read, gzipped or not, and refused where they are not whole."""

import gzip
import pathlib
import struct

import numpy as np
import pytest

from mtl_jax.data.idx import idx
from mtl_jax.data.source import Label
from mtl_jax.errors import UserError

SIZES = {"train": 50, "t10k": 20}
SHAPE = (7, 5)


INSTALLED = pathlib.Path("/usr/share/datasets/fashion-mnist")  # of dataset-fashion-mnist


def encoded(array: np.ndarray) -> bytes:
  """As http://yann.lecun.com/exdb/mnist describes it: 0, 0, type 8, axes; sizes, most significant
  byte first; the bytes."""
  return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def made(seed: int = 0, shape=SHAPE) -> dict[str, dict[str, np.ndarray]]:
  rng = np.random.default_rng(seed)
  return {split: {"images": rng.integers(0, 256, (size, *shape), np.uint8),
                  "labels": (np.arange(size) % 10).astype(np.uint8)}
          for split, size in SIZES.items()}


def write(folder: pathlib.Path, arrays, *, name="{split}-{part}-idx{axes}-ubyte", zipped=False):
  for split, parts in arrays.items():
    for part, array in parts.items():
      content = encoded(array)
      file = folder / (name.format(split=split, part=part, axes=array.ndim) + ".gz" * zipped)
      file.write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", [
    "{split}-{part}-idx{axes}-ubyte", "{split}-{part}.idx{axes}-ubyte",
    "emnist-letters-{split}-{part}-idx{axes}-ubyte"])
def test_reads_what_was_written(tmp_path, name, zipped):
  arrays = made()
  write(tmp_path, arrays, name=name, zipped=zipped)
  source = idx("unused", download=False, path=str(tmp_path))
  assert source.origin == f"idx:{tmp_path.name}" and source.labels == {"label": Label("class", 10)}
  assert {split: len(examples) for split, examples in source.splits.items()} == {
      "train": 50, "test": 20}
  for split, examples in source.splits.items():
    columns, written = examples.arrays(), arrays["t10k" if split == "test" else split]
    assert columns["image"].dtype == np.uint8 and columns["label"].dtype == np.int32
    np.testing.assert_array_equal(columns["image"], written["images"][..., None])
    np.testing.assert_array_equal(columns["label"], written["labels"])
    np.testing.assert_array_equal(examples[3]["image"], written["images"][3, ..., None])


def test_test_files_may_be_called_test(tmp_path):
  arrays = made()
  write(tmp_path, {"train": arrays["train"], "test": arrays["t10k"]})
  assert len(idx("", path=str(tmp_path)).splits["test"]) == 20


def test_of_twins_the_one_that_is_not_zipped_is_read(tmp_path):
  write(tmp_path, made(0))
  write(tmp_path, made(1), zipped=True)
  image = idx("", path=str(tmp_path)).splits["train"][0]["image"]
  np.testing.assert_array_equal(image[..., 0], made(0)["train"]["images"][0])


def test_classes_are_counted_over_train_and_test(tmp_path):
  arrays = made()
  arrays["t10k"]["labels"][0] = 26
  write(tmp_path, arrays)
  assert idx("", path=str(tmp_path)).labels["label"].num_classes == 27


@pytest.mark.parametrize("damage, words", [
    (lambda content: b"", "found nothing"),
    (lambda content: content[:10], "begins with 00000803, found 00000803"),
    (lambda content: content[:-1], r"hold \[50, 7, 5\], 1750 bytes after its header, found 1749"),
    (lambda content: content + b"\0", "found 1751"),
    (lambda content: b"\0\0\x0d\3" + content[4:], "found 00000d03"),  # floats
    (lambda content: b"\0\0\x08\1" + content[4:], "with 3 axes, .* found 00000801"),
    (lambda content: b"<html>not found</html>", "found 3c68746d"),
    (lambda content: b"\0\0\x08\3" + b"\xff" * 12 + content[16:], "hold .4294967295, 4294967295"),
    (lambda content: gzip.compress(content)[:-20], "to be readable"),
    (lambda content: b"\x1f\x8b" + content, "to be readable"),
])
def test_a_damaged_file_is_named(tmp_path, damage, words):
  write(tmp_path, made())
  path = tmp_path / "train-images-idx3-ubyte"
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(UserError, match=words) as caught:
    idx("", path=str(tmp_path))
  assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) <= 2


def test_counts_and_sizes_that_do_not_fit_are_refused(tmp_path):
  arrays = made()
  arrays["train"]["labels"] = arrays["train"]["labels"][:-1]
  write(tmp_path, arrays)
  with pytest.raises(UserError, match="as many images as labels, found 50 in .*\nand 49 in "):
    idx("", path=str(tmp_path))
  write(tmp_path, {"train": made()["train"], "t10k": made(shape=(7, 6))["t10k"]})
  with pytest.raises(UserError, match="images of one size"):
    idx("", path=str(tmp_path))


def test_what_is_missing_is_named(tmp_path):
  with pytest.raises(UserError, match="path: expected a folder of IDX files, found none given"):
    idx("")
  with pytest.raises(UserError, match="found nothing there"):
    idx("", path=str(tmp_path / "nowhere"))
  with pytest.raises(UserError, match="expected train-images-idx3-ubyte or"):
    idx("", path=str(tmp_path))
  write(tmp_path, made())
  with pytest.raises(UserError, match="found a file"):
    idx("", path=str(tmp_path / "t10k-labels-idx1-ubyte"))
  (tmp_path / "t10k-labels-idx1-ubyte").unlink()
  with pytest.raises(UserError, match=r"expected test-labels-idx1-ubyte or .*\(nor t10k-…\)"):
    idx("", path=str(tmp_path))


def test_two_data_sets_in_one_folder_are_refused(tmp_path):
  write(tmp_path, made())
  write(tmp_path, made(), name="emnist-digits-{split}-{part}-idx{axes}-ubyte")
  with pytest.raises(UserError, match="found those of emnist-digits-, no prefix"):
    idx("", path=str(tmp_path))


@pytest.mark.skipif(not INSTALLED.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_itself():
  source = idx("", path=str(INSTALLED))
  train, test = (source.splits[split].arrays() for split in ("train", "test"))
  assert train["image"].shape == (60_000, 28, 28, 1) and test["image"].shape == (10_000, 28, 28, 1)
  for columns in (train, test):
    np.testing.assert_array_equal(np.bincount(columns["label"]), len(columns["label"]) // 10)
  # The mean and the first labels that are widely quoted.
  assert abs(train["image"].mean() / 255 - 0.2860) < 5e-5
  assert train["label"][:5].tolist() == [9, 0, 0, 3, 0]
  assert test["label"][:5].tolist() == [9, 2, 1, 1, 6]
