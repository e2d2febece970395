"""Every random number comes from (seed, purpose, step): nothing to save, nothing repeated."""

import zlib

import jax


def purpose_key(seed: jax.typing.ArrayLike, purpose: str,
                step: jax.typing.ArrayLike = 0) -> jax.Array:
  """The PRNG key of one purpose at one step.

  Args:
    seed: [] integer, the run's seed.
    purpose: what the numbers are for, such as "dropout"; each purpose has its own sequence.
    step: [] integer.

  Returns:
    A typed PRNG key, the same wherever and whenever it is asked for.

  >>> import jax
  >>> a, b = purpose_key(0, "dropout", 3), purpose_key(0, "balancer", 3)
  >>> bool(jax.random.key_data(a)[0] == jax.random.key_data(b)[0])
  False
  """
  key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
  return jax.random.fold_in(key, step)
