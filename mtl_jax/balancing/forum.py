"""FORUM: held-out losses as objectives, a trained network as constraint, first order only."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, masked, quadratic, solvers, trained
from mtl_jax.balancing.balancer import Balancer, Decision, Lookahead, Signals


class ForumState(NamedTuple):
  """What the tasks have learned.

  Attributes:
    logits: [T] of the weights of the training losses.
    adam: Adam's moments and step counts, one a task: every leaf is [T].
    shares: [T] average of the objectives' shares; sums to one.
    count: [T] updates that the task took part in.
  """

  logits: jax.Array
  adam: Any
  shares: jax.Array
  count: jax.Array


def forum(learning_rate: float | jax.Array = 1e-3, inner_learning_rate: float | jax.Array = 0.1,
          inner_steps: int = 5, slack: float | jax.Array = 0.1,
          power: float | jax.Array = 0.75) -> Balancer:
  """First-order multi-gradient descent for the weights and the network at once.

  The rule: with `w = softmax(a)` and `f = Σ w_i L_i` on one half of the batch, `θ̃` is `θ` after a
  few steps of SGD on `f`, and `q = f(θ) - f(θ̃)` is how far the network is from trained. The
  objectives are the tasks' losses on the other half, with gradients `v_j` in `θ`. The step is the
  direction that serves the worst-off of them best while `q` falls: by duality
  `d = Σ λ_j v_j + ν ∇q`, where `λ` in the simplex and `ν ≥ 0` minimise `½‖d‖² - ν ρ ‖∇q‖²`; an
  average of `λ` over steps, the new one counting `k^(-3/4)` at step `k`, takes its place, and `ν`
  is the best for that. `∇q` has a part in `θ`, `Σ w_i g_i`, and one in `a`, along which Adam
  moves `a`.

  Args:
    learning_rate: of that Adam; above 0.
    inner_learning_rate: of the steps to `θ̃`; above 0.
    inner_steps: how many; 1 or more.
    slack: ρ, not negative.
    power: 3/4 above; in [0, 1].

  Returns:
    A balancer that needs the inner products between the two halves of the batch, and a
    look-ahead. It weighs the gradients of both halves, by `ν w` and by the average of `λ`; the
    weights that it reports are their sum. Its state is [T] arrays; an inactive task keeps its own.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, state = balancing.aggregate(forum(), J)
  >>> [round(float(x), 4) for x in d], [round(float(x), 4) for x in state.shares]
  ([0.0, 1.0, 1.0], [0.6, 0.4])

  Reference:
    Ye, Lin, Cao, Zhang, Kwok: A First-Order Multi-Gradient Algorithm for Multi-Objective Bi-Level
    Optimization. ECAI 2024.

  Differences:
    The inner products are those of the shared parameters, as everywhere here; heads follow the
    same weights. LibMTL solves the program on the host, and averages with the number of the epoch
    in place of the step. The two batches are halves of the step's.
  """
  trained.check_rate("forum", "learning_rate", learning_rate)
  trained.check_rate("forum", "inner_learning_rate", inner_learning_rate)
  if not (isinstance(inner_steps, int) and inner_steps >= 1):
    raise hyperparameters.mistake("forum", "inner_steps", "a whole number, 1 or more", inner_steps)
  hyperparameters.check_numbers("forum", "slack", slack, "a number not below 0",
                                lambda array: array.ndim == 0 and array >= 0)
  hyperparameters.check_numbers("forum", "power", power, "a number in [0, 1]",
                                lambda array: array.ndim == 0 and 0 <= array <= 1)

  def init(num_tasks: int) -> ForumState:
    logits = jnp.zeros(num_tasks, float)
    return ForumState(logits, trained.start(logits), jnp.full(num_tasks, 1 / num_tasks, float),
                      jnp.zeros(num_tasks, jnp.int32))

  def update(signals: Signals, state: ForumState) -> tuple[Decision, ForumState]:
    logits, active = state.logits, signals.active
    weights = masked.softmax(logits, active)
    falls = jnp.where(active, signals.losses - signals.ahead.losses, 0).astype(logits.dtype)
    slope = weights * (falls - jnp.sum(weights * falls))  # of q in the logits

    program = _Program.of(signals, weights, slope, slack)
    found = program.shares(active)
    count = state.count + active.astype(jnp.int32)
    rate = jnp.maximum(count, 1).astype(found.dtype) ** -jnp.asarray(power, found.dtype)
    old = masked.shares(state.shares, active, found.dtype)
    shares = masked.shares(old + rate * (found - old), active, found.dtype)
    pressure = program.pressure(shares)

    stepped = trained.descend(logits, state.adam, pressure.astype(slope.dtype) * slope,
                              learning_rate)
    new = ForumState(*stepped, masked.with_shares(state.shares, shares, active), count)
    by_part = jnp.stack([pressure * weights.astype(shares.dtype), shares])
    return (Decision(by_part.sum(axis=0), part_weights=by_part),
            masked.keep(active, new, state))

  return Balancer(
      "forum", init, update, frozenset({"cross_gramian", "lookahead"}), scale_heads=True,
      scale="own", parts=2, weighs_parts=True, lookahead=Lookahead(
          lambda state, active: masked.softmax(state.logits, active), inner_learning_rate,
          inner_steps))


class _Program(NamedTuple):
  """The program for λ and ν, with all lengths in units of the longest gradient.

  Attributes:
    objectives: [T, T] inner products of the `v_j`.
    overlaps: [T] those of the `v_j` with `∇q`.
    square: [] that of `∇q` with itself.
    slack: [] ρ.
  """

  objectives: jax.Array
  overlaps: jax.Array
  square: jax.Array
  slack: jax.Array

  @classmethod
  def of(cls, signals: Signals, weights: jax.Array, slope: jax.Array, slack: Any) -> "_Program":
    (own, _), (cross, objectives) = (
        [masked.between(block, signals.active) for block in row] for row in signals.cross_gramian)
    dtype = own.dtype
    weights, slope = weights.astype(dtype), slope.astype(dtype)
    unit = jnp.maximum(jnp.maximum(jnp.max(jnp.diagonal(own)), jnp.max(jnp.diagonal(objectives))),
                       jnp.finfo(dtype).tiny)
    length = jnp.sqrt(unit)
    product = lambda matrix: jnp.matmul(matrix / unit, weights,
                                        precision=jax.lax.Precision.HIGHEST)
    square = jnp.sum(weights * product(own)) + jnp.sum((slope / length)**2)
    return cls(objectives / unit, product(cross), jnp.maximum(square, 0),
               jnp.asarray(slack, dtype))

  def pressure(self, shares: jax.Array) -> jax.Array:
    """The best ν for given λ: 0 where the objectives alone make q fall enough."""
    live = self.square > jnp.finfo(self.square.dtype).eps ** 2
    needed = self.slack - jnp.sum(shares * self.overlaps) / jnp.where(live, self.square, 1)
    return jnp.where(live, jnp.maximum(needed, 0), 0)

  def shares(self, active: jax.Array) -> jax.Array:
    """The best λ, with its ν; in unit rows, whatever the norms."""
    bordered = jnp.block([[self.objectives, self.overlaps[:, None]],
                          [self.overlaps[None], self.square[None, None]]])
    cosines, norms = solvers.unit_rows(bordered, jnp.append(active, True))
    live, dtype = norms > 0, norms.dtype
    lengths = jnp.where(live, norms, 1)
    shortest = jnp.min(jnp.where(live, norms, jnp.inf)[:-1])
    shortest = jnp.where(jnp.isfinite(shortest), shortest, 1)
    prices = jnp.where(live, shortest / lengths, 0).at[-1].set(0)
    # In y = λ ‖v‖ / shortest: what a share costs is at most one, and they cost one together.
    linear = jnp.zeros_like(norms).at[-1].set(self.slack * norms[-1] / shortest)
    y = quadratic.nonnegative_minimum(cosines, linear, live, prices)
    shares = jnp.where(live, y * shortest / lengths, 0)[:-1]
    zero = active & ~live[:-1]  # a zero gradient is served by any direction
    return jnp.where(jnp.any(zero) | ~jnp.any(live[:-1]),
                     zero.astype(dtype) / masked.count(zero, dtype),
                     masked.shares(shares, active, dtype))
