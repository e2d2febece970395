"""MoDo: weights from two independent samples, a step along a third."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, masked
from mtl_jax.balancing.balancer import Balancer, Decision, Signals


class ModoState(NamedTuple):
  """State of `modo`."""

  weights: jax.Array  # shape=(T,), λ, sums to one


def modo(weight_step: float | jax.Array = 1e-3, ridge: float | jax.Array = 0.1) -> Balancer:
  """Multi-objective descent with double sampling: one step of the dual problem a step.

  The rule: with gradients `J₀`, `J₁`, `J₂` of three independent samples,
  `λ ← Π(λ - γ (J₁ J₂ᵀ λ + ρ λ))`, where `Π` projects onto the simplex, and `d = J₀ᵀ λ`. As
  `J₁` and `J₂` are independent, the step of `λ` is unbiased.

  Args:
    weight_step: γ, not negative.
    ridge: ρ, not negative.

  Returns:
    A balancer that needs the inner products between parts of the batch, which it cuts in three:
    together they cost what one batch of that size costs a method on the Gramian, and the step
    follows a third of it. One product of these is all that it reads, so that it loses nothing
    where it works from products. Its state is [T].

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, state = balancing.aggregate(modo(), J)
  >>> [round(float(x), 4) for x in d], [round(float(x), 4) for x in state.weights]
  ([0.95, 1.0, 1.0], [0.505, 0.495])

  Reference:
    Chen, Fernando, Ying, Chen: Three-Way Trade-Off in Multi-Objective Learning: Optimization,
    Generalization and Conflict-Avoidance. NeurIPS 2023, arXiv:2305.20057.

  Differences:
    Defaults are LibMTL's; TorchJD steps by 0.1, which leaps between vertices for gradients longer
    than one. Both draw three batches of full size, where ours shares one: multiply the batch size
    by three for the same samples. LibMTL divides the gradients of the heads by three, since it
    adds up three batches; here the heads see the part that the step follows.
  """
  for argument, value in (("weight_step", weight_step), ("ridge", ridge)):
    hyperparameters.check_numbers("modo", argument, value, "a number not below 0",
                                  lambda array: array.ndim == 0 and array >= 0)

  def init(num_tasks: int) -> ModoState:
    return ModoState(jnp.full(num_tasks, 1 / num_tasks, float))

  def update(signals: Signals, state: ModoState) -> tuple[Decision, ModoState]:
    active = signals.active
    weights = masked.shares(state.weights, active, state.weights.dtype)
    if signals.cross_gramian is None:
      slope = jnp.where(active, signals.products(weights, 1, 2), 0)
    else:
      cross = masked.between(signals.cross_gramian[1][2], active)
      weights = weights.astype(cross.dtype)
      slope = jnp.matmul(cross, weights, precision=jax.lax.Precision.HIGHEST)
    slope += jnp.asarray(ridge, slope.dtype) * weights
    weights = masked.project_to_simplex(
        weights - jnp.asarray(weight_step, slope.dtype) * slope, active)
    return Decision(weights), ModoState(masked.with_shares(state.weights, weights, active))

  balancer = Balancer("modo", init, update, frozenset({"cross_gramian"}), scale="mean", parts=3)
  return balancer._replace(
      by_products=lambda count: balancer._replace(needs=frozenset({"products"})))
