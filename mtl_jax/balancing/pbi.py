"""PBI: along the preferred direction, and not far beside it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, masked, preference
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, no_state


def pbi(theta: float | jax.Array = 5.0, weights: Sequence[float] | jax.Array | None = None,
        ideal: float | Sequence[float] | jax.Array = 0.0) -> Balancer:
  """Penalty-based boundary intersection: keeps the losses near a preferred ray and low on it.

  The rule: with `u = λ / ‖λ‖`, the losses' way along the ray `d1 = u·(L - z)` and their residual
  beside it `r = L - z - d1 u`, `w` is the gradient of `d1 + θ ‖r‖`, that is `u + θ r / ‖r‖`. On
  the ray, where the norm has a kink, `w = u`.

  Args:
    theta: θ, the price of leaving the ray, from 0 on.
    weights: [T] preferences λ, none negative, not all zero; equal ones if None.
    ideal: z, a number or one a task: where the ray starts.

  Returns:
    A balancer that needs the losses only; one backward pass. A task that is ahead of the others
    may get a negative weight.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, _ = balancing.aggregate(pbi(theta=1.), J, losses=jnp.array([2., 0.]))
  >>> [round(float(x), 4) for x in d]
  [-5.6569, 1.4142, 1.4142]

  Reference:
    Zhang, Li: MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition. IEEE
    Transactions on Evolutionary Computation 11(6), 2007.

  Differences:
    TorchJD adds an ε of 1e-12 to the norms; here a residual that is no more than rounding, 16
    units of it relative to `L - z`, counts as none, lest its direction be noise.
  """
  hyperparameters.check_numbers("pbi", "theta", theta, "a number from 0 on",
                                lambda array: array.ndim == 0 and array >= 0)
  preference.check("pbi", weights, ideal)

  def init(num_tasks: int) -> tuple:
    preference.check_lengths("pbi", num_tasks, weights, ideal)
    return no_state(num_tasks)

  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    distances = preference.above_ideal(signals.losses, signals.active, ideal)
    ray, _ = masked.unit(preference.of_active(weights, signals.active, distances.dtype))
    towards, _ = masked.unit(distances)
    beside, residual = masked.unit(towards - jnp.sum(ray * towards) * ray)
    price = jnp.where(residual > 16 * jnp.finfo(residual.dtype).eps,
                      jnp.asarray(theta, residual.dtype), 0)
    return Decision(jnp.where(signals.active, ray + price * beside, 0)), state

  return Balancer("pbi", init, update, frozenset({"losses"}), scale_heads=True, scale="own")
