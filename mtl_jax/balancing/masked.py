"""Arithmetic over the tasks that are active, on losses of any size."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing.balancer import wide

SMALLEST = 1e-20  # what a smaller loss counts as, wherever it is divided by or its log taken
LARGEST_LOG = 80.0  # of a weight: exp(80) is still a float32
LOWEST_SHARE = -80.0  # log of a share; a float32 share would be lost for good soon after


def losses_of(losses: jax.Array, active: jax.Array, dtype: Any = None) -> jax.Array:
  """Losses [T] in a dtype, by default their own or float32; 0 where inactive."""
  return jnp.where(active, losses, 0).astype(wide(losses.dtype) if dtype is None else dtype)


def positive(losses: jax.Array, active: jax.Array, dtype: Any = None) -> jax.Array:
  """Losses [T], none below `SMALLEST`; 1 where inactive.

  >>> positive(jnp.array([2., 0., -1.]), jnp.array([True, False, True])).tolist()
  [2.0, 1.0, 9.999999682655225e-21]
  """
  return jnp.where(active, jnp.maximum(losses_of(losses, active, dtype), SMALLEST), 1)


def count(active: jax.Array, dtype: Any) -> jax.Array:
  """How many tasks are active; 1 where none is, so that one can divide by it."""
  return jnp.maximum(jnp.sum(active, dtype=dtype), 1)


def mean(values: jax.Array, active: jax.Array) -> jax.Array:
  """Mean of the active tasks' values; 0 where none is."""
  return jnp.sum(jnp.where(active, values, 0) / count(active, values.dtype))


def softmax(logits: jax.Array, active: jax.Array, temperature: Any = 1.0) -> jax.Array:
  """Softmax over the active tasks of `logits / temperature`; 0 elsewhere.

  >>> softmax(jnp.array([5., 1., 5.]), jnp.array([True, True, False]), 1e-30).tolist()
  [1.0, 0.0, 0.0]
  """
  _, powers = _powers(logits, active, temperature)
  return powers / jnp.maximum(jnp.sum(powers), 1)  # the largest power is 1


def difference(values: jax.Array, others: jax.Array) -> jax.Array:
  """`values - others`, zero where it is rounding.

  A product that goes into a subtraction may be left unrounded by the compiler: its difference to
  itself is then not zero, and for large numbers not small.
  """
  gap = values - others
  noise = 4 * jnp.finfo(gap.dtype).eps * jnp.minimum(jnp.abs(values), jnp.abs(others))
  return jnp.where(jnp.abs(gap) > noise, gap, 0)


def unit(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The vector over its norm, and the norm, without overflow; zero stays zero."""
  largest = jnp.max(jnp.abs(vector))
  scaled = vector / jnp.where(largest > 0, largest, 1)
  norm = jnp.sqrt(jnp.sum(scaled * scaled))
  longest = jnp.finfo(vector.dtype).max
  return scaled / jnp.where(norm > 0, norm, 1), jnp.minimum(largest * norm, longest)


def scale_shares(log_shares: jax.Array, exponents: jax.Array, active: jax.Array) -> jax.Array:
  """Multiplies active tasks' shares by `exp(exponents)`; together they keep what they had.

  Args:
    log_shares: [T] logarithms of shares that sum to one over all tasks.
    exponents: [T].
    active: [T].

  Returns:
    [T] new logarithms, none below `LOWEST_SHARE`; those of inactive tasks do not change.
  """
  moved = log_shares + jnp.clip(exponents, -1e30, 1e30)
  moved += _log_sum(log_shares, active) - _log_sum(moved, active)
  return jnp.where(active, jnp.maximum(moved, LOWEST_SHARE), log_shares)


def between(matrix: jax.Array, active: jax.Array) -> jax.Array:
  """A matrix [T, T] with 0 in the rows and columns of inactive tasks."""
  return jnp.where(active[:, None] & active[None], matrix, 0)


def shares(weights: jax.Array, active: jax.Array, dtype: Any) -> jax.Array:
  """Weights [T] of a simplex, scaled to sum to one over the active tasks; 0 elsewhere."""
  total = jnp.sum(weights, where=active)
  scaled = (weights / jnp.where(total > 0, total, 1)).astype(dtype)
  return jnp.where(active, jnp.where(total > 0, scaled, 1 / count(active, dtype)), 0)


def with_shares(weights: jax.Array, new: jax.Array, active: jax.Array) -> jax.Array:
  """Weights [T] of a simplex in which the active tasks share what they had in a new way.

  >>> with_shares(jnp.array([0.5, 0.25, 0.25]), jnp.array([0.2, 0.8, 0.0]),
  ...             jnp.array([True, True, False])).tolist()
  [0.15000000596046448, 0.6000000238418579, 0.25]
  """
  total = jnp.sum(weights, where=active)
  return jnp.where(active, (new * total.astype(new.dtype)).astype(weights.dtype), weights)


def project_to_simplex(values: jax.Array, active: jax.Array) -> jax.Array:
  """The nearest point to values [T] with entries `≥ 0` of sum 1; 0 where inactive.

  >>> w = project_to_simplex(jnp.array([0.5, 0.1, 9., 0.1]), jnp.array([True, True, False, True]))
  >>> [round(float(x), 4) for x in w]
  [0.6, 0.2, 0.0, 0.2]
  """
  highest = jnp.max(jnp.where(active, values, -jnp.inf))
  # Entries one below the highest or lower end at zero; how far below does not matter.
  values = jnp.where(active, jnp.maximum(values - highest, -2), -2)
  descending = -jnp.sort(-values)
  number = jnp.arange(1, len(values) + 1).astype(values.dtype)
  shifts = (jnp.cumsum(descending) - 1) / number
  shift = shifts[jnp.sum(descending > shifts, dtype=jnp.int32) - 1]
  return jnp.where(active, jnp.maximum(values - shift, 0), 0)


def keep(active: jax.Array, new: Any, old: Any) -> Any:
  """The new state of active tasks and the old one of the others; leaves [T]."""
  return jax.tree.map(lambda n, o: jnp.where(active, n, o), new, old)


def _powers(logits: jax.Array, active: jax.Array,
            temperature: Any = 1.0) -> tuple[jax.Array, jax.Array]:
  """The largest active logit, and exponentials relative to it; 0 where inactive."""
  top = jnp.max(jnp.where(active, logits, jnp.finfo(logits.dtype).min))
  scaled = difference(logits, top) / jnp.asarray(temperature, logits.dtype)
  return top, jnp.where(active, jnp.exp(jnp.where(active, scaled, 0)), 0)


def _log_sum(logits: jax.Array, active: jax.Array) -> jax.Array:
  """Logarithm of the sum of the active tasks' exponentials."""
  top, powers = _powers(logits, active)
  return top + jnp.log(jnp.maximum(jnp.sum(powers), 1))
