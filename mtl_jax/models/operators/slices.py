"""Functions of a batch that are computed slice by slice, in the cache."""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

# A slice takes every so many-th example, so that of a batch split over devices each device has its
# part of every slice.


def map_slices(of: Callable[..., Any], size: int, *arrays: jax.Array) -> Any:
  """What `of(*arrays)` gives, entries by example, from slices of about `size` examples.

  Args:
    of: from arrays [b, ...] to a tree of arrays [b, ...].
    size: a multiple of 8.
    *arrays: [B, ...]; with B unknown they are not sliced.
  """
  batch = arrays[0].shape[0]
  if not isinstance(batch, int) or batch <= size:
    return of(*arrays)
  one, size, count = _slices(of, size, *arrays)

  def add(i: jax.Array, found: Any) -> Any:
    return jax.tree.map(lambda all_, x: lax.dynamic_update_index_in_dim(all_, x, i, 1),
                        found, one(i))
  empty = jax.tree.map(lambda s: jnp.zeros((size, count, *s.shape[1:]), s.dtype),
                       jax.eval_shape(one, 0))
  found = lax.fori_loop(0, count, add, empty)
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:batch], found)


def sum_slices(of: Callable[..., jax.Array], size: int, *arrays: jax.Array) -> jax.Array:
  """The sum of `of(*arrays)`, a sum over examples of which zeros have none, over such slices."""
  batch = arrays[0].shape[0]
  if not isinstance(batch, int) or batch <= size:
    return of(*arrays)
  one, _, count = _slices(of, size, *arrays)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, 0))
  return lax.fori_loop(0, count, lambda i, total: total + one(i), zeros)


def _slices(of: Callable[..., Any], size: int,
            *arrays: jax.Array) -> tuple[Callable[[jax.Array], Any], int, int]:
  """The function of one slice's number, examples a slice, filled up with zeros, and their count."""
  batch = arrays[0].shape[0]
  count = math.ceil(batch / size)
  size = 8 * math.ceil(batch / (8 * count))

  def sliced(x: jax.Array) -> jax.Array:
    x = jnp.pad(x, [(0, size * count - batch)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(size, count, *x.shape[1:])
  arrays = [sliced(x) for x in arrays]
  one = lambda i: of(*(lax.dynamic_index_in_dim(x, i, 1, keepdims=False) for x in arrays))
  return one, size, count
