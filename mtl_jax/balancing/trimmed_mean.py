"""Trimmed mean: of each coordinate, the extremes do not count."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, no_state, wide
from mtl_jax.balancing.graddrop import alongside


def trimmed_mean(trim: int | jax.Array = 1) -> Balancer:
  """Averages in each coordinate what is left without the largest and the smallest gradients.

  The rule, coordinate by coordinate: drop the `trim` largest and the `trim` smallest values of
  the n active tasks, and average the other `n - 2 trim`.

  Args:
    trim: how many to drop at either end; an integer not below 0.

  Returns:
    A balancer that needs the stacked task gradients and returns a direction in their dtypes. If
    less than one value would be left, as many are dropped as leave one or two: with one task or
    two it is the mean. It reports as weights the share of each gradient that was kept,
    `⟨kept_i, g_i⟩ / ‖g_i‖²` over the number kept; for a zero gradient, 1/n.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[1e11, 3.], [1., -1e11], [-1e10, 1e10], [2., 2.]])
  >>> d, _ = balancing.aggregate(trimmed_mean(), J)
  >>> d.tolist()
  [1.5, 2.5]

  Reference:
    Yin, Chen, Ramchandran, Bartlett: Byzantine-Robust Distributed Learning: Towards Optimal
    Statistical Rates. ICML 2018, arXiv:1803.01498.

  Differences:
    The paper gives the share to drop, TorchJD the number, as here; TorchJD fails with too few
    gradients. LibMTL does not have the method. Ours alone: what is NaN counts as infinite, and
    so as largest, and equal values share alike what is kept of them.
  """
  hyperparameters.check_numbers("trimmed_mean", "trim", trim, "an integer not below 0",
                                lambda array: array.ndim == 0 and array >= 0 and array % 1 == 0)

  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    active = signals.active
    leaves, structure = jax.tree.flatten(signals.task_grads)
    dtype = wide(*(leaf.dtype for leaf in leaves))
    count = jnp.sum(active, dtype=jnp.int32)
    ends = jnp.minimum(jnp.asarray(trim).astype(jnp.int32), jnp.maximum(count - 1, 0) // 2)
    left = jnp.maximum(count - 2 * ends, 1).astype(dtype)
    directions = []
    overlaps = squares = jnp.zeros(active.shape, dtype)
    for leaf in leaves:
      present = alongside(active, leaf)
      grads = jnp.where(present, leaf, 0).astype(dtype)
      grads = jnp.where(jnp.isnan(grads), jnp.inf, grads)
      share = kept_shares(jnp.where(present, grads, jnp.inf), count, ends)
      kept = jnp.where(share > 0, share * grads, 0)
      directions.append((jnp.sum(kept, axis=0) / left).astype(leaf.dtype))
      coordinates = tuple(range(1, leaf.ndim))
      overlaps += jnp.sum(jnp.where(share > 0, kept * grads, 0), axis=coordinates)
      squares += jnp.sum(grads * grads, axis=coordinates)
    shares = jnp.where(squares > 0, overlaps / jnp.where(squares > 0, squares, 1) / left,
                       1 / jnp.maximum(count, 1).astype(dtype))
    return Decision(jnp.where(active, shares, 0), jax.tree.unflatten(structure, directions)), state

  return Balancer("trimmed_mean", no_state, update, frozenset({"task_grads"}), scale="mean")


def kept_shares(values: jax.Array, count: jax.Array, ends: jax.Array) -> jax.Array:
  """How much of each value is left, 0 to 1, when the largest and the smallest are dropped.

  Ranks are counted by comparing each task with every other, which takes far less time than
  sorting short columns does.

  Args:
    values: [T, ...] without NaN; infinite where a task takes no part.
    count: [] int32, how many tasks take part.
    ends: [] int32, how many to drop at either end of a column.

  Returns:
    [T, ...] shares, `count - 2 ends` in each column; where only some of several equal values are
    dropped, each has the same share.

  >>> values = jnp.array([[5.], [1.], [5.], [9.], [5.]])
  >>> [round(float(share), 4) for share in kept_shares(values, jnp.int32(5), jnp.int32(1))[:, 0]]
  [1.0, 0.0, 1.0, 0.0, 1.0]
  >>> [round(float(share), 4) for share in kept_shares(values, jnp.int32(5), jnp.int32(2))[:, 0]]
  [0.3333, 0.0, 0.3333, 0.0, 0.3333]
  """
  def compare(task: jax.Array, counts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    below, upto = counts
    value = values[task][None]
    return below + (value < values).astype(jnp.int32), upto + (value <= values).astype(jnp.int32)

  zeros = jnp.zeros(values.shape, jnp.int32)
  below, upto = jax.lax.fori_loop(0, len(values), compare, (zeros, zeros))
  kept = jnp.minimum(upto, count - ends) - jnp.maximum(below, ends)  # ranks below … upto - 1
  return jnp.maximum(kept, 0).astype(values.dtype) / (upto - below).astype(values.dtype)
