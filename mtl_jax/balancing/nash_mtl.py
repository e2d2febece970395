"""Nash-MTL: the tasks bargain, and the direction is the Nash solution."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, solvers
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, no_state


def nash_mtl(max_norm: float | jax.Array | None = 1.0) -> Balancer:
  """Takes the direction in which the product of the tasks' gains is largest.

  The rule: the `d` in the unit ball with the largest `Σ log(g_i·d)` is, up to its length,
  `Σ w_i g_i` with `(G w)_i = 1 / w_i` and `w > 0`. Every gain is then `g_i·d = 1 / w_i`, no task
  conflicts, and `‖d‖` is the root of the number of tasks, whatever the gradients' norms. A longer
  `d` than `max_norm` is cut to that length.

  Args:
    max_norm: greatest length of `d`, above 0, or None for no limit. The default is the paper's;
      with more than one task it always binds, so that `d` is a unit vector.

  Returns:
    A balancer that needs the Gramian. A task whose gradient is zero weighs 0; if all are zero,
    the active tasks weigh the same, 1 in total. Where a convex combination of the gradients is
    zero no solution exists; the weights then stay finite and `d` is small.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, _ = balancing.aggregate(nash_mtl(), J)
  >>> [round(float(x), 4) for x in d]
  [0.0542, 0.7061, 0.7061]

  Reference:
    Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya: Multi-Task Learning as a
    Bargaining Game. ICML 2022, arXiv:2202.01017.

  Differences:
    The official code and LibMTL weigh the whole losses, the heads' share included, and cut the
    norm of the shared gradient only; here the heads keep their own gradients, unless the step is
    told otherwise. Both solve up to 20 convex programs a step on the host, start from the last
    weights and keep them on failure; TorchJD does the same and scales the weights, as here. Their
    stopping test compares a normalised `G w` with an unnormalised `1 / w`. Here Newton's method
    solves the equations themselves, so that the method has no state.
  """
  hyperparameters.check_numbers("nash_mtl", "max_norm", 1.0 if max_norm is None else max_norm,
                                "a number above 0 or None",
                                lambda array: array.ndim == 0 and array > 0)

  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    gramian, active = signals.gramian, signals.active
    dtype = gramian.dtype
    weights = solvers.fair_weights(gramian, active, jnp.ones_like(gramian[0]), jnp.ones((), dtype))
    if max_norm is not None:
      cosines, norms = solvers.unit_rows(gramian, active)
      mixed = weights * norms
      square = jnp.sum(mixed * jnp.matmul(cosines, mixed, precision=jax.lax.Precision.HIGHEST))
      length = jnp.sqrt(jnp.maximum(square, 0))
      longest = jnp.asarray(max_norm, dtype)
      weights *= longest / jnp.maximum(length, longest)
    return Decision(weights), state

  return Balancer("nash_mtl", no_state, update, frozenset({"gramian"}), scale="own")
