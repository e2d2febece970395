"""Revised uncertainty weighting: a regulariser that cannot turn negative."""

import jax
import jax.numpy as jnp

from mtl_jax.balancing import trained
from mtl_jax.balancing.balancer import Balancer


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
    A balancer that needs the losses only; one backward pass. The `values` of its state are
    `s`; a task that is not active keeps its own.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, state = balancing.aggregate(revised_uncertainty(), J, losses=jnp.array([2., 0.5]))
  >>> d.tolist()
  [1.0, 1.0, 1.0]
  >>> [round(float(s), 3) for s in state.values]
  [0.025, -0.025]

  Reference:
    Liebel, Körner: Auxiliary Tasks in Multi-task Learning. 2018, arXiv:1805.06334.

  Differences:
    The paper learns `c` itself, on which a step may cross zero, where the weight is infinite; we
    learn its logarithm, as `uncertainty` does, which has the same minima. `c` starts at 1, with
    its own learning rate. The bound on `s` is ours.
  """
  return trained.balancer(
      "revised_uncertainty", init, learning_rate,
      weights=lambda s: 0.5 * jnp.exp(-s),
      gradient=lambda s, losses: jax.nn.sigmoid(s) - 0.5 * losses * jnp.exp(-s))
