"""IMTL-L: losses of one size, by a learned scale a task."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.balancing import masked, trained
from mtl_jax.balancing.balancer import Balancer, Decision, Signals


class ImtlLState(NamedTuple):
  """What the tasks have learned of their scale.

  Attributes:
    log_scale: [T] s, the logarithm of the weight.
    adam: Adam's moments and step counts, one a task: every leaf is [T].
  """

  log_scale: jax.Array
  adam: Any


def imtl_l(init: float | jax.Array = 0.0, learning_rate: float | jax.Array = 0.025) -> Balancer:
  """Learns one scale a task, until every scaled loss is one.

  The rule: with `s` learned beside the network, minimise `Σ exp(s_i) L_i - s_i`. So
  `w_i = exp(s_i)`, taken before the step, and Adam moves `s_i` against the gradient
  `exp(s_i) L_i - 1`; at rest `w_i = 1 / L_i`.

  Args:
    init: first value of every `s_i`, within [-30, 30], the range in which `s_i` stays.
    learning_rate: of the Adam that moves `s`; above 0.

  Returns:
    A balancer that needs the losses only; one backward pass. Its state is [T] arrays; a task
    that is not active keeps its own.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, state = balancing.aggregate(imtl_l(), J, losses=jnp.array([2., 0.5]))
  >>> d.tolist()
  [2.0, 2.0, 2.0]
  >>> [round(float(s), 3) for s in state.log_scale]
  [-0.025, 0.025]

  Reference:
    Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang: Towards Impartial Multi-task Learning.
    ICLR 2021.

  Differences:
    This is the paper's loss balance alone; LibMTL offers only its hybrid with the gradient
    balance, and trains `s` with the network's optimizer. Here `s` has its own Adam and no decay.
    It is twice `uncertainty` with `s` negated. The bound on `s` is ours.
  """
  trained.check("imtl_l", init, learning_rate)

  def init_state(num_tasks: int) -> ImtlLState:
    log_scale = jnp.full(num_tasks, init, dtype=float)
    return ImtlLState(log_scale, trained.start(log_scale))

  def update(signals: Signals, state: ImtlLState) -> tuple[Decision, ImtlLState]:
    log_scale = state.log_scale
    losses = masked.losses_of(signals.losses, signals.active, log_scale.dtype)
    weights = jnp.exp(log_scale)
    stepped = trained.descend(log_scale, state.adam, weights * losses - 1, learning_rate)
    state = masked.keep(signals.active, ImtlLState(*stepped), state)
    return Decision(jnp.where(signals.active, weights, 0)), state

  return Balancer("imtl_l", init_state, update, frozenset({"losses"}), scale_heads=True,
                  scale="own")
