"""A search for weights on the simplex that sees the Gramian through a few products with it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.balancing import masked

Product = Callable[[jax.Array], jax.Array]  # from w [T] to G w


class SearchState(NamedTuple):
  """Where the last search ended.

  Attributes:
    point: [T] sums to one.
    step: [] size of the next projected gradient step, in units of one over `G`; 0 at first.
  """

  point: jax.Array
  step: jax.Array


class Place(NamedTuple):
  """A place on the way.

  Attributes:
    point: [T] `w`.
    image: [T] `G w`.
    step: [] of the next projected gradient step.
  """

  point: jax.Array
  image: jax.Array
  step: jax.Array

  @property
  def length(self) -> jax.Array:
    """`√(wᵀ G w)`."""
    return jnp.sqrt(jnp.maximum(jnp.sum(self.point * self.image), 0))


def init(num_tasks: int) -> SearchState:
  """Equal weights, and no step size yet."""
  return SearchState(jnp.full(num_tasks, 1 / num_tasks, float), jnp.zeros((), float))


def descend(product: Product, place: Place, active: jax.Array, count: int,
            linear: jax.Array | None = None) -> Place:
  """Goes towards the minimum of `linear·w + √(wᵀ G w)` on the simplex.

  Projected gradients, each with the best length along its way, which one product tells; the step
  size is twice the inverse of the curvature along the way before (Barzilai and Borwein, IMA J.
  Numer. Anal. 1988). The products tell the gradient where they end, too, so that one more step,
  half as bold, is free.

  Args:
    product: from `w` to `G w`; where inactive, 0. `G` is of order one, see `scaled`.
    place: the start.
    active: [T] bool, the tasks that weights are sought for.
    count: products to ask for.
    linear: [T]; zero where left out: then this is the shortest combination.

  >>> G = jnp.array([[18., -22.], [-22., 38.]])
  >>> start = Place(jnp.full(2, 0.5), G @ jnp.full(2, 0.5), jnp.zeros(()))
  >>> end = descend(lambda w: G @ w, start, jnp.ones(2, bool), count=2)
  >>> [round(float(x), 4) for x in end.point]
  [0.6, 0.4]
  """
  linear = jnp.zeros_like(place.image) if linear is None else linear

  def ahead(place: Place, boldness: float) -> jax.Array:
    slope = place.image + place.length * linear
    largest = jnp.max(jnp.abs(slope), where=active, initial=0)
    step = jnp.where(place.step > 0, place.step, 1 / jnp.where(largest > 0, largest, 1))
    return masked.project_to_simplex(place.point - boldness * step * slope, active) - place.point

  for _ in range(count):  # few; XLA runs convolutions many times slower inside loops on CPUs
    way = ahead(place, 1)
    place = along(place, way, product(way), linear)
  return place._replace(point=place.point + ahead(place, 0.5))


def along(place: Place, way: jax.Array, image: jax.Array, linear: jax.Array) -> Place:
  """The place with the least `linear·w + √(wᵀ G w)` between `w` and `w + way`.

  Args:
    place: at `w`.
    way: [T] to another point of the simplex.
    image: [T] `G way`.
    linear: [T].
  """
  bend = jnp.maximum(jnp.sum(way * image), 0)
  rise, pull = jnp.sum(way * place.image), -jnp.sum(way * linear)
  # With x = wayᵀ G (w + γ way) the slope is x √bend / √(x² + D) - pull; D is that of the plane.
  plane = jnp.maximum(place.length**2 * bend - rise**2, 0)
  left = bend - pull**2
  turn = pull * jnp.sqrt(plane / jnp.where(left > 0, left, 1))
  curved = bend > 0
  best = (turn - rise) / jnp.where(curved, bend, 1)
  best = jnp.where(left > 0, jnp.clip(best, 0, 1), (pull > 0).astype(best.dtype))
  step = jnp.where(curved, 2 * jnp.sum(way * way) / jnp.where(curved, bend, 1), place.step)
  return Place(place.point + best * way, place.image + best * image, step)


def scaled(product: Product, image: jax.Array) -> tuple[Product, jax.Array]:
  """The product in units of a first image [T], so that no square overflows, and the unit []."""
  largest = jnp.max(jnp.abs(image))
  unit = jnp.where(largest > 0, largest, 1)
  return lambda weights: product(weights) / unit, unit


def within(product: Product, active: jax.Array) -> Product:
  """The product among some tasks only: others are neither weighed nor read."""
  return lambda weights: jnp.where(active, product(jnp.where(active, weights, 0)), 0)
