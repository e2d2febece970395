"""MOML: the weights are learned by multiple-gradient descent over the held-out losses."""

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, masked, trained
from mtl_jax.balancing.balancer import (Balancer, Decision, Lookahead, Signals, combine,
                                        gramian_of)
from mtl_jax.balancing.mgda import NORMALIZATIONS, mgda
from mtl_jax.balancing.trained import TrainedState


def moml(learning_rate: float | jax.Array = 1e-3, inner_learning_rate: float | jax.Array = 0.1,
         normalization: str = "l2") -> Balancer:
  """Multi-objective meta-learning: every task's held-out loss is an objective of the weights.

  The rule: with `w = softmax(a)`, `θ' = θ - α Σ w_i ∇L_i(θ)` on one half of the batch. On the
  other half the objectives are `L_j(θ')`, with gradients in `a`
  `h_j = -α (diag(w) - w wᵀ) [∇L_i(θ)·∇L_j(θ')]_i`. `mgda` combines the `h_j`, Adam moves `a`
  against the result, and the network takes its step on the first half with the new weights.

  Args:
    learning_rate: of the Adam that moves a; above 0.
    inner_learning_rate: α, above 0.
    normalization: of `mgda`.

  Returns:
    A balancer that needs a look-ahead: it cuts the batch in two, and adds to the step one more
    backward pass on the first half, and for each task a forward-mode pass on the first half and a
    backward pass on the second. Its state is [T] arrays; an inactive task keeps its own.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[2., 1.], [1., 0.]])  # a step along the first helps both objectives more
  >>> d, state = balancing.aggregate(moml(learning_rate=0.1), J)
  >>> [round(float(x), 4) for x in d], [round(float(x), 4) for x in state.values]
  ([1.5498, 0.5498], [0.1, -0.1])

  Reference:
    Ye, Lin, Yue, Guo, Xiao, Zhang: Multi-Objective Meta Learning. NeurIPS 2021,
    arXiv:2102.07121.

  Differences:
    The paper takes several inner steps and differentiates through all; LibMTL, as here, takes one,
    through which the derivative is exact. LibMTL draws the second batch, ours is half of the
    step's. Where the objectives' gradients cancel to a thousandth, the weights stay: Adam would
    make a step of full length out of what rounding leaves.
  """
  trained.check_rate("moml", "learning_rate", learning_rate)
  trained.check_rate("moml", "inner_learning_rate", inner_learning_rate)
  hyperparameters.check_choice("moml", "normalization", normalization, NORMALIZATIONS)
  combiner = mgda(normalization)

  def init(num_tasks: int) -> TrainedState:
    return trained.start_state(jnp.zeros(num_tasks, float))

  def update(signals: Signals, state: TrainedState) -> tuple[Decision, TrainedState]:
    logits, active = state.values, signals.active
    weights = masked.softmax(logits, active)
    slopes = masked.between(signals.ahead.slopes, active).astype(logits.dtype)
    slopes /= jnp.maximum(jnp.max(jnp.abs(slopes)), jnp.finfo(slopes.dtype).tiny)
    means = jnp.sum(weights[None] * slopes, axis=1, keepdims=True)
    rows = -jnp.asarray(inner_learning_rate, logits.dtype) * weights[None] * (slopes - means)
    products = gramian_of(rows)
    decision, _ = combiner.update(signals._replace(gramian=products), ())
    gradient = combine(rows, decision.weights)
    length = jnp.sum(jnp.abs(decision.weights) * jnp.sqrt(jnp.diagonal(products)))
    gradient = jnp.where(jnp.sqrt(jnp.sum(gradient * gradient)) > 1e-3 * length, gradient, 0)
    state = trained.step(state, gradient, learning_rate, active)
    return Decision(masked.softmax(state.values, active)), state

  return Balancer(
      "moml", init, update, frozenset({"losses", "lookahead"}), scale_heads=True, scale="mean",
      parts=2, lookahead=Lookahead(
          lambda state, active: masked.softmax(state.values, active), inner_learning_rate,
          objectives=lambda num_tasks: jnp.eye(num_tasks, dtype=float)))
