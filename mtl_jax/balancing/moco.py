"""MoCo: weights follow the common descent direction of averaged gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, masked
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, combine, gramian_of, wide
from mtl_jax.balancing.graddrop import alongside

NORMALIZATIONS = ("none", "loss")
SIMPLEX = ("projection", "softmax")


class MocoState(NamedTuple):
  """Averaged gradients and the weights that follow them.

  Attributes:
    averages: pytree like the stacked task gradients, leaves [T, ...], float32 or wider.
    weights: [T] on the simplex.
    count: [T] int32, in how many steps each task was active.
  """

  averages: Any
  weights: jax.Array
  count: jax.Array


def moco(step: float | jax.Array = 0.5, weight_step: float | jax.Array = 0.1,
         step_power: float | jax.Array = 0.5, weight_step_power: float | jax.Array = 0.5,
         ridge: float | jax.Array = 0.0, normalization: str = "none",
         simplex: str = "projection") -> Balancer:
  """Averages each task's gradients over steps, and takes one weight step a step towards MGDA's.

  The rule: at a task's t-th step its average moves by `y_i ← y_i - β_t (y_i - g_i)` from zero,
  then `λ ← Π(λ - γ_t (Y Yᵀ + ρ) λ)` with the projection Π onto the simplex, and `d = Yᵀ λ`. Step
  sizes fall: `β_t = β / t^p`, `γ_t = γ / t^q`. The averages take the noise of the batches out of
  the weights, which would else be biased.

  Args:
    step: β in [0, 1].
    weight_step: γ, not negative. The gradients' scale counts: it multiplies their squares.
    step_power: p, not negative.
    weight_step_power: q, not negative.
    ridge: ρ, not negative; pulls towards equal weights.
    normalization: "none", or "loss": gradients enter as `L_i g_i / ‖g_i‖`.
    simplex: how λ gets back: "projection", or "softmax" of what the projection would be given.

  Returns:
    A balancer that needs the stacked task gradients and returns a direction, with a state of
    their size; its weights are λ over the active tasks. An absent task keeps average, weight
    and count, and the others share the rest of the weight.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, state = balancing.aggregate(moco(weight_step=0.01), J)
  >>> [round(float(x), 4) for x in state.weights], [round(float(x), 4) for x in d]
  ([0.5125, 0.4875], [0.4375, 0.5, 0.5])

  Reference:
    Fernando, Shen, Liu, Chaudhury, Murugesan, Chen: Mitigating Gradient Bias in Multi-objective
    Learning: A Provably Convergent Stochastic Approach. ICLR 2023, arXiv:2210.12624.

  Differences:
    LibMTL scales gradients by loss over norm and puts λ through a softmax after each step, which
    keeps it near equal weights: `moco(normalization="loss", simplex="softmax")`. Our default
    step sizes are LibMTL's, our projection is the paper's. TorchJD 0.18 does not have the method.
  """
  positive = lambda array: array.ndim == 0 and array >= 0
  hyperparameters.check_numbers("moco", "step", step, "a number in [0, 1]",
                                lambda array: array.ndim == 0 and 0 <= array <= 1)
  for argument, value in (("weight_step", weight_step), ("step_power", step_power),
                          ("weight_step_power", weight_step_power), ("ridge", ridge)):
    hyperparameters.check_numbers("moco", argument, value, "a number not below 0", positive)
  hyperparameters.check_choice("moco", "normalization", normalization, NORMALIZATIONS)
  hyperparameters.check_choice("moco", "simplex", simplex, SIMPLEX)

  def init(num_tasks: int, task_grads: Any) -> MocoState:
    averages = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, wide(leaf.dtype)), task_grads)
    return MocoState(averages, jnp.full(num_tasks, 1 / num_tasks, float),
                     jnp.zeros(num_tasks, jnp.int32))

  def update(signals: Signals, state: MocoState) -> tuple[Decision, MocoState]:
    active = signals.active
    count = state.count + active.astype(jnp.int32)
    grads = jax.tree.map(
        lambda leaf, old: jnp.where(alongside(active, leaf), leaf, 0).astype(old.dtype),
        signals.task_grads, state.averages)
    if normalization == "loss":
      grads = with_norms(grads, jnp.where(active, jnp.abs(signals.losses), 0))

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
      rate = alongside(jnp.where(active, falling(step, step_power, count, old.dtype), 0), old)
      return old - rate * (old - new)

    averages = jax.tree.map(average, state.averages, grads)
    present = jax.tree.map(lambda leaf: jnp.where(alongside(active, leaf), leaf, 0), averages)
    gramian = gramian_of(present)
    dtype = gramian.dtype

    weights = masked.shares(state.weights, active, dtype)
    slope = jnp.matmul(gramian, weights, precision=jax.lax.Precision.HIGHEST)
    slope += jnp.asarray(ridge, dtype) * weights
    moved = weights - falling(weight_step, weight_step_power, count, dtype) * slope
    back = masked.project_to_simplex if simplex == "projection" else masked.softmax
    weights = back(moved, active)

    kept = masked.with_shares(state.weights, weights, active)
    direction = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype),
                             combine(present, weights), signals.task_grads)
    return Decision(weights, direction), MocoState(averages, kept, count)

  return Balancer("moco", init, update, frozenset({"task_grads", "gradient_state"}), scale="own")


def falling(start: float | jax.Array, power: float | jax.Array, count: jax.Array,
            dtype: Any) -> jax.Array:
  """Step sizes [T] that start at `start` and fall with a power of the counts [T]."""
  return jnp.asarray(start, dtype) / jnp.maximum(count, 1).astype(dtype) ** jnp.asarray(power,
                                                                                       dtype)


def with_norms(grads: Any, norms: jax.Array) -> Any:
  """Stacked gradients scaled to norms [T]; zero gradients stay zero."""
  found = jnp.sqrt(jnp.diagonal(gramian_of(grads)))
  factors = jnp.where(found > 0, norms.astype(found.dtype) / jnp.where(found > 0, found, 1), 0)
  return jax.tree.map(lambda leaf: leaf * alongside(factors, leaf).astype(leaf.dtype), grads)
