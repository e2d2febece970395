"""Multi-Fashion: two garments of Fashion-MNIST in one image, the reference of two-task learning."""

from collections.abc import Mapping
import dataclasses
import functools
import os
import pathlib

import numpy as np

from mtl_jax.data.idx import read_folder
from mtl_jax.data.records import local_folder, prepared
from mtl_jax.data.source import ArrayExamples, Examples, Label, Source
from mtl_jax.data.tfds import tfds
from mtl_jax.errors import MissingData, UserError

CLASSES = ("t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker",
           "bag", "ankle boot")

_INSTALLED = "/usr/share/datasets/fashion-mnist"  # of the package dataset-fashion-mnist of Debian
_CANVAS = 36  # pixels along the side of an image
_GARMENT = 28


def multi_fashion(dir: str | os.PathLike[str], *, download: bool = True, path: str | None = None,
                  train_examples: int = 60_000, test_examples: int = 10_000,
                  reconstruct: bool = False, seed: int = 0) -> Source:
  """Two overlaid garments, one for each of two tasks: `left` at the top left, `right` below it.

  The recipe of MultiMNIST (Sabour et al., NeurIPS 2017, arXiv:1710.09829) with garments for digits
  (Lin et al., NeurIPS 2019, arXiv:1912.12854): garments of 28x28 lie in the upper left and the
  lower right corner of a canvas of 36x36, and the brighter pixel wins. In each split every garment
  is as often the left one as any other, and so it is on the right; train pairs are of train
  garments only, test pairs of test garments.

  How published sets differ: Sabour et al. shift each digit by up to 4 pixels around the middle and
  pair different classes only; Sener and Koltun (NeurIPS 2018) shift the second by 6 and shrink the
  result to 28x28; Lin et al. publish 120,000 train and 20,000 test images.

  Args:
    dir: a data_dir of TFDS, where `fashion_mnist` is looked for if there is no `path`.
    download: taken as every source does; nothing is downloaded.
    path: a folder with Fashion-MNIST as IDX files, or with another set of images of 28x28 and 10
      classes in that format; where the Debian package dataset-fashion-mnist puts it when None.
    train_examples: how many.
    test_examples: how many.
    reconstruct: whether there is a third label `right_image`, the right garment alone on the
      canvas: float32 [36, 36, 1], 0 to 1. It is made when it is read; all 60,000 take 311 MB.
    seed: of the pairing, the same on every machine.

  Raises:
    MissingData: Fashion-MNIST is nowhere.
    UserError: its files are damaged or of another kind, or no examples are asked for.
  """
  del download
  if min(train_examples, test_examples) < 1:
    raise UserError("train_examples, test_examples: expected at least 1 of each, "
                    f"found {train_examples} and {test_examples}")
  origin, garments = _garments(dir, path)
  labels = {"left": Label("class", len(CLASSES), CLASSES),
            "right": Label("class", len(CLASSES), CLASSES)}
  if reconstruct:
    labels["right_image"] = Label("map")
  splits: dict[str, Examples] = {}
  for split, size in (("train", train_examples), ("test", test_examples)):
    pairs = _pairs(garments[split], size, f"multi_fashion {seed} {split}")
    splits[split] = pairs if reconstruct else ArrayExamples(pairs.drawn)
  return Source(origin=f"multi_fashion:{origin}:{train_examples}+{test_examples}:{seed}",
                splits=splits, labels=labels)


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Examples with the right garment as a further label.

  Attributes:
    drawn: `image` uint8 [N, 36, 36, 1], `left` and `right` int32 [N].
    images: garments, uint8 [M, 28, 28].
    chosen: int64 [N], the right garment of each example.
  """

  drawn: Mapping[str, np.ndarray]
  images: np.ndarray
  chosen: np.ndarray

  def __len__(self) -> int:
    return len(self.chosen)

  def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
    example = {name: column[index] for name, column in self.drawn.items()}
    return {**example, "right_image": self._right(self.chosen[index][None])[0]}

  def arrays(self) -> Mapping[str, np.ndarray]:
    return {**self.drawn, "right_image": self._all_right}

  @functools.cached_property
  def _all_right(self) -> np.ndarray:
    return self._right(self.chosen)

  def _right(self, chosen: np.ndarray) -> np.ndarray:
    canvas = np.zeros((len(chosen), _CANVAS, _CANVAS, 1), np.float32)
    np.divide(self.images[chosen, :, :, None], np.float32(255),
              out=canvas[:, -_GARMENT:, -_GARMENT:])
    return canvas


def _pairs(garments: Mapping[str, np.ndarray], size: int, seed: str) -> Pairs:
  """Pairs of garments, drawn from the raw output of PCG64, whose stream numpy guarantees."""
  random = np.random.PCG64(list(seed.encode()))
  images = garments["image"][..., 0]

  def drawn() -> np.ndarray:
    rounds = -(-size // len(images))
    return np.concatenate([np.argsort(random.random_raw(len(images)), kind="stable")
                           for _ in range(rounds)])[:size]

  left, right = drawn(), drawn()
  canvas = np.zeros((size, _CANVAS, _CANVAS), np.uint8)
  canvas[:, :_GARMENT, :_GARMENT] = images[left]
  corner = canvas[:, -_GARMENT:, -_GARMENT:]
  np.maximum(corner, images[right], out=corner)
  label = garments["label"]
  return Pairs({"image": canvas[..., None], "left": label[left], "right": label[right]},
               images, right)


def _garments(dir: str | os.PathLike[str], path: str | None
              ) -> tuple[str, dict[str, Mapping[str, np.ndarray]]]:
  """Where Fashion-MNIST was found, and its columns by split."""
  found = path or (_INSTALLED if pathlib.Path(_INSTALLED).is_dir() else None)
  if found:
    folder = pathlib.Path(found).expanduser()
    origin, columns = f"idx:{folder.absolute().name}", read_folder(folder)
  else:
    root = local_folder(dir)
    if not prepared("fashion_mnist", root):
      raise MissingData(
          f"expected Fashion-MNIST as IDX files in {_INSTALLED} or in path, or prepared by TFDS in "
          f"{root / 'fashion_mnist'}, found neither\n"
          "on Debian and Ubuntu: apt-get install dataset-fashion-mnist")
    source = tfds(root, dataset="fashion_mnist")
    origin = source.origin
    columns = {split: source.splits[split].arrays() for split in ("train", "test")}
  for split, column in columns.items():
    shape, most = column["image"].shape[1:], int(column["label"].max())
    if shape != (_GARMENT, _GARMENT, 1) or most >= len(CLASSES):
      raise UserError(f"{found or root}: {split}: expected images of 28x28 of 10 classes, "
                      f"found {shape[0]}x{shape[1]} of {most + 1}")
  return origin, columns
