"""Revised uncertainty weighting: a regulariser that cannot turn negative."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.balancing import masked, trained
from mtl_jax.balancing.balancer import Balancer, Decision, Signals


class RevisedUncertaintyState(NamedTuple):
  """What the tasks have learned of their noise.

  Attributes:
    log_variance: [T] s = log c².
    adam: Adam's moments and step counts, one a task: every leaf is [T].
  """

  log_variance: jax.Array
  adam: Any


def revised_uncertainty(init: float | jax.Array = 0.0,
                        learning_rate: float | jax.Array = 0.025) -> Balancer:
  """Weighs tasks by a learned uncertainty, whose price is never below zero.

  The rule: with `c_i` learned beside the network, minimise `Σ L_i / (2 c_i²) + log(1 + c_i²)`. So
  `w_i = 1 / (2 c_i²)`, taken before the step. With `s = log c²`, Adam moves `s_i` against the
  gradient `σ(s_i) - ½ L_i exp(-s_i)`; at rest `c_i² = (L_i + √(L_i² + 8 L_i)) / 4`.

  Args:
    init: first value of every `s_i`, within [-30, 30], the range in which `s_i` stays.
    learning_rate: of the Adam that moves `s`; above 0.

  Returns:
    A balancer that needs the losses only; one backward pass. Its state is [T] arrays; a task
    that is not active keeps its own.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, state = balancing.aggregate(revised_uncertainty(), J, losses=jnp.array([2., 0.5]))
  >>> d.tolist()
  [1.0, 1.0, 1.0]
  >>> [round(float(s), 3) for s in state.log_variance]
  [0.025, -0.025]

  Reference:
    Liebel, Körner: Auxiliary Tasks in Multi-task Learning. 2018, arXiv:1805.06334.

  Differences:
    The paper learns `c` itself, on which a step may cross zero, where the weight is infinite; we
    learn its logarithm, as `uncertainty` does, which has the same minima. `c` starts at 1, with
    its own learning rate. The bound on `s` is ours.
  """
  trained.check("revised_uncertainty", init, learning_rate)

  def init_state(num_tasks: int) -> RevisedUncertaintyState:
    log_variance = jnp.full(num_tasks, init, dtype=float)
    return RevisedUncertaintyState(log_variance, trained.start(log_variance))

  def update(signals: Signals,
             state: RevisedUncertaintyState) -> tuple[Decision, RevisedUncertaintyState]:
    log_variance = state.log_variance
    losses = masked.losses_of(signals.losses, signals.active, log_variance.dtype)
    weights = 0.5 * jnp.exp(-log_variance)
    gradient = jax.nn.sigmoid(log_variance) - losses * weights
    stepped = trained.descend(log_variance, state.adam, gradient, learning_rate)
    state = masked.keep(signals.active, RevisedUncertaintyState(*stepped), state)
    return Decision(jnp.where(signals.active, weights, 0)), state

  return Balancer("revised_uncertainty", init_state, update, frozenset({"losses"}),
                  scale_heads=True, scale="own")
