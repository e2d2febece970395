"""IMTL-L: losses of one size, by a learned scale a task."""

import jax
import jax.numpy as jnp

from mtl_jax.balancing import trained
from mtl_jax.balancing.balancer import Balancer


def imtl_l(init: float | jax.Array = 0.0, learning_rate: float | jax.Array = 0.025) -> Balancer:
  """Learns one scale a task, until every scaled loss is one.

  The rule: with `s` learned beside the network, minimise `Σ exp(s_i) L_i - s_i`. So
  `w_i = exp(s_i)`, taken before the step, and Adam moves `s_i` against the gradient
  `exp(s_i) L_i - 1`; at rest `w_i = 1 / L_i`.

  Args:
    init: first value of every `s_i`, within [-30, 30], the range in which `s_i` stays.
    learning_rate: of the Adam that moves `s`; above 0.

  Returns:
    A balancer that needs the losses only; one backward pass. The `values` of its state are
    `s`; a task that is not active keeps its own.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, state = balancing.aggregate(imtl_l(), J, losses=jnp.array([2., 0.5]))
  >>> d.tolist()
  [2.0, 2.0, 2.0]
  >>> [round(float(s), 3) for s in state.values]
  [-0.025, 0.025]

  Reference:
    Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang: Towards Impartial Multi-task Learning.
    ICLR 2021.

  Differences:
    This is the paper's loss balance alone; LibMTL offers only its hybrid with the gradient
    balance, and trains `s` with the network's optimizer. Here `s` has its own Adam and no decay.
    It is twice `uncertainty` with `s` negated. The bound on `s` is ours.
  """
  return trained.balancer(
      "imtl_l", init, learning_rate,
      weights=jnp.exp,
      gradient=lambda s, losses: jnp.exp(s) * losses - 1)
