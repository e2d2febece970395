"""FAMO: every loss falls at the same rate, with one more forward pass a step."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, masked, trained
from mtl_jax.balancing.balancer import Balancer, Decision, Signals

EPSILON = 1e-8  # added to what a loss exceeds its minimum by


class FamoState(NamedTuple):
  """What the tasks have learned of their weights.

  Attributes:
    logits: [T] ξ, logits of the weights.
    log_losses: [T] logarithm of what the losses of the last update exceed their minima by.
    adam: Adam's moments and step counts, one a task: every leaf is [T].
  """

  logits: jax.Array
  log_losses: jax.Array
  adam: Any


def famo(learning_rate: float | jax.Array = 0.025, weight_decay: float | jax.Array = 1e-3,
         min_losses: float | Sequence[float] | jax.Array = 0.0) -> Balancer:
  """Fast adaptive multi-task optimisation: the weights learn to let the slowest task catch up.

  The rule: with `z = softmax(ξ)`, what a loss exceeds its minimum by `D_i = L_i - b_i + 1e-8`,
  `w` is the gradient of `c Σ z_i log D_i`, where `c` makes it a convex combination:
  `w_i ∝ z_i / D_i`, `Σ w_i = 1`. After the step, on the same batch, `δ_i` is by how much `log D_i`
  fell, and Adam moves `ξ` against `z_i (δ_i - Σ z_j δ_j) + γ ξ_i`: who fell least gains weight.

  Args:
    learning_rate: of the Adam that moves ξ; above 0.
    weight_decay: γ, from 0 on.
    min_losses: b, a number or one a task: what no loss falls below.

  Returns:
    A balancer that needs the losses before and after the step: one backward pass and a second
    forward pass. Its state is [T] arrays; a task that is not active keeps its own.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J, active = jnp.array([[-4., 1., 1.], [6., 1., 1.]]), jnp.array([True, True])
  >>> d, state = balancing.aggregate(famo(), J, losses=jnp.array([1., 2.]))
  >>> [round(float(x), 4) for x in d]
  [-0.6667, 1.0, 1.0]
  >>> state = famo().after_step(jnp.array([0.5, 1.5]), active, state)
  >>> [round(float(x), 3) for x in state.logits]
  [-0.025, 0.025]

  Reference:
    Liu, Feng, Stone, Liu: FAMO: Fast Adaptive Multitask Optimization. NeurIPS 2023,
    arXiv:2306.03792.

  Differences:
    The official decays range from 1e-5 to 0.01; LibMTL and TorchJD have 1e-3, as here. The
    official code also clips the norm of the shared gradient at 1, which is left to the optimizer
    here. A loss below its minimum counts as the minimum. ξ stays within [-30, 30].
  """
  trained.check_rate("famo", "learning_rate", learning_rate)
  hyperparameters.check_numbers("famo", "weight_decay", weight_decay, "a number from 0 on",
                                lambda array: array.ndim == 0 and array >= 0)
  hyperparameters.check_numbers("famo", "min_losses", min_losses, "a finite number, or one a task",
                                lambda array: array.ndim <= 1)

  def init(num_tasks: int) -> FamoState:
    hyperparameters.check_length("famo", "min_losses", min_losses, num_tasks)
    zeros = jnp.zeros(num_tasks, float)
    return FamoState(zeros, zeros, trained.start(zeros))

  def log_of(losses: jax.Array, active: jax.Array, dtype: Any) -> jax.Array:
    excess = masked.losses_of(losses, active, dtype) - jnp.asarray(min_losses, dtype)
    return jnp.log(jnp.maximum(excess, 0) + EPSILON)

  def update(signals: Signals, state: FamoState) -> tuple[Decision, FamoState]:
    logs = log_of(signals.losses, signals.active, state.logits.dtype)
    weights = masked.softmax(state.logits - logs, signals.active)
    return Decision(weights), state._replace(
        log_losses=jnp.where(signals.active, logs, state.log_losses))

  def after_step(losses: jax.Array, active: jax.Array, state: FamoState) -> FamoState:
    falls = state.log_losses - log_of(losses, active, state.logits.dtype)
    shares = masked.softmax(state.logits, active)
    gradient = shares * (falls - jnp.sum(shares * falls))
    gradient += jnp.asarray(weight_decay, gradient.dtype) * state.logits
    logits, adam = trained.descend(state.logits, state.adam, gradient, learning_rate)
    return masked.keep(active, state._replace(logits=logits, adam=adam), state)

  return Balancer("famo", init, update, frozenset({"losses", "losses_after_step"}),
                  scale_heads=True, scale="mean", after_step=after_step)
