"""Fixed weights: constants that a user chooses."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters
from mtl_jax.balancing.balancer import Balancer, Decision, Signals


def fixed(weights: Sequence[float] | jax.Array) -> Balancer:
  """Every active task keeps its constant weight.

  The rule: `w_i = c_i`, `d = Σ c_i g_i`. With constants tuned on validation data it is the
  baseline that an adaptive method has to beat.

  Args:
    weights: [T] finite constants, none negative, not all zero. A traced array is taken as it is,
      so that constants can be searched with `vmap`.

  Returns:
    A balancer that needs the losses only; one backward pass.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, _ = balancing.aggregate(fixed((1., 2.)), J)
  >>> d.tolist()
  [8.0, 3.0, 3.0]

  Reference:
    Kurin, De Palma, Kostrikov, Whiteson, Kumar: In Defense of the Unitary Scalarization for
    Deep Multi-Task Learning. NeurIPS 2022, arXiv:2201.04122.

  Differences:
    The constants are used as given: they are not divided by their sum.
  """
  hyperparameters.check_numbers(
      "fixed", "weights", weights, "one weight a task, none negative, not all zero",
      lambda array: array.ndim == 1 and (array >= 0).all() and array.any())

  def init(num_tasks: int) -> tuple:
    hyperparameters.check_length("fixed", "weights", weights, num_tasks)
    return ()

  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    constants = jnp.asarray(weights, signals.losses.dtype)
    return Decision(jnp.where(signals.active, constants, 0)), state

  return Balancer("fixed", init, update, frozenset({"losses"}), scale_heads=True,
                  scale="own")
