"""Augmentation and normalisation of image batches, inside the compiled step.

| name | strength, and its default | what it does |
|---|---|---|
| `crop:4` | whole pixels | crops of the original size out of padded images |
| `shift:2` | whole pixels | the same, smaller |
| `flip:0.5` | probability | mirrors left to right |
| `rotate:15` | degrees | turns about the centre, by up to so much to either side |
| `scale:0.8` | smallest zoom | zooms by 0.8 … 1 / 0.8; `scale:1:1.5` by 1 … 1.5 |
| `color:0.4` | from 0 to 1 | brightness, contrast and saturation, each by a factor of 0.6 … 1.4 |
| `erase:0.5` | probability | noise in place of a rectangle |

The first five move the image and what lies in it: boxes, objects, masks, maps and normals. Without
`rotate` and `scale` they move by whole pixels and nothing is interpolated; with one of them all are
joined into one movement and the image is sampled once. What comes into view from outside the
image is its reflection, with pixelwise labels missing there; it is black where a stream has boxes.
A box of which less than a quarter stays in view is missing (`box`) or absent (`objects`). Numbers
and classes stay as they are: what is listed must leave them true.

The last two change the images only, after all movements.
"""

from collections.abc import Callable, Mapping, Sequence
import math

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.data.geometry import MOVES, crop, flip, move, shift
from mtl_jax.data.source import Label

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, of red, green and blue
_ERASED_AREA = (0.02, 0.4)
_ERASED_ASPECT = 0.3
_CHUNK = 2 ** 18  # numbers that statistics look at at a time, so that they stay in the cache


def color(images: jax.Array, key: jax.Array, strength: float = 0.4) -> jax.Array:
  """Changes brightness, contrast and saturation, in this order, each by a factor an image.

  Factors are drawn evenly from 1 - strength … 1 + strength. Contrast is about the mean grey of the
  image, saturation about the grey of each pixel. As in torchvision's ColorJitter without hue, but
  for the order, which is drawn there, and for cutting to 0 … 255, which is done once, at the end.

  Args:
    images: [B, H, W, C] from 0 to 255; red, green and blue, or else channels that weigh the same.
    key: of the randomness.
    strength: 0 … 1.
  """
  channels = images.shape[-1]
  luma = _LUMA if channels == 3 else (1 / channels,) * channels
  brightness, contrast, saturation = jax.random.uniform(
      key, (3, images.shape[0], 1, 1, 1), jnp.float32, 1 - strength, 1 + strength)
  x = images.astype(jnp.float32)
  grey = sum(share * x[..., c:c + 1] for c, share in enumerate(luma))
  # All three are linear: b x, then towards b mean(grey), then towards the grey of what that gave.
  kept = brightness * contrast
  x = (kept * saturation * x + kept * (1 - saturation) * grey
       + brightness * (1 - contrast) * grey.mean((1, 2), keepdims=True))
  x = jnp.clip(x, 0, 255)
  return (jnp.round(x) if jnp.issubdtype(images.dtype, jnp.integer) else x).astype(images.dtype)


def erase(images: jax.Array, key: jax.Array, probability: float = 0.5) -> jax.Array:
  """Puts noise in place of a random rectangle of each image, with a probability.

  Random erasing (Zhong et al., AAAI 2020, arXiv:1708.04896) with the paper's RE-R filling, areas of
  0.02 … 0.4 of the image and aspect ratios of 0.3 … 1 / 0.3. Differs in that the aspect ratio is
  even on its logarithm, as in torchvision, that a rectangle which does not fit is cut to the image
  and not drawn again, and that one drawing of noise serves the whole batch.

  Args:
    images: [B, H, W, C] from 0 to 255.
    key: of the randomness.
    probability: with which an image loses a rectangle.
  """
  b, h, w, c = images.shape
  whether, areas, aspects, places, noise = jax.random.split(key, 5)
  area = h * w * jax.random.uniform(areas, (b,), jnp.float32, *_ERASED_AREA)
  spread = -math.log(_ERASED_ASPECT)
  aspect = jnp.exp(jax.random.uniform(aspects, (b,), jnp.float32, -spread, spread))
  place = jax.random.uniform(places, (2, b), jnp.float32)

  def within(length: jax.Array, place: jax.Array, size: int) -> jax.Array:
    """[B, size]: where a side of the rectangle lies."""
    length = jnp.clip(jnp.round(length), 1, size)[:, None]
    start = jnp.floor(place[:, None] * (size - length + 1))
    pixel = jnp.arange(size, dtype=jnp.float32)[None]
    return (pixel >= start) & (pixel < start + length)

  rows = within(jnp.sqrt(area * aspect), place[0], h)
  columns = within(jnp.sqrt(area / aspect), place[1], w)
  rows = rows & jax.random.bernoulli(whether, probability, (b, 1))
  filling = jax.random.bits(noise, (1, h, w, c), jnp.uint8).astype(images.dtype)
  return jnp.where((rows[:, :, None] & columns[:, None])[..., None], filling, images)


LOOKS = {"color": color, "erase": erase}
AUGMENTATIONS = (*MOVES, *LOOKS)


def _one(low: float, high: float, kind: type = float) -> Callable[[Sequence[float]], bool]:
  return lambda found: len(found) == 1 and low <= found[0] <= high and found[0] == kind(found[0])


_IN_PIXELS = ("crop", "shift")
_STRENGTHS = {
    "crop": ("whole pixels such as crop:4", _one(0, 2 ** 15, int)),
    "shift": ("whole pixels such as shift:2", _one(0, 2 ** 15, int)),
    "flip": ("a probability such as flip:0.5", _one(0, 1)),
    "rotate": ("degrees from 0 to 180 such as rotate:15", _one(0, 180)),
    "scale": ("the smallest zoom, above 0 and at most 1, such as scale:0.8, or smallest and "
              "largest such as scale:1:1.5",
              lambda found: (_one(0, 1)(found) or len(found) == 2) and 0 < found[0] <= found[-1]),
    "color": ("a strength from 0 to 1 such as color:0.4", _one(0, 1)),
    "erase": ("a probability such as erase:0.5", _one(0, 1)),
}


def parse(text: str) -> tuple[str, tuple[float, ...]]:
  """Name and strength of an augmentation; no strength means its default.

  >>> parse("rotate:30"), parse("scale:1:1.5"), parse("flip")
  (('rotate', (30.0,)), ('scale', (1.0, 1.5)), ('flip', ()))

  Raises:
    ValueError: for an unknown name, or a strength that is no number or out of range.
  """
  name, *words = text.split(":")
  if name not in AUGMENTATIONS:
    raise ValueError(f"augmentation: expected one of {', '.join(AUGMENTATIONS)}; found {name!r}")
  expected, fits = _STRENGTHS[name]
  try:
    strength = tuple(float(word) for word in words)
  except ValueError:
    strength = (math.nan,)
  if words and not (all(map(math.isfinite, strength)) and fits(strength)):
    raise ValueError(f"augmentation {name}: expected {expected}; found {text!r}")
  return name, tuple(map(int, strength)) if name in _IN_PIXELS else strength


def augment(columns: Mapping[str, jax.Array], key: jax.Array, names: Sequence[str],
            labels: Mapping[str, Label]) -> dict[str, jax.Array]:
  """Applies the named augmentations to a batch of one stream, each with its own randomness.

  Args:
    columns: `{"image": [B, H, W, C] from 0 to 255, label: [B, …]}`.
    key: of the randomness; the same key gives the same result.
    names: each perhaps with a strength, such as "rotate:15".
    labels: what the labels are; columns that are none stay as they are.

  Returns:
    The columns with the same shapes and types.

  Raises:
    ValueError: for a name or strength that `parse` refuses, and for labels that do not lie on the
      pixels of the images.

  >>> image, box = jnp.zeros((1, 2, 4, 3), jnp.uint8), jnp.array([[0., 0., 0.25, 1.]])
  >>> columns = {"image": image, "box": box}
  >>> augment(columns, jax.random.key(0), ["flip:1"], {"box": Label("box")})["box"].tolist()
  [[0.75, 0.0, 1.0, 1.0]]
  """
  moves, looks = [], []
  for i, text in enumerate(names):
    name, strength = parse(text)
    (moves if name in MOVES else looks).append((name, jax.random.fold_in(key, i), strength))
  result = move(columns, moves, labels) if moves else dict(columns)
  for name, own, strength in looks:
    result["image"] = LOOKS[name](result["image"], own, *strength)
  return result


def channel_statistics(images: np.ndarray) -> Mapping[str, tuple[float, ...]]:
  """Mean and standard deviation of each channel of uint8 images, on the scale 0 … 1.

  Numbers that are no bytes, [..., D], are taken as they are.

  >>> channel_statistics(np.array([[[[0]], [[255]]]], np.uint8))
  {'mean': (0.5,), 'std': (0.5,)}
  """
  if images.dtype != np.uint8:
    values = images.reshape(-1, images.shape[-1]).astype(np.float64)
    return {"mean": tuple(values.mean(axis=0).tolist()),
            "std": tuple(np.maximum(values.std(axis=0), 1e-3).tolist())}
  channels = images.shape[-1]
  count = images.size // channels
  totals = squares = np.zeros(images[0].size)
  chunk = -(-_CHUNK // totals.size)
  for start in range(0, len(images), chunk):
    values = images[start:start + chunk].reshape(-1, totals.size).astype(np.float64)
    totals = totals + values.sum(axis=0)
    squares = squares + np.square(values, out=values).sum(axis=0)
  # Integers, exactly: float64 holds them, and Python's have no bound.
  totals, squares = ([int(x) for x in sums.reshape(-1, channels).sum(axis=0)]
                     for sums in (totals, squares))
  return {"mean": tuple(total / (255 * count) for total in totals),
          "std": tuple(max(math.sqrt(count * square - total ** 2) / (255 * count), 1e-3)
                       for total, square in zip(totals, squares))}


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
  """Images [B, H, W, C], or numbers [B, …, D], to float32 with mean and deviation taken out.

  Bytes are brought to 0 … 1 first; other numbers stay on their own scale.
  """
  wide = (1,) * (images.ndim - 1) + (-1,)
  scale, shift_by = (jnp.asarray(x, jnp.float32).reshape(wide) for x in (std, mean))
  values = images.astype(jnp.float32)
  return ((values / 255.0 if images.dtype == jnp.uint8 else values) - shift_by) / scale
