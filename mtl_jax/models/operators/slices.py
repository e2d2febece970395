"""Functions of a batch that are computed slice by slice, in the cache."""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

# A slice takes every so many-th example, so that of a batch split over devices each device has its
# part of every slice.


def map_slices(of: Callable[..., Any], size: int, *arrays: jax.Array, at_once: int = 1) -> Any:
  """What `of(*arrays)` gives, entries by example, from slices of about `size` examples.

  Args:
    of: from arrays [b, ...] to a tree of arrays [b, ...].
    size: a multiple of 8.
    *arrays: [B, ...]; with B unknown they are not sliced.
    at_once: slices that may be in memory together, for cores that the work on one leaves idle.
  """
  batch = arrays[0].shape[0]
  if not isinstance(batch, int) or batch <= size:
    return of(*arrays)
  one, sliced = _slices(of, size, *arrays)
  # All entries are written. Constants to begin with would be in memory from the start of the
  # program on; what depends on the loop's inputs is not.
  first = sliced[:, 0].reshape(sliced.shape[0], -1)[:, 0]

  def begin(s: jax.ShapeDtypeStruct) -> jax.Array:
    value = first.astype(s.dtype).reshape(-1, *(1 for _ in s.shape))
    return jnp.broadcast_to(value, (*sliced.shape[:2], *s.shape[1:]))
  found = _written(lambda i, _: one(i), jax.tree.map(begin, jax.eval_shape(one, 0)), at_once)
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:batch], found)


def add_slices(of: Callable[..., jax.Array], size: int, total: jax.Array,
               *arrays: jax.Array) -> jax.Array:
  """`total + of(*arrays)`, in the memory of `total` [B, ...] where nothing else needs it."""
  batch = total.shape[0]
  if not isinstance(batch, int) or batch <= size:
    return total + of(*arrays)
  one, _ = _slices(of, size, *arrays)
  return _written(lambda i, total: _at(total, i) + one(i), _sliced(total, size)).reshape(
      -1, *total.shape[1:])[:batch]


def _written(of: Callable[[jax.Array, Any], Any], begin: Any, at_once: int = 1) -> Any:
  """Writes `of(i, so far)` to the i-th slices of arrays [size, count, ...]."""
  def write(i: jax.Array, found: Any) -> Any:
    return jax.tree.map(lambda all_, x: lax.dynamic_update_index_in_dim(all_, x, i, 1),
                        found, of(i, found))
  return lax.fori_loop(0, jax.tree.leaves(begin)[0].shape[1], write, begin, unroll=at_once)


def sum_slices(of: Callable[..., jax.Array], size: int, *arrays: jax.Array,
               at_once: int = 1) -> jax.Array:
  """The sum of `of(*arrays)`, a sum over examples of which zeros have none, over such slices."""
  batch = arrays[0].shape[0]
  if not isinstance(batch, int) or batch <= size:
    return of(*arrays)
  one, sliced = _slices(of, size, *arrays)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, 0))
  return lax.fori_loop(0, sliced.shape[1], lambda i, total: total + one(i), zeros,
                       unroll=at_once)


def _slices(of: Callable[..., Any], size: int,
            *arrays: jax.Array) -> tuple[Callable[[jax.Array], Any], jax.Array]:
  """The function of one slice's number, and the first array as slices."""
  arrays = [_sliced(x, size) for x in arrays]
  return lambda i: of(*(_at(x, i) for x in arrays)), arrays[0]


def _sliced(x: jax.Array, size: int) -> jax.Array:
  """[B, ...], filled up with zeros, -> [size or less, count, ...]."""
  count = math.ceil(x.shape[0] / size)
  size = 8 * math.ceil(x.shape[0] / (8 * count))
  x = jnp.pad(x, [(0, size * count - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
  return x.reshape(size, count, *x.shape[1:])


def _at(x: jax.Array, i: jax.Array) -> jax.Array:
  return lax.dynamic_index_in_dim(x, i, 1, keepdims=False)
