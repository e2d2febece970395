"""COSMOS: preferred losses, and an angle to the preference."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, masked, preference
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, no_state


def cosmos(penalty: float | jax.Array = 1.0,
           weights: Sequence[float] | jax.Array | None = None) -> Balancer:
  """Minimises the preferred sum of the losses and their angle to the preference.

  The rule: with preferences `r`, `w` is the gradient of `r·L - λ cos(r, L)`, that is
  `r - λ (r / ‖r‖ - cos(r, L) L / ‖L‖) / ‖L‖`.

  Args:
    penalty: λ, the price of the angle, from 0 on. The paper tunes it to each data set.
    weights: [T] preferences r, none negative, not all zero; `1 / T` of the active tasks if None.

  Returns:
    A balancer that needs the losses only; one backward pass. A task whose loss is larger than
    preferred weighs more; one whose loss is small may get a negative weight.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, _ = balancing.aggregate(cosmos(weights=(1., 0.)), J, losses=jnp.array([3., 4.]))
  >>> [round(float(x), 4) for x in d]
  [-2.912, 0.968, 0.968]

  Reference:
    Ruchte, Grabocka: Scalable Pareto Front Approximation for Deep Multi-Objective Learning. ICDM
    2021, arXiv:2103.13392.

  Differences:
    The paper draws `r` for every batch and feeds it to the network as well, to learn a whole
    front; here, as in TorchJD, `r` is fixed. Where all losses are zero, or `L` is along `r` to
    rounding, the angle has no gradient; a norm below 1e-20 counts as that much.
  """
  hyperparameters.check_numbers("cosmos", "penalty", penalty, "a number from 0 on",
                                lambda array: array.ndim == 0 and array >= 0)
  preference.check("cosmos", weights)

  def init(num_tasks: int) -> tuple:
    preference.check_lengths("cosmos", num_tasks, weights)
    return no_state(num_tasks)

  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    losses = masked.losses_of(signals.losses, signals.active)
    preferred = preference.of_active(weights, signals.active, losses.dtype)
    ray, _ = masked.unit(preferred)
    towards, norm = masked.unit(losses)
    turn = ray - jnp.sum(ray * towards) * towards
    noise = jnp.sum(turn * turn) <= (16 * jnp.finfo(turn.dtype).eps) ** 2
    turn = jnp.where(noise | (norm == 0), 0, turn / jnp.maximum(norm, masked.SMALLEST))
    weighted = preferred - jnp.asarray(penalty, losses.dtype) * turn
    return Decision(jnp.where(signals.active, weighted, 0)), state

  return Balancer("cosmos", init, update, frozenset({"losses"}), scale_heads=True, scale="own")
