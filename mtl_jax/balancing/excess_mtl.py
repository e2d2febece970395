"""ExcessMTL: tasks weigh more the further they are from the best they could do."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, masked
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, wide
from mtl_jax.balancing.graddrop import alongside

STARTS = ("record", "update")
STEEPEST = 30.0  # growth of log w in one step, which is a factor of 1e13 already


class ExcessMtlState(NamedTuple):
  """Weights, and what the excess risks are estimated from.

  Attributes:
    squares: pytree like the stacked task gradients, leaves [T, ...]: sums of squared gradients.
    log_weights: [T] logarithms of the weights, up to a common constant.
    first_excess: [T] each task's first excess risk; 0 until it has had a gradient.
  """

  squares: Any
  log_weights: jax.Array
  first_excess: jax.Array


def excess_mtl(learning_rate: float | jax.Array = 0.01, start: str = "record") -> Balancer:
  """Multiplies the weights by how much risk above the attainable each task still has.

  The rule: with `S_i ← S_i + g_i²` by coordinates, the excess risk is estimated, up to a factor,
  as `e_i = Σ g_i² / √S_i`; `w_i ∝ w_i exp(η e_i / e_i(first))` with `Σ w_i = n`, the number of
  active tasks, and `d = Σ w_i g_i`. Noise in the labels raises a loss, but not its excess risk.

  Args:
    learning_rate: η, above 0.
    start: at a task's first gradient, "record" `e_i` and leave the weight, or "update" it too, by
      `exp(η e_i)`.

  Returns:
    A balancer that needs the stacked task gradients and has a state of their size; it weighs
    the heads too. An absent task keeps all its state; so does, but for its share in the sum, one
    whose gradient is zero.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J, balancer = jnp.array([[2., 0.], [1., 0.]]), excess_mtl(learning_rate=1.0)
  >>> d, state = balancing.aggregate(balancer, J)
  >>> d.tolist()
  [3.0, 0.0]
  >>> d, state = balancing.aggregate(balancer, J[::-1], state=state)
  >>> [round(float(x), 4) for x in d]
  [3.6542, 0.0]

  Reference:
    He, Zhou, Zhang, Yun, Xu, Zeng, Chilimbi, Zhao: Robust Multi-Task Learning with Excess Risks.
    ICML 2024, arXiv:2402.02009.

  Differences:
    The defaults are those of the official code and LibMTL, where the first step only records;
    TorchJD updates at once, by default with `η = 1`, and its weights sum to one. They add 1e-7
    under the root or to the first excess; we leave zero gradients out. Weights are kept as
    logarithms, as in TorchJD 0.18. A step raises none by more than 30. The paper's warm-up, during
    which the weights rest, is the caller's.
  """
  hyperparameters.check_numbers("excess_mtl", "learning_rate", learning_rate, "a number above 0",
                                lambda array: array.ndim == 0 and array > 0)
  hyperparameters.check_choice("excess_mtl", "start", start, STARTS)

  def init(num_tasks: int, task_grads: Any) -> ExcessMtlState:
    squares = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, wide(leaf.dtype)), task_grads)
    zeros = jnp.zeros(num_tasks, wide(*(leaf.dtype for leaf in jax.tree.leaves(squares))))
    return ExcessMtlState(squares, zeros, zeros)

  def update(signals: Signals, state: ExcessMtlState) -> tuple[Decision, ExcessMtlState]:
    active, dtype = signals.active, state.log_weights.dtype
    rises = jax.tree.map(
        lambda leaf, old: jnp.where(alongside(active, leaf), leaf, 0).astype(old.dtype)**2,
        signals.task_grads, state.squares)
    squares = jax.tree.map(jnp.add, state.squares, rises)

    def excess_of(rise: jax.Array, square: jax.Array) -> jax.Array:
      coordinates = tuple(range(1, rise.ndim))
      parts = jnp.where(square > 0, rise / jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
      return jnp.sum(parts, axis=coordinates).astype(dtype)

    excess = sum(jax.tree.leaves(jax.tree.map(excess_of, rises, squares)))
    before = state.first_excess
    new = active & (before == 0)
    at_first = excess if start == "update" else jnp.zeros_like(excess)
    relative = jnp.where(new, at_first, excess / jnp.where(before > 0, before, 1))
    growth = jnp.minimum(jnp.asarray(learning_rate, dtype) * relative, STEEPEST)
    log_weights = jnp.where(active, state.log_weights + growth, state.log_weights)
    weights = masked.count(active, dtype) * masked.softmax(log_weights, active)
    first = jnp.where(new, excess, before)
    return Decision(weights), ExcessMtlState(squares, log_weights, first)

  return Balancer("excess_mtl", init, update, frozenset({"task_grads", "gradient_state"}),
                  scale_heads=True)
