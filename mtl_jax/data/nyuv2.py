"""NYUv2: indoor scenes with segmentation, depth and surface normals."""

from collections.abc import Sequence
import functools
import os

from mtl_jax.data import npy_folders
from mtl_jax.data.npy_folders import Part
from mtl_jax.data.source import Label, Source

_CLASSES = 13


def nyuv2(dir: str | os.PathLike[str], *, download: bool = True, path: str | None = None,
          size: int | Sequence[int] | None = None) -> Source:
  """NYUv2 as MTAN's authors have preprocessed it, the standard of dense multi-task learning.

  Silberman et al., "Indoor Segmentation and Support Inference from RGBD Images", ECCV 2012; Liu,
  Johns and Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, arXiv:1803.10704.

  795 train and 654 test images of 288x384, with three labels: `segmentation`, a mask of 13 classes;
  `depth`, a map [H, W, 1] in metres; `normal`, normals [H, W, 3], which are brought to length 1.
  What is stored as -1, as depth 0 and as the normal (0, 0, 0) is missing.

  All published work reports `val` and has no validation set: `val` is test here, and validation
  is cut from train, as much of it as `config.data.validation` says.

  Args:
    dir: where `nyuv2` is looked for if there is no `path`.
    download: taken as every source does; nothing is downloaded.
    path: the folder with train and val, each with image, label, depth and normal of <i>.npy.
    size: pixels of both sides, or (height, width), that everything is resized to; as stored when
      None. Depths stay as they are.

  Raises:
    MissingData: the folder is not there.
    UserError: files are missing, damaged or not of this layout.
  """
  del download
  return npy_folders.scenes("nyuv2", dir, path, {
      "segmentation": Part(("label",), Label("mask", _CLASSES),
                           functools.partial(npy_folders.mask, classes=_CLASSES)),
      "depth": Part(("depth",), Label("map", depth=True), npy_folders.depth),
      "normal": Part(("normal",), Label("normals"), npy_folders.normals),
  }, size=size, where="the preprocessed set is linked at github.com/lorenmt/mtan")
