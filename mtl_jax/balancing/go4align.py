"""GO4Align: tasks that are alike in risk share one weight."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, masked, trained
from mtl_jax.balancing.balancer import Balancer, Decision, Signals

ROUNDS = 30  # of k-means: more than forty values on a line need


class Go4AlignState(NamedTuple):
  """What the tasks have lost so far.

  Attributes:
    log_shares: [T] logarithms of shares that sum to one over all tasks.
  """

  log_shares: jax.Array


def go4align(groups: int = 2, step_size: float | jax.Array = 1e-4) -> Balancer:
  """Groups the tasks by a measure of risk and gives each group its mean weight.

  The rule: `p_i ← p_i exp(-η L_i)`, divided by the sum; the risk weight `u_i = p_i Σ L_j / L_i`;
  then k-means splits the `u_i` into K groups, and `w_i` is the mean of `u` over the group of `i`.

  Args:
    groups: K, a whole number from 1 to the number of tasks. With 1 all weigh the same. The paper
      chooses it for each data set.
    step_size: η, above 0.

  Returns:
    A balancer that needs the losses only; one backward pass. Where all losses are equal the
    weights are one.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.], [0., 0., 1.]])
  >>> d, _ = balancing.aggregate(go4align(2, step_size=1e-9), J, losses=jnp.array([1., 10., 9.]))
  >>> [round(float(x), 4) for x in d]  # u: 20/3, 2/3, 20/27; the last two share 19/27
  [-22.4444, 7.3704, 8.0741]

  Reference:
    Shen, Wang, Xiao, van Noord, Worring: GO4Align: Group Optimization for Multi-Task Alignment.
    NeurIPS 2024, arXiv:2404.06486.

  Differences:
    The official code clusters on the host, from random centres; here 30 rounds of k-means run on
    the device, from quantiles of `u`, without randomness. `u` is built from logarithms: a loss
    below 1e-20 counts as that much, and `u` is at most exp(80). Shares stay above exp(-80).
  """
  hyperparameters.check_numbers(
      "go4align", "groups", groups, "a whole number from 1 on",
      lambda array: array.ndim == 0 and array >= 1 and array == array.round())
  if isinstance(groups, jax.core.Tracer) or not isinstance(groups, int):
    raise hyperparameters.mistake("go4align", "groups", "a Python int", groups)
  trained.check_rate("go4align", "step_size", step_size)

  def init(num_tasks: int) -> Go4AlignState:
    if groups > num_tasks:
      raise hyperparameters.mistake("go4align", "groups",
                                    f"at most the number of tasks, {num_tasks}", groups)
    return Go4AlignState(-jnp.log(jnp.full(num_tasks, num_tasks, dtype=float)))

  def update(signals: Signals, state: Go4AlignState) -> tuple[Decision, Go4AlignState]:
    active, dtype = signals.active, state.log_shares.dtype
    losses = masked.positive(signals.losses, active, dtype)
    log_shares = masked.scale_shares(
        state.log_shares, -jnp.asarray(step_size, dtype) * losses, active)
    shares, mean = masked.softmax(log_shares, active), masked.mean(losses, active)
    log_total = jnp.log(mean) + jnp.log(masked.count(active, dtype))
    logs = jnp.log(jnp.maximum(shares, jnp.finfo(dtype).tiny)) + log_total - jnp.log(losses)
    weights = group_means(jnp.exp(jnp.minimum(logs, masked.LARGEST_LOG)), active, groups)
    return Decision(jnp.where(active, weights, 0)), Go4AlignState(log_shares)

  return Balancer("go4align", init, update, frozenset({"losses"}), scale_heads=True, scale="own")


def group_means(values: jax.Array, active: jax.Array, groups: int) -> jax.Array:
  """The mean of each value's group, where k-means on the line splits the active ones.

  Args:
    values: [T].
    active: [T].
    groups: K; fewer where fewer values differ.

  Returns:
    [T] means.

  >>> group_means(jnp.array([1., 2., 8., 9.]), jnp.ones(4, bool), 2).tolist()
  [1.5, 1.5, 8.5, 8.5]
  """
  size, number = values.size, jnp.sum(active)
  ordered = jnp.sort(jnp.where(active, values, jnp.inf))
  quantiles = (2 * jnp.arange(groups) + 1) * number // (2 * groups)
  centres = jnp.where(number > 0, ordered[jnp.minimum(quantiles, size - 1)], 0)

  def members(centres: jax.Array) -> jax.Array:
    nearest = jnp.argmin(jnp.abs(values[:, None] - centres[None]), axis=1)
    return (nearest[:, None] == jnp.arange(groups)[None]) & active[:, None]

  def means(member: jax.Array) -> tuple[jax.Array, jax.Array]:
    counts = jnp.sum(member, axis=0, dtype=values.dtype)
    sums = jnp.sum(jnp.where(member, values[:, None], 0), axis=0)
    return sums / jnp.maximum(counts, 1), counts

  def settle(_: jax.Array, centres: jax.Array) -> jax.Array:
    moved, counts = means(members(centres))
    return jnp.where(counts > 0, moved, centres)

  member = members(jax.lax.fori_loop(0, ROUNDS, settle, centres))
  return jnp.sum(jnp.where(member, means(member)[0][None], 0), axis=1)
