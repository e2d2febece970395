"""Published data sets as they are unpacked, in the folder that MTL_JAX_REAL_DATA names."""

import os
import pathlib

import numpy as np
import pytest

from mtl_jax.data.coco import coco
from mtl_jax.data.folders import image_folder

REAL = pathlib.Path(os.environ.get("MTL_JAX_REAL_DATA", "/nowhere"))


def folder(name):
  if not (REAL / name).is_dir():
    pytest.skip(f"no {name} in MTL_JAX_REAL_DATA")
  return str(REAL / name)


def test_cifar10_photographs():
  """500 train and 100 test photographs of each class, as JPEG files in class folders."""
  path = folder("cifar10_subset")
  source = image_folder("", path=path, size=32)
  assert source.report == {} and source.labels["label"].num_classes == 10
  for split, count in (("train", 500), ("test", 100)):
    arrays = source.splits[split].arrays()
    assert np.bincount(arrays["label"]).tolist() == [count] * 10
    assert arrays["image"].shape == (10 * count, 32, 32, 3)
  cut = image_folder("", path=str(pathlib.Path(path) / "train"), size=32, test_fraction=0.1)
  assert np.bincount(cut.splits["test"].arrays()["label"]).tolist() == [50] * 10


def test_blood_cells():
  """BCCD: white cells are large dark patches, so boxes are darker than their mirror images."""
  path = folder("bccd_coco")
  for fit in ("pad", "crop", "stretch"):
    source = coco("", path=path, size=128, fit=fit)
    assert {split: len(examples) for split, examples in source.splits.items()} == {
        "train": 205, "validation": 87, "test": 72}
    assert source.labels["objects"].names == ("RBC", "WBC", "Platelets")
    arrays = source.splits["train"].arrays()
    darker = []
    for image, objects in zip(arrays["image"], arrays["objects"]):
      for x1, y1, x2, y2 in (objects[objects[:, 4] == 1, :4] * 128).round().astype(int):
        if min(x2 - x1, y2 - y1) >= 16:  # not cut to a sliver
          mirrored = image[:, ::-1][y1:y2, x1:x2, 0]
          darker.append(image[y1:y2, x1:x2, 0].mean() < mirrored.mean())
    assert len(darker) > 150 and np.mean(darker) > 0.9  # half of them where boxes lie anywhere
