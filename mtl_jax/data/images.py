"""One image file as an array: upright, opaque, of one size; and where its boxes come to lie.

What is done to every image, in this order:

| found | done |
|---|---|
| EXIF orientation | turned upright (`upright=False`: left as stored) |
| grey, palette, YCbCr, CMYK | to RGB by Pillow's formulas; colour profiles are not applied |
| 16 bits a channel | to 8 bits over the whole range: 65535 becomes 255 |
| transparency | laid on `background` |
| several frames | the first one is taken |
| another size | `fit`, bilinear over the whole footprint of a pixel (antialiased) |

`fit` is how an image comes to its size: "stretch" changes the aspect ratio, "crop" fills the size
and cuts off what juts out, the same on both sides, "pad" keeps the whole image and fills what is
left around its centre with `background`. A large JPEG is decoded at a half, a quarter or an eighth
of its size where that is still at least twice the size asked for; this takes a third of the time
and changes values by less than one in 255 on average.
"""

from collections.abc import Sequence
import dataclasses
import functools
import io
import os
import struct
from typing import NamedTuple

import numpy as np

from mtl_jax.errors import UserError

FITS = ("stretch", "crop", "pad")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "MPO")

EMPTY = "empty file"
NOT_AN_IMAGE = "not an image"
DAMAGED = "truncated or damaged image"
TOO_DEEP = "image of more than 16 bits"
TOO_LARGE = "image of too many pixels"

_ORIENTATION = 0x0112  # the EXIF tag
_SIDEWAYS = (5, 6, 7, 8)
# What Pillow's parsers raise on damaged files.
_DAMAGES = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError,
            OverflowError, RuntimeError, struct.error)


@dataclasses.dataclass(frozen=True)
class Reading:
  """How images are read; see the module.

  Attributes:
    height: of the result, in pixels.
    width: of the result, in pixels.
    fit: one of `FITS`.
    channels: 3 for RGB, 1 for grey.
    background: a colour by name or as "#rrggbb".
    upright: whether EXIF orientation is followed.
  """

  height: int
  width: int
  fit: str = "crop"
  channels: int = 3
  background: str = "white"
  upright: bool = True

  @property
  def shape(self) -> tuple[int, int, int]:
    """[H, W, C] of the result."""
    return self.height, self.width, self.channels


class Decoded(NamedTuple):
  """What `decode` gives."""

  pixels: np.ndarray  # uint8 [H, W, C]
  width: int  # of the original, upright
  height: int
  format: str  # Pillow's word: "JPEG", …


class Unusable(Exception):
  """A file that gives no image; its text is one of the reasons above."""


def reading(size: int | Sequence[int] | None, *, fit: str = "crop", channels: int = 3,
            background: str = "white", upright: bool = True) -> Reading:
  """A `Reading` out of a source's arguments.

  >>> reading(32).fit, reading((48, 64), fit="pad").shape
  ('crop', (48, 64, 3))

  Args:
    size: pixels of both sides, or (height, width).
    fit: see the module.
    channels: see the module.
    background: see the module.
    upright: see the module.

  Raises:
    UserError: for a value that is none of these.
  """
  from PIL import ImageColor
  sides = (size, size) if isinstance(size, int) else tuple(size or ())
  if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
    raise UserError(f"size: expected pixels, or height and width, found {size!r}")
  if fit not in FITS:
    raise UserError(f"fit: expected one of {', '.join(FITS)}, found {fit!r}")
  if channels not in (1, 3):
    raise UserError(f"channels: expected 3 (RGB) or 1 (grey), found {channels!r}")
  try:
    ImageColor.getrgb(background)
  except ValueError as error:
    raise UserError("background: expected a colour such as white or #808080, "
                    f"found {background!r}") from error
  return Reading(*sides, fit, channels, background, upright)


def read_image(path: str | os.PathLike[str], how: Reading) -> np.ndarray:
  """The image in a file: uint8 [H, W, C].

  Raises:
    UserError: where there is none, or it cannot be read.
  """
  try:
    with open(path, "rb") as file:
      return decode(file.read(), how).pixels
  except (Unusable, OSError) as error:
    found = error.strerror if isinstance(error, OSError) else error
    raise UserError(f"expected {path} to be an image, found: {found}\n"
                    "restore the file, or remove it and start anew") from error


def decode(content: bytes, how: Reading) -> Decoded:
  """The image in a file's content.

  Raises:
    Unusable: where it is none that can be read whole.
  """
  from PIL import Image
  if not content:
    raise Unusable(EMPTY)
  try:
    with Image.open(io.BytesIO(content), formats=_formats()) as image:
      return _decoded(image, how)
  except Image.UnidentifiedImageError as error:
    raise Unusable(NOT_AN_IMAGE) from error
  except Image.DecompressionBombError as error:
    raise Unusable(TOO_LARGE) from error
  except _DAMAGES as error:
    raise Unusable(DAMAGED) from error


def has_wrong_extension(name: str, format: str) -> bool:
  """Whether a file's name says another format than its content.

  >>> has_wrong_extension("a.jpg", "PNG"), has_wrong_extension("a.JPEG", "JPEG")
  (True, False)
  """
  from PIL import Image
  said = Image.registered_extensions().get(os.path.splitext(name)[1].lower())
  return said != ("JPEG" if format == "MPO" and said == "JPEG" else format)


class Placement(NamedTuple):
  """Which part of an original is shown, and where.

  Attributes:
    region: x1, y1, x2, y2 of the part, as fractions of the original.
    inner: width and height of that part in the result, in pixels.
    corner: x and y of its upper left corner in the result, in pixels.
  """

  region: tuple[float, float, float, float]
  inner: tuple[int, int]
  corner: tuple[int, int]


def placement(width: int, height: int, how: Reading) -> Placement:
  """Where an original of `width` x `height` pixels comes to lie.

  >>> placement(200, 100, Reading(50, 50, "crop"))
  Placement(region=(0.25, 0.0, 0.75, 1.0), inner=(50, 50), corner=(0, 0))
  >>> placement(200, 100, Reading(50, 50, "pad"))
  Placement(region=(0.0, 0.0, 1.0, 1.0), inner=(50, 25), corner=(0, 12))
  """
  scales = how.width / width, how.height / height
  if how.fit == "crop":
    across, down = (min(scale / max(scales), 1.0) for scale in scales)
    region = (1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2
    return Placement(region, (how.width, how.height), (0, 0))
  inner = how.width, how.height
  if how.fit == "pad":
    inner = (min(max(round(width * min(scales)), 1), how.width),
             min(max(round(height * min(scales)), 1), how.height))
  corner = (how.width - inner[0]) // 2, (how.height - inner[1]) // 2
  return Placement((0.0, 0.0, 1.0, 1.0), inner, corner)


def follow(boxes: np.ndarray, width: int, height: int, how: Reading) -> np.ndarray:
  """Boxes of an original as boxes of the result, which they may jut out of.

  >>> follow(np.array([[0.25, 0.0, 1.0, 0.5]]), 200, 100, Reading(50, 50, "crop")).tolist()
  [[0.0, 0.0, 1.5, 0.5]]

  Args:
    boxes: [N, 4] of x1, y1, x2, y2 as fractions of the original.
    width: of the original, upright, in pixels.
    height: of the original, upright, in pixels.
    how: it is read.

  Returns:
    [N, 4], as fractions of the result.
  """
  region, inner, corner = placement(width, height, how)
  start, end = np.array(region[:2]), np.array(region[2:])
  points = (boxes.reshape(-1, 2, 2) - start) / (end - start) * inner + corner
  return (points / (how.width, how.height)).reshape(-1, 4)


@functools.cache
def _formats() -> tuple[str, ...]:
  """Those of `FORMATS` that this Pillow was built with."""
  from PIL import Image
  Image.init()
  return tuple(name for name in FORMATS if name in Image.OPEN)


def _decoded(image, how: Reading) -> Decoded:
  from PIL import Image, ImageColor
  format = image.format
  orientation = _orientation(image) if how.upright else 1
  turned = orientation in _SIDEWAYS
  width, height = image.size[::-1] if turned else image.size
  region, inner, corner = placement(width, height, how)
  if turned:  # what is shown is central, so only the axes trade places
    region, inner = (region[1], region[0], region[3], region[2]), inner[::-1]
  draft = image.draft(None, (2 * inner[0], 2 * inner[1]))
  across, down = draft[1][2:] if draft else image.size
  box = (region[0] * across, region[1] * down, region[2] * across, region[3] * down)
  flat = _flat(image, how).resize(inner, Image.Resampling.BILINEAR, box=box)
  if orientation in _turns():
    flat = flat.transpose(_turns()[orientation])
  if flat.size != (how.width, how.height):
    colour = ImageColor.getcolor(how.background, flat.mode)
    canvas = Image.new(flat.mode, (how.width, how.height), colour)
    canvas.paste(flat, corner)
    flat = canvas
  return Decoded(np.asarray(flat).reshape(how.shape), width, height, format)


@functools.cache
def _turns() -> dict[int, int]:
  from PIL import Image
  turn = Image.Transpose
  return {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
          6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90}


def _orientation(image) -> int:
  """By EXIF; 1 where that says nothing or is itself damaged, which spoils no pixel."""
  try:
    return image.getexif().get(_ORIENTATION, 1)
  except _DAMAGES:
    return 1


def _flat(image, how: Reading):
  """The whole image without transparency, as "RGB" or "L"."""
  from PIL import Image
  mode = "RGB" if how.channels == 3 else "L"
  if image.mode[0] in "IF":
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
      raise Unusable(TOO_DEEP)
    image = Image.fromarray(((values.astype(np.int32) + 128) // 257).astype(np.uint8))
  if image.has_transparency_data:
    image = image.convert("RGBA")
    below = Image.new("RGBA", image.size, how.background)
    image = Image.alpha_composite(below, image)
  return image.convert(mode)
