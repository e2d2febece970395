"""The order of examples: a new permutation every epoch, computed position by position.

A permutation is evaluated at a position without being stored, so that a compiled step can draw its
batch from (seed, step) alone: nothing to save, nothing to sort.
"""

import jax
import jax.numpy as jnp

_ROUNDS = 8


def _mix(x: jax.Array) -> jax.Array:
  """A 32-bit avalanche: every input bit flips about half of the output bits."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def permute(positions: jax.Array, size: int, keys: jax.Array) -> jax.Array:
  """Where a keyed permutation of 0 … size - 1 sends each position.

  An eight-round Feistel network over the next even number of bits, walked along its cycle until
  the result is below `size` (Black and Rogaway, CT-RSA 2002).

  Args:
    positions: [B] uint32, below `size`.
    size: number of examples, at most 2**30.
    keys: [B] uint32, one permutation for each value.

  Returns:
    [B] uint32.

  >>> sorted(permute(jnp.arange(5, dtype=jnp.uint32), 5, jnp.zeros(5, jnp.uint32)).tolist())
  [0, 1, 2, 3, 4]
  """
  half = max((size - 1).bit_length() + 1, 2) // 2
  mask = jnp.uint32((1 << half) - 1)

  def scramble(x):
    left, right = x >> half, x & mask
    for i in range(_ROUNDS):
      round_key = _mix(keys + jnp.uint32(0x9E3779B9) * jnp.uint32(i + 1))
      left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << half) | right

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
  epoch, position = drawn // jnp.uint32(size), drawn % jnp.uint32(size)
  keys = _mix(jax.random.bits(key) ^ _mix(epoch))
  return permute(position, size, keys).astype(jnp.int32)
