"""A look-ahead: steps that are tried out and not taken, for balancers that learn from them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing.balancer import Ahead, Lookahead


def look_ahead(plan: Lookahead, weights: jax.Array, params: Any,
               losses_of: Callable[[Any, int], jax.Array]) -> Ahead:
  """Takes the steps of a plan from the parameters and tells what came of them.

  The slopes are exact: the derivative of the tasks' losses on part 0 along the gradient of each
  objective on part 1, one forward-mode pass an objective, where public codes take differences.

  Args:
    plan: of the balancer.
    weights: [T] of the losses that the steps descend.
    params: before the steps; they are not changed.
    losses_of: `losses_of(params, part) -> [T]`, differentiable.
  """
  def descend(params: Any) -> Any:
    grads = jax.grad(lambda p: jnp.vdot(weights.astype(jnp.float32), losses_of(p, 0)))(params)
    rate = lambda x: jnp.asarray(plan.learning_rate, x.dtype)
    return jax.tree.map(lambda x, g: x - rate(x) * g, params, grads)

  moved = params
  for _ in range(plan.steps):  # few; XLA runs convolutions many times slower inside loops on CPUs
    moved = descend(moved)
  if plan.objectives is None:
    return Ahead(losses_of(moved, 0))
  # The losses after the steps need no further pass where nobody reads them: XLA drops it.
  held_out, pull = jax.vjp(lambda p: losses_of(p, 1), moved)
  _, derivative = jax.linearize(lambda p: losses_of(p, 0), params)
  objectives = plan.objectives(len(weights)).astype(held_out.dtype)
  slopes = jnp.stack([derivative(pull(objective)[0]) for objective in objectives])
  return Ahead(losses_of(moved, 0), slopes)
