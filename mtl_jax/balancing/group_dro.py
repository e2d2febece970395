"""Group DRO: tasks with large losses gain weight, for good."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.balancing import masked, trained
from mtl_jax.balancing.balancer import Balancer, Decision, Signals


class GroupDroState(NamedTuple):
  """What the tasks have gained so far.

  Attributes:
    log_shares: [T] logarithms of shares that sum to one over all tasks.
  """

  log_shares: jax.Array


def group_dro(step_size: float | jax.Array = 0.01) -> Balancer:
  """Distributionally robust optimisation with tasks as groups: minimises the worst mixture.

  The rule: `p_i ← p_i exp(η L_i)`, divided by the sum; then `w = p`. It is exponentiated gradient
  ascent of `Σ p_i L_i` over the simplex, from `p_i = 1 / T`.

  Args:
    step_size: η, above 0. What it means depends on the size of the losses.

  Returns:
    A balancer that needs the losses only; one backward pass. The weights of the active tasks sum
    to one. A task that is not active keeps its share.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, state = balancing.aggregate(group_dro(1.), J, losses=jnp.array([0., 1.]))
  >>> [round(float(x), 4) for x in d]
  [3.3106, 1.0, 1.0]

  Reference:
    Sagawa, Koh, Hashimoto, Liang: Distributionally Robust Neural Networks for Group Shifts. ICLR
    2020, arXiv:1911.08731. As a balancing method: a comparison in He, Zhou, Zhang, Yun, Xu, Zeng,
    Chilimbi, Zhao: Robust Multi-Task Learning with Excess Risks. ICML 2024, arXiv:2402.02009.

  Differences:
    The step size of 0.01 is Sagawa et al.'s. Shares move in logarithms and stay above exp(-80),
    so that a task can come back; in float32 shares of their own it could not.
  """
  trained.check_rate("group_dro", "step_size", step_size)

  def init(num_tasks: int) -> GroupDroState:
    return GroupDroState(-jnp.log(jnp.full(num_tasks, num_tasks, dtype=float)))

  def update(signals: Signals, state: GroupDroState) -> tuple[Decision, GroupDroState]:
    dtype = state.log_shares.dtype
    losses = masked.losses_of(signals.losses, signals.active, dtype)
    log_shares = masked.scale_shares(
        state.log_shares, jnp.asarray(step_size, dtype) * losses, signals.active)
    return Decision(masked.softmax(log_shares, signals.active)), GroupDroState(log_shares)

  return Balancer("group_dro", init, update, frozenset({"losses"}), scale_heads=True,
                  scale="mean")
