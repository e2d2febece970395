"""FairGrad: α-fair shares of the progress."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, solvers
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, no_state


def fairgrad(alpha: float | jax.Array = 2.0) -> Balancer:
  """Takes the direction that is α-fair in the tasks' gains.

  The rule: the `d` in a ball with the largest `Σ (g_i·d)^(1-α) / (1-α)` is, up to its length,
  `Σ w_i g_i` with `(G w)_i = w_i^(-1/α)` and `w > 0`. Every gain `g_i·d` is positive: no task
  conflicts. α near 0 follows the sum of the gains, 1 is proportional fairness, which is Nash-MTL
  without its norm limit, 2 minimises the potential delay, and a large α evens the gains out.

  Args:
    alpha: above 0. The default is that of the official experiments. Up to 2 the norms may be
      eight decades apart, at 4 two, for the equations to be met.

  Returns:
    A balancer that needs the Gramian. With equal gradients `g` of T tasks `d` is
    `T^(1/(1+α)) ‖g‖^(-2α/(1+α)) g`: the smaller the gradients, the larger the weights. A task
    whose gradient is zero weighs 0; if all are zero, the active tasks weigh the same, 1 in total.
    Where a convex combination of the gradients is zero no solution exists; the weights then stay
    finite and `d` is small.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, _ = balancing.aggregate(fairgrad(), J)
  >>> [round(float(x), 4) for x in d]
  [0.0313, 0.7908, 0.7908]

  Reference:
    Ban, Ji: Fair Resource Allocation in Multi-Task Learning. ICML 2024, arXiv:2402.15638.

  Differences:
    The official code multiplies `d` by T, clips its norm at 1 and leaves the heads unweighted;
    LibMTL defaults to α = 1 and weighs the heads, without factor or clip; TorchJD, as here, does
    none of these, and has no default α. All call a least-squares solver on the host; here
    Newton's method runs on the device.
  """
  hyperparameters.check_numbers("fairgrad", "alpha", alpha, "a number above 0",
                                lambda array: array.ndim == 0 and array > 0)

  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    gramian = signals.gramian
    weights = solvers.fair_weights(gramian, signals.active, jnp.ones_like(gramian[0]),
                                   jnp.asarray(alpha, gramian.dtype))
    return Decision(weights), state

  return Balancer("fairgrad", no_state, update, frozenset({"gramian"}), scale="own")
