"""The order of examples: a new permutation every epoch, computed position by position.

A permutation is evaluated at a position without being stored, so that a compiled step can draw its
batch from (seed, step) alone, and the host the same one: nothing to save, nothing to sort.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

_ROUNDS = 8

Array = TypeVar("Array", jax.Array, np.ndarray)


def _mix(x: Array) -> Array:
  """A 32-bit avalanche: every input bit flips about half of the output bits."""
  x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
  return x ^ (x >> 16)


def _network(size: int, keys: Array) -> Callable[[Array], Array]:
  """An eight-round Feistel network over the next even number of bits above `size`."""
  half = max((size - 1).bit_length() + 1, 2) // 2
  mask = np.uint32((1 << half) - 1)
  round_keys = [_mix(keys + np.uint32(0x9E3779B9 * i % 2**32)) for i in range(1, _ROUNDS + 1)]

  def scramble(x):
    left, right = x >> half, x & mask
    for key in round_keys:
      left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right
  return scramble


def _places(drawn: Array, bits: Array, size: int) -> tuple[Array, Array]:
  """Position within its epoch, and key of that epoch, of the examples drawn."""
  epoch, position = drawn // np.uint32(size), drawn % np.uint32(size)
  return position, _mix(bits ^ _mix(epoch))


def permute(positions: jax.Array, size: int, keys: jax.Array) -> jax.Array:
  """Where a keyed permutation of 0 … size - 1 sends each position.

  A Feistel network, walked along its cycle until the result is below `size` (Black and Rogaway,
  CT-RSA 2002).

  Args:
    positions: [B] uint32, below `size`.
    size: number of examples, at most 2**30.
    keys: [B] uint32, one permutation for each value.

  Returns:
    [B] uint32.

  >>> sorted(permute(jnp.arange(5, dtype=jnp.uint32), 5, jnp.zeros(5, jnp.uint32)).tolist())
  [0, 1, 2, 3, 4]
  """
  scramble = _network(size, keys)

  def walk(x):
    return jnp.where(x < size, x, scramble(x))

  return jax.lax.while_loop(lambda x: (x >= size).any(), walk, scramble(positions))


def batch_indices(key: jax.Array, step: jax.Array, batch_size: int, size: int) -> jax.Array:
  """Indices [batch_size] of the examples of one step.

  Epochs follow one another without a gap: a batch may hold the end of one and the start of the
  next, and every example comes exactly once an epoch.

  Args:
    key: PRNG key of the stream's order.
    step: [] integer; `step * batch_size` must stay below 2**32.
    batch_size: examples a step.
    size: number of examples.
  """
  drawn = step.astype(jnp.uint32) * jnp.uint32(batch_size) + jnp.arange(
      batch_size, dtype=jnp.uint32)
  position, keys = _places(drawn, jax.random.bits(key), size)
  return permute(position, size, keys).astype(jnp.int32)


def batch_indices_on_host(bits: np.ndarray, step: int, batch_size: int, size: int) -> np.ndarray:
  """What `batch_indices` gives, by numpy.

  Args:
    bits: [] uint32, `jax.random.bits` of the order's key.
    step: as there.
    batch_size: as there.
    size: as there.
  """
  drawn = np.arange(step * batch_size, (step + 1) * batch_size).astype(np.uint32)
  position, keys = _places(drawn, bits, size)
  scramble = _network(size, keys)
  places = scramble(position)
  while (outside := places >= size).any():
    places = np.where(outside, scramble(places), places)
  return places.astype(np.int32)
