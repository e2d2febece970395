"""How images move, and how their boxes, masks, maps and normals move with them.

Positions are in pixels: x to the right, y down, (0, 0) the upper left corner of the image and
(W, H) its lower right one, so that pixel (i, j) has its centre at (j + 0.5, i + 0.5).
"""

from collections.abc import Mapping, Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
import numpy as np

from mtl_jax.data.source import Label

LEAST_VISIBLE = 0.25  # of a box; with less of it inside the image it is not there any more
CROP_PIXELS, SHIFT_PIXELS = 4, 2
FLIP_PROBABILITY = 0.5

_FRAMED = ("box", "objects")
_PIXELWISE = {"mask": -1, "map": np.nan, "normals": np.nan}  # and what stands for a missing pixel


class Affine(NamedTuple):
  """Where the points of each of B images go: p becomes `matrix` p + `offset`.

  Attributes:
    matrix: [B, 2, 2] of (x, y); a rotation, perhaps mirrored, times a zoom.
    offset: [B, 2] of (x, y), in pixels.
  """

  matrix: jax.Array
  offset: jax.Array


def then(first: Affine, second: Affine) -> Affine:
  """The first movement, and then the second.

  >>> right = Affine(jnp.eye(2)[None], jnp.array([[3., 0.]]))
  >>> then(right, zoom(jnp.array([2.]), jnp.zeros((1, 2)), 4, 4)).offset.tolist()
  [[6.0, 0.0]]
  """
  # Sums of products instead of matmul, which accelerators round to fewer digits.
  matrix = (second.matrix[:, :, :, None] * first.matrix[:, None]).sum(2)
  return Affine(matrix, (second.matrix * first.offset[:, None]).sum(2) + second.offset)


# ---- Movements by whole pixels: exact for whatever lies on the pixels of an image.


def crop(values: jax.Array, key: jax.Array, padding: int = CROP_PIXELS,
         fill: float | None = None) -> jax.Array:
  """Random crops of the original size out of padded images.

  Args:
    values: [B, H, W, …]; what is drawn with one key for images fits their masks and maps.
    key: of the randomness.
    padding: pixels on each side.
    fill: what to pad with; reflection when None.
  """
  b, h, w, *rest = values.shape
  pads = ((0, 0), (padding, padding), (padding, padding), *((0, 0) for _ in rest))
  padded = (jnp.pad(values, pads, mode="reflect") if fill is None
            else jnp.pad(values, pads, constant_values=fill))
  return jax.vmap(lambda image, corner: jax.lax.dynamic_slice(
      image, (corner[0], corner[1], *(0 for _ in rest)), (h, w, *rest)))(
          padded, _corners(key, b, padding))


def shift(values: jax.Array, key: jax.Array, padding: int = SHIFT_PIXELS,
          fill: float | None = None) -> jax.Array:
  """Random shifts by up to two pixels: small crops, for images whose content nears the border."""
  return crop(values, key, padding, fill)


def flip(values: jax.Array, key: jax.Array, probability: float = FLIP_PROBABILITY,
         fill: float | None = None) -> jax.Array:
  """Mirrors each image left to right with a probability; nothing is left to fill."""
  del fill
  mirrored = _mirrored(key, values.shape[0], probability)
  mirrored = mirrored.reshape(-1, *(1 for _ in values.shape[1:]))
  return jnp.where(mirrored, values[:, :, ::-1], values)


def _corners(key: jax.Array, count: int, padding: int) -> jax.Array:
  return jax.random.randint(key, (count, 2), 0, 2 * padding + 1)


def _mirrored(key: jax.Array, count: int, probability: float) -> jax.Array:
  return jax.random.bernoulli(key, probability, (count,))


# ---- Movements as maps of points.


def rotation(degrees: jax.Array, height: int, width: int) -> Affine:
  """Turns images about their centres, clockwise to who looks at them: [B] degrees.

  >>> quarter = rotation(jnp.array([90.]), 4, 4)
  >>> (quarter.matrix @ jnp.array([0., 0.]) + quarter.offset).round().tolist()
  [[4.0, 0.0]]
  """
  radians = degrees * jnp.float32(np.pi / 180)
  cos, sin = jnp.cos(radians), jnp.sin(radians)
  matrix = jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], -2)
  centre = jnp.array([[width / 2, height / 2]], jnp.float32)
  return Affine(matrix, centre - (matrix * centre[:, None]).sum(2))


def zoom(factor: jax.Array, place: jax.Array, height: int, width: int) -> Affine:
  """Enlarges images by `factor` [B] and shows a window of the original size.

  Args:
    factor: [B], > 1 to come nearer.
    place: [B, 2], from 0 to 1: where the window lies in the image, or the image in the window,
      from left to right and from top to bottom.
    height: H.
    width: W.
  """
  size = jnp.array([[width, height]], jnp.float32)
  return Affine(factor[:, None, None] * jnp.eye(2, dtype=jnp.float32)[None],
                place * size * (1 - factor[:, None]))


def crop_map(key: jax.Array, shape: Sequence[int], padding: int = CROP_PIXELS) -> Affine:
  """What `crop` does with this key to images of shape [B, H, W, C]."""
  offset = padding - _corners(key, shape[0], padding)[:, ::-1]
  return Affine(jnp.tile(jnp.eye(2, dtype=jnp.float32), (shape[0], 1, 1)),
                offset.astype(jnp.float32))


def shift_map(key: jax.Array, shape: Sequence[int], padding: int = SHIFT_PIXELS) -> Affine:
  """What `shift` does with this key."""
  return crop_map(key, shape, padding)


def flip_map(key: jax.Array, shape: Sequence[int],
             probability: float = FLIP_PROBABILITY) -> Affine:
  """What `flip` does with this key."""
  mirrored = _mirrored(key, shape[0], probability)
  sign = jnp.where(mirrored, jnp.float32(-1), jnp.float32(1))
  matrix = jnp.eye(2, dtype=jnp.float32)[None] * jnp.stack([sign, jnp.ones_like(sign)], -1)[:, None]
  across = jnp.where(mirrored, jnp.float32(shape[2]), jnp.float32(0))
  return Affine(matrix, jnp.stack([across, jnp.zeros_like(across)], -1))


def rotate_map(key: jax.Array, shape: Sequence[int], degrees: float = 15.0) -> Affine:
  """Turns each image by an angle drawn evenly up to `degrees` to either side."""
  angles = jax.random.uniform(key, (shape[0],), jnp.float32, -degrees, degrees)
  return rotation(angles, shape[1], shape[2])


def scale_map(key: jax.Array, shape: Sequence[int], smallest: float = 0.8,
              largest: float | None = None) -> Affine:
  """Zooms each image by a factor between two, even on the logarithm, to a place drawn evenly.

  `largest` is 1 / `smallest` when None: out as often as in. The NYUv2 codes draw from 1, 1.2 and
  1.5 (Liu et al. 2019, arXiv:1803.10704, and what followed it), which is near `scale:1:1.5`.
  """
  factors, places = jax.random.split(key)
  top = np.log(1 / smallest if largest is None else largest)
  logs = jax.random.uniform(factors, (shape[0],), jnp.float32, float(np.log(smallest)), float(top))
  return zoom(jnp.exp(logs), jax.random.uniform(places, (shape[0], 2), jnp.float32),
              shape[1], shape[2])


EXACT = {"crop": crop, "shift": shift, "flip": flip}
MOVES = {"crop": crop_map, "shift": shift_map, "flip": flip_map, "rotate": rotate_map,
         "scale": scale_map}


# ---- What moves.


def move(columns: Mapping[str, jax.Array], moves: Sequence[tuple[str, jax.Array, Sequence[float]]],
         labels: Mapping[str, Label]) -> dict[str, jax.Array]:
  """Moves the images of a batch and all labels that lie in them, by all movements at once.

  Movements by whole pixels only are exact. Otherwise every image is sampled once, bilinearly, and
  every mask, map and normal from the nearest pixel.

  Args:
    columns: `{"image": [B, H, W, C], label: [B, …]}`.
    moves: names out of `MOVES`, in order, each with its key and strength.
    labels: what the labels are.

  Raises:
    ValueError: a mask, a map or normals have another size than the images.
  """
  images = columns["image"]
  whole = functools.reduce(then, [MOVES[name](key, images.shape, *strength)
                                  for name, key, strength in moves])
  exact = all(name in EXACT for name, _, _ in moves)

  def moved(values: jax.Array, fill: float | None, order: int = 0) -> jax.Array:
    if not exact:
      return resample(values, whole, fill, order)
    for name, key, strength in moves:
      values = EXACT[name](values, key, *strength, fill=fill)
    return values

  # A reflection would show parts of objects that no box tells of.
  framed = any(label.kind in _FRAMED for label in labels.values())
  result = {**columns, "image": moved(images, 0 if framed else None, order=1)}
  for name, label in labels.items():
    if name not in columns:  # no task reads it
      continue
    values = columns[name]
    if label.kind in _PIXELWISE:
      if values.shape[1:3] != images.shape[1:3]:
        raise ValueError(f"{name}: expected a {label.kind} of the size of the images, "
                         f"{list(images.shape[1:3])}, found {list(values.shape[1:3])}")
      values = moved(values, _PIXELWISE[label.kind])
      if label.kind == "normals":
        values = turned(values, whole.matrix)
      if label.kind == "map" and label.depth:
        values = values / _zoom_of(whole.matrix).reshape(-1, *(1 for _ in values.shape[1:]))
    elif label.kind == "box":
      values = _moved_box(values, whole, *images.shape[1:3])
    elif label.kind == "objects":
      values = _moved_objects(values, whole, *images.shape[1:3])
    result[name] = values
  return result


def resample(values: jax.Array, affine: Affine, fill: float | None, order: int) -> jax.Array:
  """Each image as its movement shows it, of the same shape and type.

  Args:
    values: [B, H, W] or [B, H, W, C]; integers up to 2**24.
    affine: of the B images.
    fill: what stands where nothing moved to; reflection when None.
    order: 0 for the nearest pixel, 1 for bilinear.

  >>> image = jnp.array([[[1, 2], [3, 4]]])
  >>> resample(image, rotation(jnp.array([90.]), 2, 2), fill=-1, order=0).tolist()
  [[[3, 1], [4, 2]]]
  """
  h, w = values.shape[1:3]
  x, y = _origins(affine, h, w)
  pixels, mode = values.astype(jnp.float32), "mirror"
  if fill is not None:  # a border of it which reaches as far as one looks
    pads = ((0, 0), (1, 1), (1, 1), *((0, 0) for _ in values.shape[3:]))
    pixels, mode = jnp.pad(pixels, pads, constant_values=fill), "nearest"
    x, y = x + 1, y + 1
  sample = lambda image, x, y: map_coordinates(image, [y, x], order=order, mode=mode)
  if values.ndim == 4:
    sample = jax.vmap(sample, (2, None, None), 2)
  result = jax.vmap(sample)(pixels, x, y)
  if jnp.issubdtype(values.dtype, jnp.integer):
    result = jnp.round(result)
  return result.astype(values.dtype)


def _origins(affine: Affine, height: int, width: int) -> tuple[jax.Array, jax.Array]:
  """Indices x and y [B, H, W], not whole ones, of what each pixel shows."""
  (a, b), (c, d) = jnp.moveaxis(affine.matrix, 0, -1)[..., None, None]
  x = jnp.arange(width, dtype=jnp.float32)[None, None, :] + 0.5 - affine.offset[:, 0, None, None]
  y = jnp.arange(height, dtype=jnp.float32)[None, :, None] + 0.5 - affine.offset[:, 1, None, None]
  determinant = a * d - b * c
  return (d * x - b * y) / determinant - 0.5, (a * y - c * x) / determinant - 0.5


def turned(normals: jax.Array, matrix: jax.Array) -> jax.Array:
  """Normals [B, H, W, 3] of images that were turned or mirrored by [B, 2, 2]; a zoom turns none.

  >>> mirrored = jnp.array([[[-1., 0.], [0., 1.]]])
  >>> turned(jnp.array([[[[0.6, 0., 0.8]]]]), mirrored).round(3).tolist()
  [[[[-0.6000000238418579, 0.0, 0.800000011920929]]]]
  """
  (a, b), (c, d) = jnp.moveaxis(matrix / _zoom_of(matrix)[:, None, None], 0, -1)[..., None, None]
  x, y, z = jnp.moveaxis(normals, -1, 0)
  return jnp.stack([a * x + b * y, c * x + d * y, z], axis=-1)


def _zoom_of(matrix: jax.Array) -> jax.Array:
  """By how much each of [B, 2, 2] enlarges: [B]."""
  determinant = matrix[:, 0, 0] * matrix[:, 1, 1] - matrix[:, 0, 1] * matrix[:, 1, 0]
  return jnp.sqrt(jnp.abs(determinant))


def move_boxes(boxes: jax.Array, affine: Affine, height: int, width: int
               ) -> tuple[jax.Array, jax.Array]:
  """Boxes after a movement, cut to the image.

  A turned box becomes the smallest upright box around its four corners: it may be larger than what
  it holds.

  Args:
    boxes: [B, M, 4]: x1, y1, x2, y2 as fractions.
    affine: of the B images.
    height: H.
    width: W.

  Returns:
    boxes [B, M, 4], and [B, M] whether at least `LEAST_VISIBLE` of their area is in the image,
    which is never so of NaN.

  >>> right = Affine(jnp.eye(2)[None], jnp.array([[5., 0.]]))
  >>> boxes = jnp.array([[[0., 0., 0.5, 1.], [0.5, 0., 1., 1.]]])
  >>> moved, visible = move_boxes(boxes, right, 10, 10)
  >>> moved.tolist(), visible.tolist()
  ([[[0.5, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0]]], [[True, False]])
  """
  size = jnp.array([width, height], jnp.float32)
  corners = boxes[..., jnp.array([[0, 1], [2, 1], [0, 3], [2, 3]])]  # [B, M, 4, 2]
  corners = corners * size.reshape(1, 1, 1, 2)
  corners = (affine.matrix[:, None, None] * corners[..., None, :]).sum(-1)
  corners = (corners + affine.offset[:, None, None]) / size.reshape(1, 1, 1, 2)
  low, high = corners.min(-2), corners.max(-2)
  kept = [jnp.clip(low, 0, 1), jnp.clip(high, 0, 1)]
  extent = high - low
  inside = ((low >= 0) & (low <= 1)).astype(jnp.float32)  # for a box without an area
  part = jnp.where(extent > 0, (kept[1] - kept[0]) / jnp.where(extent > 0, extent, 1), inside)
  return jnp.concatenate(kept, axis=-1), part.prod(-1) >= LEAST_VISIBLE


def _moved_box(box: jax.Array, affine: Affine, height: int, width: int) -> jax.Array:
  moved, visible = move_boxes(box[:, None], affine, height, width)
  return jnp.where(visible, moved[:, 0], jnp.nan)


def _moved_objects(objects: jax.Array, affine: Affine, height: int, width: int) -> jax.Array:
  moved, visible = move_boxes(objects[..., :4], affine, height, width)
  classes = objects[..., 4:]
  moved = jnp.concatenate([moved, classes], axis=-1)
  absent = jnp.array([0, 0, 0, 0, -1], jnp.float32).reshape(1, 1, 5)
  moved = jnp.where(visible[..., None] & (classes >= 0), moved, absent)
  return jnp.where(jnp.isnan(classes), classes, moved)
