"""The bundled sample: real handwriting in the schema of CIFAR-10 and CIFAR-100.

The 1,797 handwritten digits, 8x8, that come with scikit-learn are drawn into 32x32 colour images
by the MultiMNIST recipe (Sabour et al. 2017, arXiv:1710.09829): one digit stands for CIFAR-10, two
digits that overlap a little stand for CIFAR-100. Nothing is downloaded.

All arithmetic is on integers: every machine draws the same bytes.
"""

from collections.abc import Callable

import numpy as np

from mtl_jax.data.handwriting import FINE, ONE, OPAQUE, PX, Handwriting, Random, by_split
from mtl_jax.data.source import ArrayExamples, Label, Source

SIZES = {"train": 10_000, "test": 2_000}
LABELS = {"cifar10": {"label": Label("class", 10)},
          "cifar100": {"label": Label("class", 100), "coarse_label": Label("class", 20)}}

_SIDE = 32  # pixels along the side of an image
_CHUNK = 64  # images drawn at a time, so that what is worked on stays in the cache


def digits(name: str) -> Source:
  """Draws the sample that stands for the data set `name`.

  Train and test come from different handwriting: no written digit is in both.

  Args:
    name: "cifar10": one digit, `label` is that digit. "cifar100": two digits, `label` is the number
      0 to 99 that they spell, `coarse_label` the number // 5.

  Returns:
    10,000 train and 2,000 test examples, each class equally often.

  Raises:
    ValueError: there is no sample of that name.
  """
  if name not in LABELS:
    raise ValueError(f"expected a sample of {' or '.join(LABELS)}, found {name!r}")
  draw = _draw_one if name == "cifar10" else _draw_two
  splits = {}
  for split, handwriting in by_split().items():
    random = Random(f"{name} {split}")
    classes = LABELS[name]["label"].num_classes
    label = (random.permutation(SIZES[split]) % classes).astype(np.int32)
    columns = {"image": _images(draw, handwriting, label, random), "label": label}
    if name == "cifar100":
      columns["coarse_label"] = label // 5
    splits[split] = ArrayExamples(columns)
  return Source(origin="sample", splits=splits, labels=LABELS[name])


def _images(draw: Callable, handwriting: Handwriting, label: np.ndarray, random: Random
            ) -> np.ndarray:
  images = np.empty((len(label), _SIDE, _SIDE, 3), np.uint8)
  for start in range(0, len(label), _CHUNK):
    chunk = slice(start, start + _CHUNK)
    ink = draw(handwriting, label[chunk], random)
    images[chunk] = _painted(ink, random)
  return images


def _draw_one(handwriting: Handwriting, label: np.ndarray, random: Random) -> np.ndarray:
  """The ink of one digit, large and near the middle."""
  n = len(label)
  y, x = random.integers(14 * PX, 17 * PX, (2, n))
  size = random.integers(18 * PX, 23 * PX, n)
  return _written(handwriting, label, y, x, size, random)


def _draw_two(handwriting: Handwriting, label: np.ndarray, random: Random) -> np.ndarray:
  """The ink of two digits side by side, tens and ones, that may touch."""
  n = len(label)
  middle = random.integers(15 * PX, 16 * PX, n)
  apart = random.integers(11 * PX, 13 * PX, n)
  tens, ones = (
      _written(handwriting, digit, random.integers(14 * PX, 17 * PX, n), x,
               random.integers(17 * PX, 20 * PX, n), random)
      for digit, x in ((label // 10, middle - apart // 2), (label % 10, middle + apart // 2)))
  return np.maximum(tens, ones)


def _written(handwriting: Handwriting, digit: np.ndarray, y: np.ndarray, x: np.ndarray,
             size: np.ndarray, random: Random) -> np.ndarray:
  """Ink, int16 [N, pixels], of digits `size` high about (y, x), turned and slanted a little."""
  sheet = handwriting.pick(digit, random)
  turn = random.integers(-ONE // 12, ONE // 12, len(digit))
  slant = random.integers(-ONE // 12, ONE // 12, len(digit))
  scale = 8 * FINE * PX * ONE // size  # from image pixels to sheet pixels
  ink = handwriting.ink(sheet, (y, x), (scale, -scale * turn // ONE),
                        (scale * (turn + slant) // ONE, scale), _SIDE)
  return ink.reshape(len(digit), -1).astype(np.int16)


def _painted(ink: np.ndarray, random: Random) -> np.ndarray:
  """Ink [N, pixels] as noisy images [N, 32, 32, 3], dark on light or light on dark."""
  n = len(ink)
  tone = random.integers(40, 215, (n, 1))
  contrast = random.integers(100, 160, (n, 1)) * np.where(tone < 128, 1, -1)
  paper = tone + random.integers(-32, 32, (n, 3))
  gap = contrast + random.integers(-32, 32, (n, 3))
  shade = random.integers(-32, 32, (2, n, 3, 1))
  y, x = np.indices((_SIDE, _SIDE), np.int16).reshape(2, -1) - _SIDE // 2
  paper, gap, shade = (part.astype(np.int16) for part in (paper, gap, shade))
  image = (shade[0] * y + shade[1] * x) // _SIDE
  image += paper[:, :, None]
  image += gap[:, :, None] * ink[:, None] // OPAQUE
  image += random.noise((n * 3, _SIDE**2)).reshape(n, 3, -1) // 12
  np.clip(image, 0, 255, out=image)
  return np.stack([*image.astype(np.uint8).swapaxes(0, 1)], axis=-1).reshape(n, _SIDE, _SIDE, 3)
