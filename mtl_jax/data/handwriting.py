"""Real handwriting, and random integers to draw scenes of it: the same bytes on every machine.

The 1,797 handwritten digits, 8x8, that come with scikit-learn. Randomness is the raw output of
PCG64, whose stream numpy guarantees, and all arithmetic is on integers.
"""

from collections.abc import Sequence
import dataclasses
import functools
from importlib import metadata

import numpy as np

FINE = 8  # sheet pixels along the side of one pixel of handwriting
SHEET = 10 * FINE  # the side of a sheet: 8 pixels of handwriting within a border of one
PX = 16  # an image's pixel, in the units in which places and sizes are drawn
ONE = 1 << 12  # 1.0 in fixed point
OPAQUE = 128  # as much ink as hides the background


class Random:
  """Random integers, the same for a seed whatever numpy's version.

  >>> Random("a seed").integers(1, 6, 5).tolist()
  [5, 6, 3, 2, 5]
  """

  def __init__(self, seed: str):
    self._bits = np.random.PCG64(list(seed.encode()))

  def integers(self, low: int, high: int, size: int | tuple[int, ...]) -> np.ndarray:
    """Integers from `low` to `high`, both included."""
    raw = self._bits.random_raw(size) >> np.uint64(32)
    return low + (raw * np.uint64(high - low + 1) >> np.uint64(32)).astype(np.int32)

  def permutation(self, size: int) -> np.ndarray:
    """The integers from 0 to `size` - 1 in random order."""
    return np.argsort(self._bits.random_raw(size), kind="stable")

  def noise(self, size: tuple[int, int]) -> np.ndarray:
    """Integers from -256 to 254, int16, most of them near zero."""
    rows, columns = size
    raw = self._bits.random_raw((rows, -(-columns // 4))).astype("<u8").view(np.int8)
    return np.add(raw[:, :columns], raw[:, -columns:], dtype=np.int16)


@dataclasses.dataclass(frozen=True)
class Handwriting:
  """Written digits, each on a finely ruled sheet.

  Attributes:
    sheets: how much ink lies where, 0 to `OPAQUE`: uint8 [digits, SHEET, SHEET].
    by_class: the indices of the sheets that show 0, 1, ... 9.
  """

  sheets: np.ndarray
  by_class: Sequence[np.ndarray]

  def pick(self, digit: np.ndarray, random: Random) -> np.ndarray:
    """For each digit the index of a sheet that shows it."""
    counts = np.array([len(indices) for indices in self.by_class])
    starts = np.cumsum(counts) - counts
    place = random.integers(0, (1 << 16) - 1, digit.shape) * counts[digit] >> 16
    return np.concatenate(self.by_class)[starts[digit] + place]

  def ink(self, sheet: np.ndarray, center: tuple[np.ndarray, np.ndarray],
          row: tuple[np.ndarray, np.ndarray], column: tuple[np.ndarray, np.ndarray],
          side: int) -> np.ndarray:
    """Ink, uint8 [N, side, side], of sheets under affine maps.

    Args:
      sheet: [N] indices.
      center: (y, x), each [N], where the middle of the sheet comes to lie, in 1/PX of a pixel.
      row: how many sheet pixels the row on the sheet moves for one pixel down and one to the right
        in the image: each [N], in 1/ONE.
      column: the same for the column on the sheet.
      side: of the image, in pixels.
    """
    place = PX * np.arange(side, dtype=np.int32)
    down = (place - center[0][:, None])[:, :, None]
    right = (place - center[1][:, None])[:, None, :]

    def on_sheet(from_down, from_right):
      at = from_down[:, None, None] * down + from_right[:, None, None] * right
      at //= ONE * PX
      at += SHEET // 2
      return np.clip(at, 0, SHEET - 1, out=at)

    index = sheet[:, None, None] * SHEET**2 + on_sheet(*row) * SHEET + on_sheet(*column)
    return self.sheets.reshape(-1).take(index)


@functools.cache
def by_split() -> dict[str, Handwriting]:
  """The handwriting by split: of every class five in six for train, the others for test."""
  images, classes = _written_digits()
  sheets = _ruled(images)
  order = Random("handwriting").permutation(len(sheets))
  by_class = [order[classes[order] == digit] for digit in range(10)]
  cuts = [len(indices) // 6 for indices in by_class]
  return {
      "train": Handwriting(sheets, [i[cut:] for i, cut in zip(by_class, cuts)]),
      "test": Handwriting(sheets, [i[:cut] for i, cut in zip(by_class, cuts)]),
  }


def _written_digits() -> tuple[np.ndarray, np.ndarray]:
  """What scikit-learn's `load_digits` gives: images [N, 8, 8] of 0 to 16, and their digits [N]."""
  # Read by its path: to import scikit-learn takes longer than to draw all images.
  path = metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
  table = np.loadtxt(path, np.int32, delimiter=",")
  return table[:, :-1].reshape(-1, 8, 8), table[:, -1]


def _ruled(images: np.ndarray) -> np.ndarray:
  """Images [N, 8, 8] of 0 to 16, bilinearly enlarged to sheets on which strokes have edges."""
  centers = 2 * np.arange(SHEET)[:, None] + 1 - FINE  # in units of 1 / (2 * FINE) pixel
  distance = np.abs(centers - 2 * FINE * np.arange(10))
  weights = np.maximum(2 * FINE - distance, 0)  # [SHEET, 10], rows sum to 16
  # float32 holds these integers exactly, and numpy multiplies matrices of it much faster.
  weights, framed = (x.astype(np.float32) for x in
                     (weights, np.pad(images, ((0, 0), (1, 1), (1, 1)))))
  ink = (weights @ (framed @ weights.T)).astype(np.int16)
  # 0 to 4096, of which 5/16 is still paper and 11/16 all ink
  return np.clip((ink - 1280) // 12, 0, OPAQUE).astype(np.uint8)
