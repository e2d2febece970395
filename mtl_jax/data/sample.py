"""The bundled sample: real handwriting in the schema of CIFAR-10 and CIFAR-100.

The 1,797 handwritten digits, 8x8, that come with scikit-learn are drawn into 32x32 colour images
by the MultiMNIST recipe (Sabour et al. 2017, arXiv:1710.09829): one digit stands for CIFAR-10, two
digits that overlap a little stand for CIFAR-100. Nothing is downloaded.

Randomness is the raw output of PCG64, whose stream numpy guarantees, and all arithmetic is on
integers: every machine draws the same bytes.
"""

from collections.abc import Callable
import dataclasses

import numpy as np

from mtl_jax.data.source import ArrayExamples, Label, Source

SIZES = {"train": 10_000, "test": 2_000}
LABELS = {"cifar10": {"label": Label("class", 10)},
          "cifar100": {"label": Label("class", 100), "coarse_label": Label("class", 20)}}

_SIDE = 32  # pixels along the side of an image
_FINE = 8  # sheet pixels along the side of one pixel of handwriting
_SHEET = 10 * _FINE  # the side of a sheet: 8 pixels of handwriting within a border of one
_PX = 16  # an image's pixel, in the units in which places and sizes are drawn
_ONE = 1 << 12  # 1.0 in fixed point
_OPAQUE = 128  # as much ink as hides the background
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
  for split, handwriting in _handwriting().items():
    random = _Random(f"{name} {split}")
    classes = LABELS[name]["label"].num_classes
    label = (random.permutation(SIZES[split]) % classes).astype(np.int32)
    columns = {"image": _images(draw, handwriting, label, random), "label": label}
    if name == "cifar100":
      columns["coarse_label"] = label // 5
    splits[split] = ArrayExamples(columns)
  return Source(origin="sample", splits=splits, labels=LABELS[name])


class _Random:
  """Random integers, the same for a seed whatever numpy's version."""

  def __init__(self, seed: str):
    self._bits = np.random.PCG64(list(seed.encode()))

  def integers(self, low: int, high: int, size: int | tuple[int, ...]) -> np.ndarray:
    """Integers from `low` to `high`, both included."""
    raw = self._bits.random_raw(size) >> np.uint64(32)
    return low + (raw * np.uint64(high - low + 1) >> np.uint64(32)).astype(np.int32)

  def permutation(self, size: int) -> np.ndarray:
    return np.argsort(self._bits.random_raw(size), kind="stable")

  def noise(self, size: tuple[int, int]) -> np.ndarray:
    """Integers from -256 to 254, int16, most of them near zero."""
    rows, columns = size
    raw = self._bits.random_raw((rows, columns // 4)).astype("<u8").view(np.int8)
    return np.add(raw[:, :columns], raw[:, columns:], dtype=np.int16)


@dataclasses.dataclass(frozen=True)
class _Handwriting:
  """Written digits, each on a finely ruled sheet.

  Attributes:
    sheets: how much ink lies where, 0 to 128: uint8 [digits, _SHEET, _SHEET].
    by_class: the indices of the sheets that show 0, 1, ... 9.
  """

  sheets: np.ndarray
  by_class: list[np.ndarray]

  def pick(self, digit: np.ndarray, random: _Random) -> np.ndarray:
    """For each digit the index of a sheet that shows it."""
    counts = np.array([len(indices) for indices in self.by_class])
    starts = np.cumsum(counts) - counts
    place = random.integers(0, (1 << 16) - 1, digit.shape) * counts[digit] >> 16
    return np.concatenate(self.by_class)[starts[digit] + place]


def _handwriting() -> dict[str, _Handwriting]:
  """The handwriting by split: of every class five in six for train, the others for test."""
  from sklearn.datasets import load_digits
  written = load_digits()
  sheets = _ruled(written.images.astype(np.int32))
  order = _Random("handwriting").permutation(len(sheets))
  by_class = [order[written.target[order] == digit] for digit in range(10)]
  cuts = [len(indices) // 6 for indices in by_class]
  return {
      "train": _Handwriting(sheets, [i[cut:] for i, cut in zip(by_class, cuts)]),
      "test": _Handwriting(sheets, [i[:cut] for i, cut in zip(by_class, cuts)]),
  }


def _ruled(images: np.ndarray) -> np.ndarray:
  """Images [N, 8, 8] of 0 to 16, bilinearly enlarged to sheets on which strokes have edges."""
  centers = 2 * np.arange(_SHEET)[:, None] + 1 - _FINE  # in units of 1 / (2 * _FINE) pixel
  distance = np.abs(centers - 2 * _FINE * np.arange(10))
  weights = np.maximum(2 * _FINE - distance, 0)  # [_SHEET, 10], rows sum to 16
  framed = np.pad(images, ((0, 0), (1, 1), (1, 1)))
  ink = weights @ (framed @ weights.T)  # 0 to 4096, of which 5/16 is still paper and 11/16 all ink
  return np.clip((ink - 1280) // 12, 0, _OPAQUE).astype(np.uint8)


def _images(draw: Callable, handwriting: _Handwriting, label: np.ndarray, random: _Random
            ) -> np.ndarray:
  images = np.empty((len(label), _SIDE, _SIDE, 3), np.uint8)
  for start in range(0, len(label), _CHUNK):
    chunk = slice(start, start + _CHUNK)
    ink = draw(handwriting, label[chunk], random)
    images[chunk] = _painted(ink, random)
  return images


def _draw_one(handwriting: _Handwriting, label: np.ndarray, random: _Random) -> np.ndarray:
  """The ink of one digit, large and near the middle."""
  n = len(label)
  y, x = random.integers(14 * _PX, 17 * _PX, (2, n))
  size = random.integers(18 * _PX, 23 * _PX, n)
  return _written(handwriting, label, y, x, size, random)


def _draw_two(handwriting: _Handwriting, label: np.ndarray, random: _Random) -> np.ndarray:
  """The ink of two digits side by side, tens and ones, that may touch."""
  n = len(label)
  middle = random.integers(15 * _PX, 16 * _PX, n)
  apart = random.integers(11 * _PX, 13 * _PX, n)
  tens, ones = (
      _written(handwriting, digit, random.integers(14 * _PX, 17 * _PX, n), x,
               random.integers(17 * _PX, 20 * _PX, n), random)
      for digit, x in ((label // 10, middle - apart // 2), (label % 10, middle + apart // 2)))
  return np.maximum(tens, ones)


def _written(handwriting: _Handwriting, digit: np.ndarray, y: np.ndarray, x: np.ndarray,
             size: np.ndarray, random: _Random) -> np.ndarray:
  """Ink, int16 [N, pixels], of digits `size` high about (y, x), turned and slanted a little."""
  sheet = handwriting.pick(digit, random)
  turn = random.integers(-_ONE // 12, _ONE // 12, len(digit))
  slant = random.integers(-_ONE // 12, _ONE // 12, len(digit))
  scale = 8 * _FINE * _PX * _ONE // size  # from image pixels to sheet pixels
  place = _PX * np.arange(_SIDE, dtype=np.int32)
  down = (place - y[:, None])[:, :, None]
  right = (place - x[:, None])[:, None, :]

  def on_sheet(from_down, from_right):
    at = from_down[:, None, None] * down + from_right[:, None, None] * right
    return np.clip(at // (_ONE * _PX) + _SHEET // 2, 0, _SHEET - 1)

  row = on_sheet(scale, -scale * turn // _ONE)
  column = on_sheet(scale * (turn + slant) // _ONE, scale)
  index = sheet[:, None, None] * _SHEET**2 + row * _SHEET + column
  return handwriting.sheets.reshape(-1)[index].reshape(len(digit), -1).astype(np.int16)


def _painted(ink: np.ndarray, random: _Random) -> np.ndarray:
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
  image += gap[:, :, None] * ink[:, None] // _OPAQUE
  image += random.noise((n * 3, _SIDE**2)).reshape(n, 3, -1) // 12
  np.clip(image, 0, 255, out=image)
  return image.astype(np.uint8).transpose(0, 2, 1).reshape(n, _SIDE, _SIDE, 3)
