"""Functions of a batch of maps that are computed slice by slice, in the cache."""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

# A slice takes every so many-th example, so that of a batch split over devices each device has its
# part of every slice.

_BATCH = -4  # the axis of examples


def map_slices(of: Callable[..., Any], size: int, *arrays: jax.Array) -> Any:
  """What `of(*arrays)` gives, maps by example, from slices of about `size` examples.

  Args:
    of: from arrays [..., b, H, W, C] to a tree of such arrays.
    size: a multiple of 8.
    *arrays: [..., B, H, W, C]; with B unknown they are not sliced.
  """
  batch = arrays[0].shape[_BATCH]
  if not isinstance(batch, int) or batch <= size:
    return of(*arrays)
  one, sliced = _slices(of, size, *arrays)
  # All entries are written. Constants to begin with would be in memory from the start of the
  # program on; what depends on the loop's inputs is not.
  counts = sliced.shape[_BATCH - 1:-3]
  first = sliced.reshape(-1, *counts, math.prod(sliced.shape[-3:]))[0, :, 0, 0]

  def begin(s: jax.ShapeDtypeStruct) -> jax.Array:
    value = first.astype(s.dtype).reshape(-1, 1, 1, 1, 1)
    value = value.reshape(*(1 for _ in s.shape[:_BATCH]), *value.shape)
    return jnp.broadcast_to(value, (*s.shape[:_BATCH], *counts, *s.shape[-3:]))
  found = _written(lambda i, _: one(i), jax.tree.map(begin, jax.eval_shape(one, 0)))
  return jax.tree.map(lambda x: _whole(x, batch), found)


def add_slices(of: Callable[..., jax.Array], size: int, total: jax.Array,
               *arrays: jax.Array) -> jax.Array:
  """`total + of(*arrays)`, in the memory of the total where nothing else needs it."""
  batch = total.shape[_BATCH]
  if not isinstance(batch, int) or batch <= size:
    return total + of(*arrays)
  one, _ = _slices(of, size, *arrays)
  found = _written(lambda i, total: _at(total, i) + one(i), _sliced(total, size))
  return _whole(found, batch)


def sum_slices(of: Callable[..., jax.Array], size: int, *arrays: jax.Array) -> jax.Array:
  """The sum of `of(*arrays)`, a sum over examples of which zeros have none, over such slices."""
  batch = arrays[0].shape[_BATCH]
  if not isinstance(batch, int) or batch <= size:
    return of(*arrays)
  one, sliced = _slices(of, size, *arrays)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, 0))
  return lax.fori_loop(0, sliced.shape[_BATCH], lambda i, total: total + one(i), zeros)


def _slices(of: Callable[..., Any], size: int,
            *arrays: jax.Array) -> tuple[Callable[[jax.Array], Any], jax.Array]:
  """The function of one slice's number, and the first array as slices."""
  arrays = [_sliced(x, size) for x in arrays]
  return lambda i: of(*(_at(x, i) for x in arrays)), arrays[0]


def _sliced(x: jax.Array, size: int) -> jax.Array:
  """[..., B, H, W, C], filled up with zeros, -> [..., size or less, count, H, W, C]."""
  *rest, batch, height, width, channels = x.shape
  count = math.ceil(batch / size)
  size = 8 * math.ceil(batch / (8 * count))
  x = jnp.pad(x, [*((0, 0) for _ in rest), (0, size * count - batch), (0, 0), (0, 0), (0, 0)])
  return x.reshape(*rest, size, count, height, width, channels)


def _whole(x: jax.Array, batch: int) -> jax.Array:
  """[..., size, count, H, W, C] -> [..., B, H, W, C], without what it was filled up with."""
  x = x.reshape(*x.shape[:_BATCH - 1], -1, *x.shape[-3:])
  return lax.slice_in_dim(x, 0, batch, axis=x.ndim + _BATCH)


def _at(x: jax.Array, i: jax.Array) -> jax.Array:
  return lax.dynamic_index_in_dim(x, i, x.ndim + _BATCH, keepdims=False)


def _written(of: Callable[[jax.Array, Any], Any], begin: Any) -> Any:
  """Writes `of(i, so far)` to the i-th slices of arrays [..., size, count, H, W, C]."""
  def write(i: jax.Array, found: Any) -> Any:
    return jax.tree.map(
        lambda all_, x: lax.dynamic_update_index_in_dim(all_, x, i, all_.ndim + _BATCH),
        found, of(i, found))
  return lax.fori_loop(0, jax.tree.leaves(begin)[0].shape[_BATCH], write, begin)
