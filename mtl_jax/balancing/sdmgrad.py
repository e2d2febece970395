"""SDMGrad: stochastic descent directions that stay near a preferred one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, masked
from mtl_jax.balancing.balancer import Balancer, Decision, Signals
from mtl_jax.balancing.preference import of_active


class SdmgradState(NamedTuple):
  """State of `sdmgrad`."""

  weights: jax.Array  # shape=(T,), w, sums to one


def sdmgrad(regularization: float | jax.Array = 0.3, iterations: int = 20,
            weight_step: float | jax.Array = 10.0, momentum: float | jax.Array = 0.5,
            preference: jax.Array | None = None) -> Balancer:
  """Direction-oriented multi-objective descent with double sampling.

  The rule: with gradients `J₀`, `J₁`, `J₂` of three independent samples and shares `u`, a few
  projected gradient steps with momentum on the simplex, from the last step's `w`, follow
  `A (w + λ u)` with `A = J₁ J₂ᵀ / s²`; then `d = J₀ᵀ (w + λ u) / (1 + λ)`. The scale `s` is the
  mean over tasks of `√max((J₁ J₂ᵀ)_ii, 0)`. `λ = 0` is stochastic MGDA, a large one follows `u`.

  Args:
    regularization: λ, not negative.
    iterations: inner steps, 1 or more.
    weight_step: η, their size, above 0.
    momentum: of the inner steps, in [0, 1).
    preference: [T] the shares `u`, none negative; 1 over the number of active tasks when left out.

  Returns:
    A balancer that needs the inner products between parts of the batch, which it cuts in three
    as `modo` does. Its state is [T].

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.diag(jnp.array([1., 0.5, 0.]))
  >>> d, state = balancing.aggregate(sdmgrad(iterations=1), J)
  >>> [round(float(x) * 26, 4) for x in d], state.weights.tolist()
  ([2.0, 1.0, 0.0], [0.0, 0.0, 1.0])

  Reference:
    Xiao, Ban, Ji: Direction-oriented Multi-objective Learning: Simple and Provable Stochastic
    Algorithms. NeurIPS 2023, arXiv:2305.18409.

  Differences:
    In the official code one buffer holds all three gradients, so that the samples coincide; it
    multiplies `d` by T and clips its norm at 1. LibMTL steps by 5. Steps of this size leap between
    vertices where gradients conflict: `w` is a sample, not a solution. Public codes add 1e-8 to
    `s`; here `s²` is at least 1e-8 of the largest inner product.
  """
  number = lambda array: array.ndim == 0 and array >= 0
  hyperparameters.check_numbers("sdmgrad", "regularization", regularization,
                                "a number not below 0", number)
  hyperparameters.check_numbers("sdmgrad", "weight_step", weight_step, "a number above 0",
                                lambda array: array.ndim == 0 and array > 0)
  hyperparameters.check_numbers("sdmgrad", "momentum", momentum, "a number in [0, 1)",
                                lambda array: array.ndim == 0 and 0 <= array < 1)
  if not (isinstance(iterations, int) and iterations >= 1):
    raise hyperparameters.mistake("sdmgrad", "iterations", "a whole number, 1 or more", iterations)
  hyperparameters.check_numbers(
      "sdmgrad", "preference", () if preference is None else preference,
      "one share a task, none negative", lambda array: array.ndim == 1 and (array >= 0).all())

  def init(num_tasks: int) -> SdmgradState:
    if preference is not None:
      hyperparameters.check_length("sdmgrad", "preference", preference, num_tasks)
    return SdmgradState(jnp.full(num_tasks, 1 / num_tasks, float))

  def update(signals: Signals, state: SdmgradState) -> tuple[Decision, SdmgradState]:
    active = signals.active
    cross = scaled(masked.between(signals.cross_gramian[1][2], active), active)
    dtype = cross.dtype
    pull = jnp.asarray(regularization, dtype) * of_active(preference, active, dtype)

    def descend(_, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
      weights, velocity = carry
      slope = jnp.matmul(cross, weights + pull, precision=jax.lax.Precision.HIGHEST)
      velocity = jnp.asarray(momentum, dtype) * velocity + slope
      moved = weights - jnp.asarray(weight_step, dtype) * velocity
      return masked.project_to_simplex(moved, active), velocity

    start = masked.shares(state.weights, active, dtype)
    weights, _ = jax.lax.fori_loop(0, iterations, descend, (start, jnp.zeros_like(start)))
    decided = (weights + pull) / (1 + jnp.asarray(regularization, dtype))
    return (Decision(jnp.where(active, decided, 0)),
            SdmgradState(masked.with_shares(state.weights, weights, active)))

  return Balancer("sdmgrad", init, update, frozenset({"cross_gramian"}),
                  scale="mean" if preference is None else "own", parts=3)


def scaled(cross: jax.Array, active: jax.Array) -> jax.Array:
  """Inner products [T, T] over the square of the mean length of the gradients.

  >>> scaled(jnp.diag(jnp.array([1., 0.25, 0.])), jnp.ones(3, bool)).diagonal().tolist()
  [4.0, 1.0, 0.0]
  """
  largest = jnp.max(jnp.abs(cross))
  unit = cross / jnp.where(largest > 0, largest, 1)  # so that no square overflows
  lengths = jnp.sqrt(jnp.maximum(jnp.diagonal(unit), 0))
  mean = jnp.maximum(jnp.sum(lengths) / masked.count(active, cross.dtype), 1e-4)
  return unit / mean / mean
