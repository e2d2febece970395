"""PIVRG: fair shares of the progress, more for the tasks that lag behind."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, masked, solvers
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, no_state


def pivrg(scores: jax.Array, bound: float | jax.Array = 2.0,
          min_temperature: float | jax.Array = 10.0) -> Balancer:
  """Takes the fair direction of `fairgrad` with α = 2, with larger shares for worse tasks.

  The rule: `(G w)_i = √(ω_i / w_i)` with `w > 0` and `ω = T softmax(scores / temperature)`. The
  temperature is `(max scores - min scores) / log(bound)`, so that no share is more than `bound`
  times another, and at least `min_temperature`.

  Args:
    scores: [T] how far each task is behind its single-task baseline, in percent, averaged over
      its metrics; higher is worse. They are measured on the training data, once an epoch: build
      the balancer anew, or trace them. Single-task runs are needed for them.
    bound: greatest ratio of two shares; above 1. The official code takes 1.8 for Cityscapes and
      QM9.
    min_temperature: least temperature; above 0. The official code takes 20 for Cityscapes and
      100 for QM9.

  Returns:
    A balancer that needs the Gramian. Its scale, and what it does with zero gradients or opposite
    ones, is that of `fairgrad`. With equal scores it is `fairgrad(2)`.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, _ = balancing.aggregate(pivrg((10., -5.)), J)
  >>> [round(float(x), 4) for x in d]
  [-0.0216, 0.7923, 0.7923]

  Reference:
    Qin et al.: PIVRG. CVPR 2025.

  Differences:
    The official code multiplies `d` by T and clips its norm at 1; here neither happens. It calls
    a least-squares solver on the host; here Newton's method runs on the device.
  """
  hyperparameters.check_numbers("pivrg", "scores", scores, "one finite score a task",
                                lambda array: array.ndim == 1 and array.size)
  hyperparameters.check_numbers("pivrg", "bound", bound, "a number above 1",
                                lambda array: array.ndim == 0 and array > 1)
  hyperparameters.check_numbers("pivrg", "min_temperature", min_temperature, "a number above 0",
                                lambda array: array.ndim == 0 and array > 0)

  def init(num_tasks: int) -> tuple:
    hyperparameters.check_length("pivrg", "scores", scores, num_tasks)
    return no_state(num_tasks)

  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    gramian, active = signals.gramian, signals.active
    dtype = gramian.dtype
    behind = jnp.asarray(scores, dtype)
    spread = (jnp.max(behind, where=active, initial=-jnp.inf)
              - jnp.min(behind, where=active, initial=jnp.inf))
    temperature = jnp.maximum(spread / jnp.log(jnp.asarray(bound, dtype)),
                              jnp.asarray(min_temperature, dtype))
    shares = masked.count(active, dtype) * masked.softmax(behind, active, temperature)
    weights = solvers.fair_weights(gramian, active, shares, jnp.asarray(2, dtype))
    return Decision(weights), state

  return Balancer("pivrg", init, update, frozenset({"gramian"}), scale="own")
