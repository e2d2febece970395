"""Uncertainty weighting: each task learns how noisy it is."""

import jax
import jax.numpy as jnp

from mtl_jax.balancing import trained
from mtl_jax.balancing.balancer import Balancer


def uncertainty(init: float | jax.Array = 0.0,
                learning_rate: float | jax.Array = 0.025) -> Balancer:
  """Weighs tasks by their learned homoscedastic uncertainty.

  The rule: with `s = log σ²` learned beside the network, minimise
  `Σ ½ (L_i exp(-s_i) + s_i)`. So `w_i = ½ exp(-s_i)`, taken before the step, and Adam moves `s_i`
  against the gradient `½ (1 - L_i exp(-s_i))`; at rest `exp(s_i) = L_i`.

  Args:
    init: first value of every `s_i`, within [-30, 30], the range in which `s_i` stays.
    learning_rate: of the Adam that moves `s`; above 0.

  Returns:
    A balancer that needs the losses only; one backward pass. The `values` of its state are
    `s`; a task that is not active keeps its own.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, state = balancing.aggregate(uncertainty(), J, losses=jnp.array([2., 0.5]))
  >>> d.tolist()
  [1.0, 1.0, 1.0]
  >>> [round(float(s), 3) for s in state.values]
  [0.025, -0.025]

  Reference:
    Kendall, Gal, Cipolla: Multi-Task Learning Using Uncertainty to Weigh Losses for Scene
    Geometry and Semantics. CVPR 2018, arXiv:1705.07115.

  Differences:
    The paper halves the loss for regression only; like every public code we use one form for
    all tasks, with the half. Dropping it shifts `s` by log 2. LibMTL starts at -0.5 and trains
    `s` with the network's optimizer and weight decay; here, as in nash-mtl, `s` starts at 0 with
    its own learning rate, and nothing decays it. The bound on `s` is ours.
  """
  return trained.balancer(
      "uncertainty", init, learning_rate,
      weights=lambda s: 0.5 * jnp.exp(-s),
      gradient=lambda s, losses: 0.5 * (1 - losses * jnp.exp(-s)))
