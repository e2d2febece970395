"""Tchebycheff scalarisation: the worst task decides."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing import masked, preference
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, no_state


def tchebycheff(weights: Sequence[float] | jax.Array | None = None,
                ideal: float | Sequence[float] | jax.Array = 0.0) -> Balancer:
  """Minimises the largest preferred distance of a loss from its ideal value.

  The rule: `w` is a subgradient of `max λ_i (L_i - z_i)`: the task that attains the maximum weighs
  `λ_i`, the others nothing; tasks that attain it together share, m of them `λ_i / m`.

  Args:
    weights: [T] preferences λ, none negative, not all zero; `1 / T` of the active tasks if None.
    ideal: z, a number or one a task: what no loss falls below.

  Returns:
    A balancer that needs the losses only; one backward pass.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, _ = balancing.aggregate(tchebycheff((1., 0.25)), J, losses=jnp.array([1., 5.]))
  >>> d.tolist()
  [1.5, 0.25, 0.25]

  Reference:
    Zhang, Li: MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition. IEEE
    Transactions on Evolutionary Computation 11(6), 2007.

  Differences:
    The paper takes `|L_i - z_i|`, which is the same as long as z is ideal; below it, a loss here
    counts for less, not for more. `stch` is its smooth form.
  """
  preference.check("tchebycheff", weights, ideal)

  def init(num_tasks: int) -> tuple:
    preference.check_lengths("tchebycheff", num_tasks, weights, ideal)
    return no_state(num_tasks)

  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    active = signals.active
    distances = preference.above_ideal(signals.losses, active, ideal)
    preferred = preference.of_active(weights, active, distances.dtype)
    values = jnp.where(active, preferred * distances, -jnp.inf)
    worst = active & (values == jnp.max(values))
    ties = masked.count(worst, distances.dtype)
    return Decision(jnp.where(worst, preferred / ties, 0)), state

  return Balancer("tchebycheff", init, update, frozenset({"losses"}), scale_heads=True,
                  scale="own")
