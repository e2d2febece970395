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
  >>> found = assign(points, stride, reach, jnp.array([large, tiny, absent]))
  >>> found.object.tolist(), [round(float(x), 2) for x in found.centerness]
  ([0, 0, 0, 1], [0.33, 0.33, 0.33, 1.0])

  Reference:
    Tian, Shen, Chen, He: FCOS: Fully Convolutional One-Stage Object Detection. ICCV 2019,
    arXiv:1904.01355; the radius is from the authors' later code.

  Differences:
    In the paper an object may be left without any location; here none is.
  """
  boxes = objects[:, :4].astype(jnp.float32)
  areas = area(boxes)
  there = (objects[:, 4] >= 0) & (areas > 0)
  centres = (boxes[:, :2] + boxes[:, 2:]) / 2
  cells = (points[:, None] - centres[None]) / stride[:, None]  # [N, M, 2]
  sides = jnp.concatenate([points[:, None] - boxes[None, :, :2],
                           boxes[None, :, 2:] - points[:, None]], axis=-1)  # [N, M, 4]
  finest = stride[:1]
  farthest = (sides / jnp.concatenate([finest, finest], axis=-1)[:, None]).max(axis=-1)
  good = ((sides.min(axis=-1) > 0) & (jnp.abs(cells).max(axis=-1) <= radius)
          & _within(farthest, reach) & there[None])
  cost = jnp.where(good, areas[None], jnp.inf)
  chosen = jnp.where(good.any(axis=1), jnp.argmin(cost, axis=1).astype(jnp.int32), -1)

  size = ((boxes[:, 2:] - boxes[:, :2]) / (2 * finest)).max(axis=-1)
  apart = jnp.sqrt((((points[:, None] - centres[None]) / finest[:, None]) ** 2).sum(axis=-1))
  apart += jnp.where(_within(size[None], reach), 0.0, _WRONG_LEVEL)
  chosen, taken = _each_gets_one(chosen, apart, areas, there)
  own = jnp.take_along_axis(sides, jnp.maximum(chosen, 0)[:, None, None], axis=1)[:, 0]
  central = jnp.where(taken, 1.0, jnp.where(chosen >= 0, _centerness(own), 0.0))
  return Assignment(chosen, central)


def _within(farthest: jax.Array, reach: jax.Array) -> jax.Array:
  return (reach[:, :1] <= farthest) & (farthest < reach[:, 1:])


def _each_gets_one(chosen: jax.Array, apart: jax.Array, areas: jax.Array,
                   there: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Objects without location take one: the new choice [N], and which locations were taken [N]."""
  locations = jnp.arange(apart.shape[0], dtype=jnp.int32)
  rows = jnp.arange(apart.shape[1], dtype=jnp.int32)

  def without(chosen):
    return there & ~(chosen[:, None] == rows[None]).any(axis=0)

  def unsettled(state):
    chosen, taken = state
    return without(chosen).any() & ~taken.all()

  def settle(state):  # at least one more object each time: what was taken stays so
    chosen, taken = state
    nearest = jnp.argmin(jnp.where(taken[:, None], jnp.inf, apart), axis=0).astype(jnp.int32)
    wanted = (nearest[None] == locations[:, None]) & without(chosen)[None]
    smallest = jnp.argmin(jnp.where(wanted, areas[None], jnp.inf), axis=1).astype(jnp.int32)
    some = wanted.any(axis=1)
    return jnp.where(some, smallest, chosen), taken | some

  return jax.lax.while_loop(unsettled, settle, (chosen, jnp.zeros(chosen.shape, bool)))


def _centerness(sides: jax.Array) -> jax.Array:
  """Of distances (l, t, r, b) [N, 4] to the sides -> [N]; 0 outside of the box."""
  near = jnp.minimum(sides[:, :2], sides[:, 2:])
  far = jnp.maximum(jnp.maximum(sides[:, :2], sides[:, 2:]), 1e-12)
  return jnp.sqrt(jnp.maximum(near / far, 0.0).prod(axis=-1))
