"""Max-pooling whose gradient is not a scatter, and the places of maxima."""

from collections.abc import Sequence
import functools
import math

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from mtl_jax.models.operators.window import Window, window_of

MOST_PLACES = 255  # in a window: they are counted in 8 bits
NOWHERE = 255  # in place of a place


def max_pool(x: jax.Array, window: tuple[int, int], strides: tuple[int, int] = (1, 1),
             padding: str | Sequence[tuple[int, int]] = "VALID") -> jax.Array:
  """What `nn.max_pool` returns: the maximum of each window.

  The gradient goes to the first maximum of a window, row by row, as in XLA.

  Args:
    x: maps [B, H, W, C].
    window: rows and columns.
    strides: of the rows and columns.
    padding: "SAME", "VALID" or ((above, below), (left, right)) in pixels.

  Returns:
    Maps [B, H', W', C].

  >>> x = jnp.array([[3.0, 1.0, 5.0, 5.0]]).reshape(1, 1, 4, 1)
  >>> max_pool(x, (1, 2), (1, 2)).ravel().tolist()
  [3.0, 5.0]
  >>> jax.grad(lambda x: max_pool(x, (1, 2), (1, 2)).sum())(x).ravel().tolist()
  [1.0, 0.0, 1.0, 0.0]
  """
  if jax.default_backend() != "cpu" or x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
    return nn.max_pool(x, window, strides, padding)
  return _max_pool(x, window_of(x.shape[1:3], window, strides, padding))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _max_pool(x: jax.Array, window: Window) -> jax.Array:
  return nn.max_pool(x, window.kernel, window.strides, window.padding)


@_max_pool.defjvp
def _max_pool_jvp(window: Window, primals: tuple[jax.Array],
                  tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
  (x,), (dx,) = primals, tangents
  y = _max_pool(x, window)
  side_by_side = window.kernel == window.strides and window.padding == ((0, 0), (0, 0))
  if side_by_side and math.prod(window.kernel) <= MOST_PLACES:
    _, place = first_maxima(windows(x, window.kernel))
    return y, at_places(windows(dx, window.kernel), place)
  dy, found = jnp.zeros_like(y), jnp.zeros(y.shape, bool)
  for value, change in zip(_window_values(x, window, -jnp.inf), _window_values(dx, window, 0.0)):
    first = (value == y) & ~found
    dy, found = dy + jnp.where(first, change, jnp.zeros_like(dy)), found | first
  return y, dy


def _window_values(x: jax.Array, window: Window, fill: float) -> list[jax.Array]:
  """The first, second, … value of all windows, row by row: each [B, H', W', C]."""
  batch, _, _, channels = x.shape
  places = [(i, j) for i in range(window.kernel[0]) for j in range(window.kernel[1])]
  x = lax.pad(x, jnp.asarray(fill, x.dtype),
              [(0, 0, 0), *((*pad, 0) for pad in window.padding), (0, 0, 0)])
  return [lax.slice(x, (0, i, j, 0),
                    (batch, i + window.reach[0], j + window.reach[1], channels),
                    (1, *window.strides, 1)) for i, j in places]


def windows(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Windows side by side, without a rest at the edge: [B, H, W, C] -> [B, H', h, W', w, C].

  >>> windows(jnp.zeros((1, 5, 6, 3)), (2, 3)).shape
  (1, 2, 2, 2, 3, 3)
  """
  (height, width), (rows, columns) = size, (n // m for n, m in zip(x.shape[1:3], size))
  x = x[:, :rows * height, :columns * width]
  return x.reshape(x.shape[0], rows, height, columns, width, x.shape[3])


def first_maxima(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Of windows [B, H', h, W', w, C] the maximum and, in 8 bits, the place of the first one.

  >>> first_maxima(jnp.array([3.0, 5.0, 5.0]).reshape(1, 1, 3, 1, 1, 1))[1].ravel()
  Array([1], dtype=uint8)
  """
  height, width = x.shape[2], x.shape[4]
  best, place = x[:, :, 0, :, 0], jnp.zeros_like(x[:, :, 0, :, 0], jnp.uint8)
  for n in range(1, height * width):
    value = x[:, :, n // width, :, n % width]
    place = jnp.where(value > best, jnp.uint8(n), place)
    best = jnp.maximum(best, value)
  return best, place


def at_places(x: jax.Array, place: jax.Array) -> jax.Array:
  """Of each window [B, H', h, W', w, C] the entry at its place, 0 nowhere: [B, H', W', C]."""
  width = x.shape[4]
  place, found = place.astype(x.dtype), jnp.zeros((), x.dtype)
  for n in range(x.shape[2] * width):  # no sum: it would be a pass of its own
    found = jnp.where(place == n, x[:, :, n // width, :, n % width], found)
  return found


def to_places(y: jax.Array, place: jax.Array, size: tuple[int, int], rows: int = 1) -> jax.Array:
  """Windows [B, H', h, W', w, C] of zeros but for y [B, H', W', C] at their places.

  With `rows=0` from [H', W', B, C] to [H', h, W', w, B, C].
  """
  # One comparison with all places is a single pass. In the data's own type it is done in vectors.
  axes = (rows + 1, rows + 3)  # the axis of rows is followed by that of columns
  places = jnp.arange(size[0] * size[1]).astype(y.dtype).reshape(
      [dict(zip(axes, size)).get(axis, 1) for axis in range(place.ndim + 2)])
  here = jnp.expand_dims(place.astype(y.dtype), axes) == places
  return jnp.where(here, jnp.expand_dims(y, axes), jnp.zeros((), y.dtype))
