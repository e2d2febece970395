"""Which object each location of a detector is to find."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.tasks.box_geometry import area

_WRONG_LEVEL = 1e4  # cells; farther than any location of the right level


class Assignment(NamedTuple):
  """What N locations are to find among M objects."""

  object: jax.Array  # shape=(N,), int32, the object's row; -1 for background
  centerness: jax.Array  # shape=(N,), float32 in [0, 1]; 0 for background


def assign(points: jax.Array, stride: jax.Array, reach: jax.Array, objects: jax.Array,
           radius: float = 1.5) -> Assignment:
  """Gives each location the smallest object that it can find well, and each object a location.

  A location can find an object well if it lies inside its box and within `radius` cells of the
  box's centre along both axes, and if the box's farthest side is as far as its level is for. Of
  several such objects it gets that of the smallest area, or the first of these.

  An object that then has no location, because it is smaller than a cell or lies behind others,
  takes the nearest one of the level that is for its size. If several want the same one the
  smallest of them gets it, and the others the next nearest, until each has one; so every object
  is learned as long as there are no more of them than locations. A location taken so is the best
  that its object has, and its centre-ness is 1.

  Args:
    points: [N, 2] x and y of the locations, fractions of the image.
    stride: [N, 2] width and height of the cells of their level, fractions of the image; the first
      location is of the finest level.
    reach: [N, 2] from how far on and up to how far the farthest side may be, in cells of the
      finest level.
    objects: [M, 5] boxes (x1, y1, x2, y2) in fractions of the image and their class. Rows with a
      negative class or without area are no objects.
    radius: in cells.

  Returns:
    The object of each location, and how central in it the location is: with distances (l, t, r, b)
    to the sides `sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))`.

  >>> points = jnp.array([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])
  >>> stride, reach = jnp.full((4, 2), 0.5), jnp.array([[0, jnp.inf]] * 4)
  >>> large, tiny, absent = [0., 0., 1., 1., 2.], [.7, .8, .71, .81, 0.], [0., 0., 0., 0., -1.]
  >>> found = jax.jit(assign)(points, stride, reach, jnp.array([large, tiny, absent]))
  >>> found.object.tolist(), [round(float(x), 2) for x in found.centerness]
  ([0, 0, 0, 1], [0.33, 0.33, 0.33, 1.0])

  Reference:
    Tian, Shen, Chen, He: FCOS: Fully Convolutional One-Stage Object Detection. ICCV 2019,
    arXiv:1904.01355; the radius is from the authors' later code.

  Differences:
    In the paper an object may be left without any location; here none is.
  """
  order = jnp.argsort(area(objects[:, :4]), stable=True).astype(jnp.int32)  # the smallest first
  boxes = objects[order, :4].astype(jnp.float32)
  there = (objects[order, 4] >= 0) & (area(boxes) > 0)
  x, y, finest = points[:, :1], points[:, 1:], stride[:1]
  left, top, right, bottom = (x - boxes[None, :, 0], y - boxes[None, :, 1],
                              boxes[None, :, 2] - x, boxes[None, :, 3] - y)  # [N, M] each
  aside, above = jnp.abs(left - right) / 2, jnp.abs(top - bottom) / 2  # of the box's centre
  inside = jnp.minimum(jnp.minimum(left, right), jnp.minimum(top, bottom)) > 0
  farthest = _cells(jnp.maximum(left, right), jnp.maximum(top, bottom), finest)
  chosen = _first(inside & (_cells(aside, above, stride) <= radius) & _within(farthest, reach)
                  & there[None])

  size = ((boxes[:, 2:] - boxes[:, :2]) / (2 * finest)).max(axis=1)
  apart = jnp.sqrt((aside / finest[:, :1]) ** 2 + (above / finest[:, 1:]) ** 2)
  apart += jnp.where(_within(size[None], reach), 0.0, _WRONG_LEVEL)
  chosen, taken = _each_gets_one(chosen, apart, there)

  found = chosen < len(order)
  row = jnp.minimum(chosen, len(order) - 1)
  central = jnp.where(taken, 1.0, jnp.where(found, _centerness(points, boxes[row]), 0.0))
  return Assignment(jnp.where(found, order[row], -1), central)


def _cells(x: jax.Array, y: jax.Array, stride: jax.Array) -> jax.Array:
  """The larger of two lengths [N, M] along the axes, in cells."""
  return jnp.maximum(x / stride[:, :1], y / stride[:, 1:])


def _within(farthest: jax.Array, reach: jax.Array) -> jax.Array:
  return (reach[:, :1] <= farthest) & (farthest < reach[:, 1:])


def _first(some: jax.Array) -> jax.Array:
  """The first column that is true in each row of [N, M], M where none is: [N] int32.

  A minimum, which runs several times faster than `argmin` or `argmax` on CPUs.
  """
  columns = jnp.arange(some.shape[1], dtype=jnp.int32)
  return jnp.where(some, columns[None], some.shape[1]).min(axis=1, initial=some.shape[1])


def _each_gets_one(chosen: jax.Array, apart: jax.Array,
                   there: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Objects without location take one: the new choice [N], and which locations were taken [N]."""
  locations = jnp.arange(apart.shape[0], dtype=jnp.int32)
  columns = jnp.arange(apart.shape[1], dtype=jnp.int32)

  def without(chosen):
    return there & ~(chosen[:, None] == columns[None]).any(axis=0)

  def unsettled(state):
    chosen, taken = state
    return without(chosen).any() & ~taken.all()

  def settle(state):  # at least one more object each time: what was taken stays so
    chosen, taken = state
    nearest = jnp.argmin(jnp.where(taken[:, None], jnp.inf, apart), axis=0).astype(jnp.int32)
    smallest = _first((nearest[None] == locations[:, None]) & without(chosen)[None])
    taking = smallest < apart.shape[1]
    return jnp.where(taking, smallest, chosen), taken | taking

  return jax.lax.while_loop(unsettled, settle, (chosen, jnp.zeros(chosen.shape, bool)))


def _centerness(points: jax.Array, boxes: jax.Array) -> jax.Array:
  """Of points [N, 2] in boxes [N, 4] -> [N]; 0 outside of the box."""
  low, high = points - boxes[:, :2], boxes[:, 2:] - points
  near, far = jnp.minimum(low, high), jnp.maximum(jnp.maximum(low, high), 1e-12)
  return jnp.sqrt(jnp.maximum(near / far, 0.0).prod(axis=-1))
