"""Digit scenes: real handwriting at any place, size and angle, with every label known to the pixel.

In the manner of cluttered and overlapping MNIST (Mnih et al., NeurIPS 2014, arXiv:1406.6247; Sabour
et al., NeurIPS 2017, arXiv:1710.09829), but in colour, with the handwriting of scikit-learn, and
rendered here: nothing is downloaded, and every machine draws the same bytes.
"""

from collections.abc import Mapping
import dataclasses

import numpy as np

from mtl_jax.data.handwriting import FINE, ONE, OPAQUE, PX, Handwriting, Random, by_split
from mtl_jax.data.source import ArrayExamples, Label, Source
from mtl_jax.errors import UserError

_SOLID = OPAQUE // 2  # as much ink as makes a pixel the digit's
_HEIGHTS = {"one": (7, 11), "several": (4, 8)}  # of digits, in sixteenths of the canvas
_TURN = 30  # degrees that a digit is turned at most, either way
_MARGIN = 3  # pixels around the canvas that stay free
_PLACES = 16  # tried for each digit
_HIDDEN = 16  # 64ths of a digit's box that may lie behind others, where a place allows it
_CLUTTER = 4  # fragments of handwriting on the paper
_CHUNK = 64  # scenes drawn at a time, so that what is worked on stays in the cache


def digit_scenes(dir: str, *, download: bool = True, objects: int = 1,
                 size: int = 48, train_examples: int = 10_000, test_examples: int = 2_000,
                 dense: bool = False) -> Source:
  """Handwritten digits on a coloured, noisy canvas with scraps of handwriting about.

  | label | kind | |
  |---|---|---|
  | `digit` | class, 10 | |
  | `angle` | number | degrees that it is turned, anticlockwise, from -30 to 30 |
  | `scale` | number | its height before it was turned, as a fraction of the canvas |
  | `box` | box | tight around its ink |
  | `count` | number | how many digits, with `objects` > 1 |
  | `objects` | objects, 10 | box and class of each, the nearest first, with `objects` > 1 |
  | `mask` | mask, 11 | 0 for paper, the digit + 1 where it is seen, with `dense` |
  | `depth` | map | distance of what is seen, 1 for paper, with `dense` |

  Of several digits the larger is nearer and covers the smaller, by a quarter of its box at the
  most where there is room; `digit`, `angle`, `scale` and `box` are those of the nearest. Boxes
  include what is hidden. The digits are as if equally large: the distance is 1 / `scale`, and that
  of the paper, a little behind the smallest possible digit, is called 1. Ink makes a pixel
  the digit's where it is at least half opaque.

  Args:
    dir: not used: nothing is read.
    download: not used.
    objects: most digits in a scene; each number from 1 on is equally frequent.
    size: of the canvas, height and width in pixels, at least 32.
    train_examples: scenes to train on.
    test_examples: scenes to test on, of other handwriting.
    dense: whether there are `mask` and `depth`, which take 8 bytes a pixel beside the image's 3.

  Raises:
    UserError: for sizes that cannot be drawn.

  >>> scenes = digit_scenes("", train_examples=10, test_examples=10)
  >>> scene = scenes.splits["train"][0]
  >>> scene["image"].shape, int(scene["digit"]), float(scene["angle"])
  ((48, 48, 3), 6, -17.0)
  """
  del dir, download
  counts = {"train": train_examples, "test": test_examples}
  for name, value, least, most in (("objects", objects, 1, 8), ("size", size, 32, 512)):
    if not least <= value <= most:
      raise UserError(f"digit_scenes: {name}: expected {least} … {most}, found {value}")
  for split, count in counts.items():
    if count < 1:
      raise UserError(f"digit_scenes: {split}_examples: expected at least 1, found {count}")
  labels = {"digit": Label("class", 10), "angle": Label("number"), "scale": Label("number"),
            "box": Label("box")}
  if objects > 1:
    labels |= {"count": Label("number"), "objects": Label("objects", 10)}
  if dense:
    labels |= {"mask": Label("mask", 11), "depth": Label("map")}
  splits = {}
  for split, handwriting in by_split().items():
    random = Random(f"digit_scenes {objects} {size} {split}")
    columns = _columns(handwriting, counts[split], objects, size, dense, random)
    splits[split] = ArrayExamples({name: columns[name] for name in ("image", *labels)})
  return Source(origin="sample:digit_scenes", splits=splits, labels=labels)


@dataclasses.dataclass(frozen=True)
class _Digits:
  """What is written in N scenes: up to M digits each, the largest, which is nearest, first.

  Attributes:
    digit: int32 [N, M].
    sheet: index of the handwriting, [N, M].
    height: before it is turned, in 1/PX of a pixel, int32 [N, M]; 0 where there is no digit.
    angle: degrees anticlockwise, int32 [N, M].
  """

  digit: np.ndarray
  sheet: np.ndarray
  height: np.ndarray
  angle: np.ndarray

  def __getitem__(self, chunk: slice) -> "_Digits":
    return _Digits(self.digit[chunk], self.sheet[chunk], self.height[chunk], self.angle[chunk])

  @property
  def there(self) -> np.ndarray:
    return self.height > 0


def _chosen(handwriting: Handwriting, n: int, objects: int, heights: tuple[int, int],
            random: Random) -> _Digits:
  count = random.permutation(n) % objects + 1
  digit = np.stack([random.permutation(n) % 10 for _ in range(objects)], 1).astype(np.int32)
  height = random.integers(*heights, (n, objects))
  height[np.arange(objects) >= count[:, None]] = 0
  return _Digits(digit, handwriting.pick(digit, random), -np.sort(-height, axis=1),
                 random.integers(-_TURN, _TURN, (n, objects)))


def _columns(handwriting: Handwriting, n: int, objects: int, size: int, dense: bool,
             random: Random) -> Mapping[str, np.ndarray]:
  """The examples, with labels of several digits also where there is one."""
  heights = tuple(s * size * PX // 16 for s in _HEIGHTS["one" if objects == 1 else "several"])
  digits = _chosen(handwriting, n, objects, heights, random)
  image = np.empty((n, size, size, 3), np.uint8)
  seen = np.zeros((n, size, size), np.uint8)  # which digit, from 1; 0 for the paper
  box = np.zeros((n, objects, 4), np.float32)
  for start in range(0, n, _CHUNK):
    chunk = slice(start, start + _CHUNK)
    part = digits[chunk]
    patches, extents = _patches(handwriting, part, random)
    corners = _places(extents, part.there, size, random)
    box[chunk] = (extents + corners[:, :, [1, 0, 1, 0]]) / size * part.there[:, :, None]
    canvas, colours = _paper(handwriting, len(patches), objects, size, random)
    for k in reversed(range(objects)):  # from the farthest to the nearest
      here = np.flatnonzero(part.there[:, k])
      ink = _moved(patches[here, k], corners[here, k], size)
      _paint(canvas, here, ink, colours[here, k])
      seen[start + here] = np.where(ink >= _SOLID, np.uint8(k + 1), seen[start + here])
    canvas += random.noise((len(canvas) * 3, size**2)).reshape(canvas.shape) // 12
    image[chunk] = np.clip(canvas, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
  kind = np.where(digits.there, digits.digit, -1).astype(np.float32)
  columns = {"image": image, "digit": digits.digit[:, 0],
             "angle": digits.angle[:, 0].astype(np.float32),
             "scale": (digits.height[:, 0] / (size * PX)).astype(np.float32), "box": box[:, 0],
             "count": digits.there.sum(1).astype(np.float32),
             "objects": np.concatenate([box, kind[:, :, None]], axis=2)}
  if dense:
    paper = heights[0] - heights[0] // 8  # the height of a digit that were as far as the paper
    distance = (paper / np.maximum(digits.height, 1)).astype(np.float32)
    columns |= {"mask": _looked_up(np.int32(0), digits.digit + 1, seen),
                "depth": _looked_up(np.float32(1), distance, seen)}
  return columns


def _looked_up(paper: np.generic, values: np.ndarray, seen: np.ndarray) -> np.ndarray:
  """The value, of N scenes' paper and of their digits [N, M], that is seen at each pixel."""
  table = np.pad(values, ((0, 0), (1, 0)), constant_values=paper)
  return np.take_along_axis(table, seen.reshape(len(seen), -1), axis=1).reshape(seen.shape)


def _patches(handwriting: Handwriting, digits: _Digits, random: Random
             ) -> tuple[np.ndarray, np.ndarray]:
  """The ink of each digit on a patch of its own, and where on it the solid ink is.

  Returns:
    patches: uint8 [N, M, P, P], no ink where there is no digit, and none along the border.
    extents: x1, y1, x2, y2 in pixels of the patch, int64 [N, M, 4].
  """
  there = digits.there
  side = int(digits.height.max()) * 27 // (16 * PX) + 3  # the diagonal of the largest digit
  height, angle = digits.height[there], np.deg2rad(digits.angle[there])
  sine, cosine = (np.rint(ONE * turned(angle)).astype(np.int32) for turned in (np.sin, np.cos))
  scale = 8 * FINE * PX * ONE // height  # from image pixels to sheet pixels
  sine, cosine = scale * sine // ONE, scale * cosine // ONE
  middle = side * PX // 2 + random.integers(-PX // 2, PX // 2, (2, len(height)))
  patches = np.zeros((*there.shape, side, side), np.uint8)
  patches[there] = handwriting.ink(digits.sheet[there], middle, (cosine, sine), (-sine, cosine),
                                   side)
  solid = patches >= _SOLID
  down, right = solid.any(axis=3), solid.any(axis=2)
  extents = np.stack([right.argmax(2), down.argmax(2), side - right[:, :, ::-1].argmax(2),
                      side - down[:, :, ::-1].argmax(2)], axis=2)
  return patches, extents


def _places(extents: np.ndarray, there: np.ndarray, size: int, random: Random) -> np.ndarray:
  """Where the patches go, (y, x) of their corners, int64 [N, M, 2]: the first of a few places that
  leaves enough of a digit to be seen, or the best of them."""
  n, objects = there.shape
  corners = np.zeros((n, objects, 2), np.int64)
  boxes = np.zeros((n, objects, 1, 4), np.int64)
  draws = random.integers(0, (1 << 16) - 1, (objects, n, _PLACES, 2)).astype(np.int64)
  for k in range(objects):
    low, high = extents[:, k, None, :2], extents[:, k, None, 2:]
    first = _MARGIN + (draws[k] * (size - 2 * _MARGIN - (high - low) + 1) >> 16)
    tried = np.concatenate([first, first + high - low], axis=2)  # x1, y1, x2, y2: [N, places, 4]
    nearer = boxes[:, :k]
    overlap = (np.minimum(tried[:, None, :, 2:], nearer[..., 2:])
               - np.maximum(tried[:, None, :, :2], nearer[..., :2]))
    hidden = 64 * overlap.clip(0).prod(axis=3).sum(axis=1) // (high - low).prod(axis=2)
    best = np.maximum(hidden, _HIDDEN).argmin(axis=1)
    boxes[:, k, 0] = tried[np.arange(n), best] * there[:, k, None]
    corners[:, k] = (first[np.arange(n), best] - low[:, 0])[:, ::-1]
  return corners


def _moved(patches: np.ndarray, corners: np.ndarray, size: int) -> np.ndarray:
  """Patches [N, P, P], whose borders are empty, at their places on a canvas: [N, size, size]."""
  at = np.clip(np.arange(size) - corners[:, :, None], 0, patches.shape[1] - 1)
  return patches[np.arange(len(at))[:, None, None], at[:, 0, :, None], at[:, 1, None, :]]


def _paint(canvas: np.ndarray, here: np.ndarray, ink: np.ndarray, colour: np.ndarray) -> None:
  """Covers some of the canvases, int16 [N, 3, H, W] of 0 to 255, where there is ink [n, H, W]."""
  under = canvas[here]
  gap = colour[:, :, None, None] - under
  gap *= ink[:, None]  # 255 * OPAQUE still fits
  gap //= OPAQUE
  canvas[here] = under + gap


def _paper(handwriting: Handwriting, n: int, objects: int, size: int, random: Random
           ) -> tuple[np.ndarray, np.ndarray]:
  """Paper with fragments of handwriting on it, and the colours of ink that stand out from it.

  Returns:
    canvas: int16 [N, 3, size, size], 0 to 255.
    colours: int16 [N, M, 3], 0 to 255.
  """
  tone = random.integers(40, 215, (n, 1))
  away = np.where(tone < 128, 1, -1)
  paper = tone + random.integers(-32, 32, (n, 3))
  shade = random.integers(-32, 32, (2, n, 3, 1, 1))
  y, x = np.indices((size, size), np.int32) - size // 2
  canvas = paper[:, :, None, None] + (shade[0] * y + shade[1] * x) // size
  canvas = np.clip(canvas, 0, 255).astype(np.int16)
  gap = random.integers(100, 160, (n, objects, 1)) + random.integers(-48, 48, (n, objects, 3))
  colours = np.clip(tone[:, None] + away[:, None] * gap, 0, 255).astype(np.int16)
  for _ in range(_CLUTTER):
    sheet = handwriting.pick(random.integers(0, 9, n), random)
    side = size // 6 + 2
    middle = random.integers(0, side * PX, (2, n))
    across, along = random.integers(-3 * ONE, 3 * ONE, (2, n))
    scraps = handwriting.ink(sheet, middle, (across, along), (-along, across), side)
    scraps[:, [0, -1]] = scraps[:, :, [0, -1]] = 0
    corners = random.integers(-1, size - side + 1, (n, 2))
    pale = paper + away * random.integers(30, 60, (n, 1))
    _paint(canvas, np.arange(n), _moved(scraps, corners, size),
           np.clip(pale, 0, 255).astype(np.int16))
  return canvas, colours
