"""Trimmed mean: of each coordinate, the extremes do not count."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, no_state, wide
from mtl_jax.balancing.graddrop import alongside


def trimmed_mean(trim: int = 1) -> Balancer:
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
    gradients. LibMTL does not have the method.
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
      order = jnp.argsort(jnp.where(present, grads, jnp.inf), axis=0)
      ranks = jnp.argsort(order, axis=0).astype(jnp.int32)
      kept = jnp.where((ranks >= ends) & (ranks < count - ends), grads, 0)
      directions.append((jnp.sum(kept, axis=0) / left).astype(leaf.dtype))
      coordinates = tuple(range(1, leaf.ndim))
      overlaps += jnp.sum(kept * grads, axis=coordinates)
      squares += jnp.sum(grads * grads, axis=coordinates)
    shares = jnp.where(squares > 0, overlaps / jnp.where(squares > 0, squares, 1) / left,
                       1 / jnp.maximum(count, 1).astype(dtype))
    return Decision(jnp.where(active, shares, 0), jax.tree.unflatten(structure, directions)), state

  return Balancer("trimmed_mean", no_state, update, frozenset({"task_grads"}), scale="mean")
