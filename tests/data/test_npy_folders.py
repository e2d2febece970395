"""NYUv2 and Cityscapes in the layout in which multi-task work shares them."""

import pathlib
import pickle

import numpy as np
import pytest

from mtl_jax.data import npy_folders, streams
from mtl_jax.data.cityscapes import cityscapes
from mtl_jax.data.nyuv2 import nyuv2
from mtl_jax.data.source import Label
from mtl_jax.errors import MissingData, UserError

SOURCES = {"nyuv2": nyuv2, "cityscapes": cityscapes}
H, W = 6, 8
COUNTS = {"train": 11, "val": 3}


def made(name: str, i: int) -> dict[str, np.ndarray]:
  """Scene i, as it is stored: everything a float, the upper left pixel without any label."""
  rng = np.random.default_rng(i)
  arrays = {"image": rng.integers(0, 256, (H, W, 3)) / 255,
            "label": rng.integers(0, 13 if name == "nyuv2" else 7, (H, W)).astype(np.float64),
            "depth": rng.uniform(0.5, 10, (H, W, 1)).astype(np.float32)}
  arrays["label"][0, 0], arrays["depth"][0, 0] = -1, 0
  if name == "nyuv2":
    normal = rng.normal(size=(H, W, 3))
    arrays["normal"] = normal / np.linalg.norm(normal, axis=-1, keepdims=True)
    arrays["normal"][0, 0] = 0
  return arrays


def write(root: pathlib.Path, name: str, label: str = "label") -> pathlib.Path:
  for split, count in COUNTS.items():
    for i in range(count):
      for part, array in made(name, i + 100 * (split == "val")).items():
        path = root / split / (label if part == "label" else part) / f"{i}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
  return root


@pytest.mark.parametrize("name", SOURCES)
def test_labels_are_those_that_were_stored(tmp_path, name):
  write(tmp_path, name)
  source = SOURCES[name]("unused", download=False, path=str(tmp_path))
  assert source.origin == f"{name}:11+3" and tuple(source.augmentation) == ("flip",)
  expected = {"segmentation": Label("mask", 13 if name == "nyuv2" else 7), "depth": Label("map", depth=name == "nyuv2")}
  assert source.labels == expected | (
      {"normal": Label("normals")} if name == "nyuv2" else {})
  for split, first in (("train", 0), ("test", 100)):
    examples = source.splits[split]
    for k in range(len(examples)):
      example, stored = examples[k], made(name, first + k)
      np.testing.assert_array_equal(example["image"], np.rint(255 * stored["image"]))
      np.testing.assert_array_equal(example["segmentation"], stored["label"])
      assert np.isnan(example["depth"][0, 0]).all() and example["depth"].shape == (H, W, 1)
      assert np.isnan(example["depth"]).sum() == 1
      np.testing.assert_array_equal(example["depth"].ravel()[1:], stored["depth"].ravel()[1:])
      if name == "nyuv2":
        assert np.isnan(example["normal"]).sum() == 3 and np.isnan(example["normal"][0, 0]).all()
        np.testing.assert_allclose(example["normal"].ravel()[3:], stored["normal"].ravel()[3:],
                                   rtol=1e-5)
    assert {key: value.dtype for key, value in example.items()} == {
        "image": np.uint8, "segmentation": np.int32, "depth": np.float32,
        **({"normal": np.float32} if name == "nyuv2" else {})}
    streams.check_labels(name, examples.arrays(), source.labels)


@pytest.mark.parametrize("size", [None, (3, 4)])
@pytest.mark.parametrize("name", SOURCES)
def test_arrays_are_the_examples_and_travel_to_other_processes(tmp_path, name, size):
  write(tmp_path, name)
  examples = SOURCES[name]("", path=str(tmp_path), size=size).splits["train"]
  assert examples.arrays() is examples.arrays()
  for read in (examples, pickle.loads(pickle.dumps(SOURCES[name](
      "", path=str(tmp_path), size=size).splits["train"]))):
    for key, column in read.arrays().items():
      np.testing.assert_array_equal(np.stack([read[k][key] for k in range(11)]), column)


def test_everything_is_resized_alike(tmp_path):
  write(tmp_path, "nyuv2")
  whole, half = (nyuv2("", path=str(tmp_path), size=size).splits["test"][1]
                 for size in (None, (3, 4)))
  assert half["image"].shape == (3, 4, 3)
  for name in ("segmentation", "depth", "normal"):
    np.testing.assert_array_equal(half[name], whole[name][1::2, 1::2])


def test_the_number_of_classes_names_the_folder(tmp_path):
  write(tmp_path, "cityscapes", label="label_7")
  assert len(cityscapes("", path=str(tmp_path)).splits["test"]) == 3
  with pytest.raises(UserError, match="expected a folder .*label_19, found none"):
    cityscapes("", path=str(tmp_path), classes=19)


@pytest.mark.parametrize("name", SOURCES)
def test_it_is_found_in_the_data_dir_or_said_where_to_get_it(tmp_path, name):
  with pytest.raises(MissingData) as caught:
    SOURCES[name](tmp_path)
  message = str(caught.value)
  assert f"expected {name} in {tmp_path / name}, found no such folder" in message
  assert "github.com/lorenmt/mtan" in message and len(message.splitlines()) == 2
  write(tmp_path / name, name)
  assert len(SOURCES[name](tmp_path).splits["train"]) == 11


def edited(part, change):
  """Damages the second of the train files of a part."""
  def damage(root):
    path = root / "train" / part / "1.npy"
    np.save(path, change(np.load(path)))
    return path
  return damage


def cut(root):
  path = root / "train" / "depth" / "1.npy"
  path.write_bytes(path.read_bytes()[:150])
  return path


def pickled(root):
  path = root / "train" / "label" / "1.npy"
  np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
  return path


@pytest.mark.parametrize("damage, words", [
    (edited("image", lambda a: 255 * a), r"colours from 0 to 1, found \d … 255 of float64"),
    (edited("image", lambda a: a - 0.5), "colours from 0 to 1, found -0.4"),
    (edited("image", lambda a: a.transpose(2, 0, 1)), r"an image \[H, W, 3\], found \[3, 6, 8\]"),
    (edited("image", lambda a: a[:, :6]), "to be 6x8 as the first image is, found 6x6"),
    (edited("label", lambda a: a + 1), "classes 0 … 12, or -1, found 0 … 13"),
    (edited("label", lambda a: a / 2), "classes 0 … 12"),
    (edited("label", lambda a: np.where(a == 3, np.nan, a)), "classes 0 … 12"),
    (edited("label", lambda a: a[..., None]), r"classes \[H, W\], found \[6, 8, 1\]"),
    (edited("depth", lambda a: np.where(a > 5, np.inf, a)), "finite depths"),
    (edited("depth", lambda a: np.repeat(a, 3, -1)), r"depths \[H, W, 1\], found \[6, 8, 3\]"),
    (edited("normal", lambda a: 127.5 * (a + 1)), "normals of length 1"),
    (edited("normal", lambda a: a[..., :2]), r"normals \[H, W, 3\]"),
    (cut, "to hold an array, found"),
    (pickled, "to hold an array, found"),
])
def test_a_file_that_is_no_such_is_named(tmp_path, damage, words):
  path = damage(write(tmp_path, "nyuv2"))
  with pytest.raises(UserError, match=words) as caught:
    nyuv2("", path=str(tmp_path)).splits["train"].arrays()
  assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) <= 2


def test_what_is_no_such_data_set_is_refused_at_once(tmp_path):
  write(tmp_path, "nyuv2")
  np.save(tmp_path / "val" / "label" / "0.npy", np.zeros((H, W, 3)))
  with pytest.raises(UserError, match="val/label/0.npy to hold classes"):
    nyuv2("", path=str(tmp_path))


def test_a_missing_file_is_named(tmp_path):
  write(tmp_path, "nyuv2")
  (tmp_path / "train" / "normal" / "4.npy").unlink()
  with pytest.raises(UserError, match=r"0.npy … 10.npy in .*train/normal, found no 4.npy"):
    nyuv2("", path=str(tmp_path))
  for part in ("image", "label", "depth", "normal"):
    (tmp_path / "train" / part / "4.npy").unlink(missing_ok=True)
  with pytest.raises(UserError, match="train/image, found no 4.npy"):
    nyuv2("", path=str(tmp_path))


def test_an_empty_folder_is_named(tmp_path):
  for part in ("image", "label_7", "depth"):
    (tmp_path / "train" / part).mkdir(parents=True)
  with pytest.raises(UserError, match="train/image, found no .npy at all"):
    cityscapes("", path=str(tmp_path))


def test_normals_come_to_length_one():
  values = np.array([[[0.0, 0.0, 0.98], [0.6, 0.8, 0.0], [0.0, 1.05, 0.0], [0.0, 0.0, 0.0]]])
  np.testing.assert_allclose(
      npy_folders.normals(values)[0], [[0, 0, 1], [0.6, 0.8, 0], [0, 1, 0], [np.nan] * 3],
      rtol=1e-6)
