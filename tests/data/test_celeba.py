"""CelebA in the authors' layout, flat and in folders, and in Kaggle's."""

import pathlib
import pickle

import numpy as np
import pytest

from mtl_jax.data.celeba import celeba
from mtl_jax.data.source import Label
from mtl_jax.errors import MissingData, UserError

ATTRIBUTES = ("5_o_Clock_Shadow", "Bald", "Smiling")
POINTS = ("lefteye_x", "lefteye_y", "nose_x", "nose_y")
N = 12
SPLIT = [0] * 7 + [1] * 2 + [2] * 3
LAYOUTS = ("flat", "authors", "kaggle")


def flag(row: int, column: int) -> int:
  return (row >> column) & 1


def names() -> list[str]:
  return [f"{row + 1:06d}.jpg" for row in range(N)]


def write(root: pathlib.Path, layout: str = "flat", landmarks: bool = False) -> pathlib.Path:
  """Twelve faces of 178x218, each of one shade; rows as published. Returns the images' folder."""
  from PIL import Image
  folder = root / {"flat": "img_align_celeba", "authors": "Img/img_align_celeba",
                   "kaggle": "img_align_celeba/img_align_celeba"}[layout]
  folder.mkdir(parents=True)
  for row, name in enumerate(names()):
    Image.new("RGB", (178, 218), (20 * row, 100, 30)).save(folder / name, quality=95)
  tables = {
      "list_attr_celeba": (ATTRIBUTES, [[2 * flag(row, c) - 1 for c in range(3)]
                                        for row in range(N)]),
      "list_eval_partition": (("partition",), [[split] for split in SPLIT]),
  }
  if landmarks:
    tables["list_landmarks_align_celeba"] = (POINTS, [[89, 109, row, 218] for row in range(N)])
  for table, (header, rows) in tables.items():
    if layout == "kaggle":
      lines = [",".join(["image_id", *header])] + [
          ",".join([name, *map(str, row)]) for name, row in zip(names(), rows)]
      (root / f"{table}.csv").write_text("\n".join(lines) + "\n")
      continue
    lines = [] if table == "list_eval_partition" else [str(N), " ".join(header) + " "]
    lines += [f"{name} " + " ".join(f"{value:2d}" for value in row)
              for name, row in zip(names(), rows)]
    place = root / ("" if layout == "flat" else
                    "Eval" if table == "list_eval_partition" else "Anno")
    place.mkdir(exist_ok=True)
    (place / f"{table}.txt").write_text("\n".join(lines) + "\n")
  return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attributes_are_one_label_and_forty(tmp_path, layout):
  write(tmp_path, layout)
  source = celeba("unused", download=False, path=str(tmp_path))
  assert source.origin == "celeba:12" and tuple(source.augmentation) == ("flip",)
  assert {split: len(examples) for split, examples in source.splits.items()} == {
      "train": 7, "validation": 2, "test": 3}
  assert source.labels == {"attributes": Label("binary", None, ATTRIBUTES),
                           **{name: Label("class", 2, ("no", "yes")) for name in ATTRIBUTES}}
  row = 0
  for split in ("train", "validation", "test"):
    examples = source.splits[split]
    for k in range(len(examples)):
      example = examples[k]
      assert example["image"].shape == (64, 64, 3) and example["image"].dtype == np.uint8
      assert abs(example["image"].astype(int) - [20 * row, 100, 30]).max() <= 3
      expected = [flag(row, column) for column in range(3)]
      np.testing.assert_array_equal(example["attributes"], expected)
      assert [int(example[name]) for name in ATTRIBUTES] == expected
      assert example["attributes"].dtype == example["Bald"].dtype == np.int32
      row += 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_landmarks_are_fractions_and_forbid_flips(tmp_path, layout):
  write(tmp_path, layout, landmarks=True)
  source = celeba("", path=str(tmp_path), size=(24, 16))
  assert source.labels["landmarks"] == Label("number", None, POINTS) and source.augmentation == ()
  columns = source.splits["train"].arrays()
  assert columns["image"].shape == (7, 24, 16, 3)
  np.testing.assert_allclose(columns["landmarks"], [[0.5, 0.5, row / 178, 1] for row in range(7)])
  assert columns["landmarks"].dtype == np.float32


def test_arrays_are_the_examples_and_travel_to_other_processes(tmp_path):
  write(tmp_path)
  examples = celeba(tmp_path.parent, path=str(tmp_path)).splits["train"]
  for read in (examples, pickle.loads(pickle.dumps(examples))):
    for name, column in read.arrays().items():
      np.testing.assert_array_equal(np.stack([read[k][name] for k in range(7)]), column)


def test_it_is_found_in_the_data_dir(tmp_path):
  with pytest.raises(MissingData, match=f"CelebA in {tmp_path}/celeba, found no such folder"):
    celeba(tmp_path)
  write(tmp_path / "celeba")
  assert len(celeba(tmp_path).splits["test"]) == 3


def test_lists_in_another_order_are_joined_by_name(tmp_path):
  write(tmp_path)
  path = tmp_path / "list_eval_partition.txt"
  path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
  examples = celeba("", path=str(tmp_path)).splits["test"]
  np.testing.assert_array_equal(examples.arrays()["Smiling"], [flag(row, 2) for row in (9, 10, 11)])


ATTR, PART = "list_attr_celeba.txt", "list_eval_partition.txt"


@pytest.mark.parametrize("file, damage, words", [
    (ATTR, lambda text: text.replace("12\n", "13\n", 1), "to list 13, found 12 rows"),
    (ATTR, lambda text: text.replace("-1", " 7", 1), "one of -1, 0, 1 .*found 7 for 000001.jpg"),
    (ATTR, lambda text: text.replace("-1", " x", 1), "whole numbers in .*list_attr"),
    (ATTR, lambda text: text.replace("-1", "", 1), "whole numbers in .*list_attr"),
    (ATTR, lambda text: text.replace("Bald ", "", 1), "expected 2 numbers .* found 3 numbers"),
    (ATTR, lambda text: text.replace("000002", "000001"), "11 images in 12 rows"),
    (ATTR, lambda text: "", "to list images, found 0 rows"),
    (PART, lambda text: text.replace("000003", "000099"), "1 missing, the first 000003.jpg"),
    (PART, lambda text: text.replace(" 2\n", " 3\n", 1), "found 3 for 000010.jpg"),
])
def test_a_damaged_list_is_named(tmp_path, file, damage, words):
  write(tmp_path)
  path = tmp_path / file
  path.write_text(damage(path.read_text()))
  with pytest.raises(UserError, match=words) as caught:
    celeba("", path=str(tmp_path))
  assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) <= 2


def test_what_is_missing_is_named(tmp_path):
  folder = write(tmp_path)
  (folder / "000004.jpg").write_bytes((folder / "000004.jpg").read_bytes()[:300])
  with pytest.raises(UserError, match="000004.jpg to be an image, found: truncated or damaged"):
    celeba("", path=str(tmp_path)).splits["train"].arrays()
  (folder / "000004.jpg").unlink()
  with pytest.raises(UserError, match="12 images of .* found 1 missing, the first 000004.jpg"):
    celeba("", path=str(tmp_path))
  (tmp_path / PART).unlink()
  with pytest.raises(UserError, match="list_eval_partition.txt or list_eval_partition.csv in"):
    celeba("", path=str(tmp_path))
  folder.rename(tmp_path / "elsewhere")
  with pytest.raises(UserError, match="a folder img_align_celeba in .* found none\nit takes"):
    celeba("", path=str(tmp_path))
