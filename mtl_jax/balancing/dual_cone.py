"""What the methods share that project onto the dual cone: directions no task conflicts with."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, preference, solvers
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, no_state


def balancer(name: str, shares: Any, regularization: float | jax.Array,
             project: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]) -> Balancer:
  """A method that adds to a combination of the gradients what keeps it from conflicting.

  Args:
    name: of the method.
    shares: [T] of the combination, none negative; None for 1 over the number of active tasks.
    regularization: not negative; this many traces of the Gramian are added to its diagonal.
    project: `project(cosines, start, live) -> added`, in unit rows: from their Gramian [T, T], the
      combination's coefficients [T], and which rows are not zero, to what the projection adds to
      each coefficient, [T].

  Returns:
    A balancer that needs the Gramian; the weights of zero gradients are their shares.

  Raises:
    ValueError: where an argument is out of its range, under the argument's public name.

  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> still = balancer("still", None, 0., lambda cosines, start, live: jnp.zeros_like(start))
  >>> balancing.aggregate(still, J)[0].tolist()
  [1.0, 1.0, 1.0]
  """
  hyperparameters.check_numbers(
      name, "preference", () if shares is None else shares,
      "one share a task, none negative", lambda array: array.ndim == 1 and (array >= 0).all())
  hyperparameters.check_numbers(name, "regularization", regularization, "a number not below 0",
                                lambda array: array.ndim == 0 and array >= 0)

  def init(num_tasks: int) -> tuple:
    if shares is not None:
      hyperparameters.check_length(name, "preference", shares, num_tasks)
    return no_state(num_tasks)

  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    gramian, active = signals.gramian, signals.active
    weights = preference.of_active(shares, active, gramian.dtype)
    cosines, norms = solvers.unit_rows(
        solvers.regularized(gramian, active, regularization), active)
    live = norms > 0
    added = project(cosines, weights * norms, live)
    return Decision(weights + jnp.where(live, added / jnp.where(live, norms, 1), 0)), state

  return Balancer(name, init, update, frozenset({"gramian"}),
                  scale="mean" if shares is None else "own")
