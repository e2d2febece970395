"""Cityscapes: street scenes with segmentation and depth."""

from collections.abc import Sequence
import functools
import os

from mtl_jax.data import npy_folders
from mtl_jax.data.npy_folders import Part
from mtl_jax.data.source import Label, Source


def cityscapes(dir: str | os.PathLike[str], *, download: bool = True, path: str | None = None,
               classes: int = 7, size: int | Sequence[int] | None = None) -> Source:
  """Cityscapes as MTAN's authors have preprocessed it.

  Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016,
  arXiv:1604.01685; Liu, Johns and Davison, CVPR 2019, arXiv:1803.10704.

  2,975 train and 500 test images of 128x256 (or 256x512), with two labels: `segmentation`, a mask;
  `depth`, a map [H, W, 1] of inverse depth in the unit that it is stored in. What is stored as -1
  and as depth 0 is missing.

  All published work reports `val` and has no validation set: `val` is test here, and validation
  is cut from train, as much of it as `config.data.validation` says.

  Args:
    dir: where `cityscapes` is looked for if there is no `path`.
    download: taken as every source does; nothing is downloaded.
    path: the folder with train and val, each with image, label and depth of <i>.npy.
    classes: 2, 7 or 19; the labels are read from label_<classes>, or from label where that is not.
    size: pixels of both sides, or (height, width), that everything is resized to; as stored when
      None. Depths stay as they are.

  Raises:
    MissingData: the folder is not there.
    UserError: files are missing, damaged or not of this layout.
  """
  del download
  return npy_folders.scenes("cityscapes", dir, path, {
      "segmentation": Part((f"label_{classes}", "label"), Label("mask", classes),
                           functools.partial(npy_folders.mask, classes=classes)),
      "depth": Part(("depth",), Label("map"), npy_folders.depth),
  }, size=size, where="the preprocessed set is linked at github.com/lorenmt/mtan")
