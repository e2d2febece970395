"""DB-MTL: logarithms balance the losses, equal norms the gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, combine, wide
from mtl_jax.balancing.graddrop import alongside

SMALLEST = 1e-8  # added to a loss before its logarithm
LARGEST = 1e30  # weight


class DbMtlState(NamedTuple):
  """Averaged gradients of the losses' logarithms.

  Attributes:
    averages: pytree like the stacked task gradients, leaves [T, ...], float32 or wider.
    count: [T] int32, in how many steps each task was active.
  """

  averages: Any
  count: jax.Array


def db_mtl(decay: float | jax.Array = 0.9, decay_power: float | jax.Array = 0.0) -> Balancer:
  """Sums the averaged gradients of the logarithms of the losses, all as long as the longest.

  The rule: with `h_i = g_i / (L_i + 1e-8)` the gradient of the logarithm, at a task's t-th step
  `b_i ← β_t b_i + (1 - β_t) h_i` from zero, `β_t = decay / t^decay_power`; then
  `d = Σ b_i max_j ‖b_j‖ / ‖b_i‖`.

  Args:
    decay: share in [0, 1) of the old average that stays.
    decay_power: not negative; with 0 the decay is constant.

  Returns:
    A balancer that needs the stacked task gradients, looks at the losses and returns a
    direction, with a state of their size. It reports as weights `max_j ‖b_j‖ / ‖b_i‖`, one where
    `b_i` is zero and 1e30 at most. An absent task keeps its average and its count.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, _ = balancing.aggregate(db_mtl(), J)
  >>> [round(float(x), 4) for x in d]
  [0.0188, 0.2453, 0.2453]

  Reference:
    Lin, Jiang, Ye, Zhang, Chen, Chen, Liu, Kwok: Dual-Balancing for Multi-Task Learning. 2023,
    arXiv:2308.12029.

  Differences:
    In LibMTL, too, the average starts at zero and is not corrected, so that the first step is
    `1 - decay` of what it would be. Its heads receive the gradients of the logarithms; here they
    get those of the losses, like under every method that looks at gradients. It adds 1e-8 to
    norms, we leave zero gradients out. A loss enters by its absolute value. TorchJD does not
    have the method.
  """
  hyperparameters.check_numbers("db_mtl", "decay", decay, "a number in [0, 1)",
                                lambda array: array.ndim == 0 and 0 <= array < 1)
  hyperparameters.check_numbers("db_mtl", "decay_power", decay_power, "a number not below 0",
                                lambda array: array.ndim == 0 and array >= 0)

  def init(num_tasks: int, task_grads: Any) -> DbMtlState:
    averages = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, wide(leaf.dtype)), task_grads)
    return DbMtlState(averages, jnp.zeros(num_tasks, jnp.int32))

  def update(signals: Signals, state: DbMtlState) -> tuple[Decision, DbMtlState]:
    active = signals.active
    count = state.count + active.astype(jnp.int32)
    losses = jnp.where(active, jnp.abs(signals.losses) + SMALLEST, 1)

    def average(old: jax.Array, leaf: jax.Array) -> jax.Array:
      dtype, present = old.dtype, alongside(active, leaf)
      grads = jnp.where(present, leaf, 0).astype(dtype) / alongside(losses, leaf).astype(dtype)
      steps = jnp.maximum(count, 1).astype(dtype)
      keep = alongside(jnp.asarray(decay, dtype) / steps ** jnp.asarray(decay_power, dtype), leaf)
      return jnp.where(present, grads + keep * (old - grads), old)

    averages = jax.tree.map(average, state.averages, signals.task_grads)
    present = jax.tree.map(lambda leaf: jnp.where(alongside(active, leaf), leaf, 0), averages)
    norms = norms_of(present)
    weights = jnp.where(norms > 0, jnp.max(norms) / jnp.where(norms > 0, norms, 1), 1)
    weights = jnp.where(active, jnp.minimum(weights, LARGEST), 0)
    direction = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype),
                             combine(present, weights), signals.task_grads)
    return Decision(weights, direction), DbMtlState(averages, count)

  return Balancer("db_mtl", init, update, frozenset({"task_grads", "gradient_state"}), scale="own")


def norms_of(grads: Any) -> jax.Array:
  """Norms [T] of stacked gradients whose squares may overflow, as where a loss is zero."""
  leaves = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(grads)]
  dtype = wide(*(leaf.dtype for leaf in leaves))
  largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf), axis=1, initial=0).astype(dtype)
                               for leaf in leaves]), axis=0)
  units = jnp.where(largest > 0, largest, 1)
  parts = [leaf.astype(dtype) / units[:, None] for leaf in leaves]
  return units * jnp.sqrt(sum(jnp.sum(part**2, axis=1) for part in parts))
