"""IMTL-G: a direction that goes equally far along every gradient."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing import masked, solvers
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, no_state

LARGEST = 1e4  # sum of the weights' absolute values


def imtl_g() -> Balancer:
  """Weighs the gradients so that their sum has the same projection on each of them.

  The rule: `d = Σ w_i g_i` with `Σ w_i = 1` and `d·g_i / ‖g_i‖` the same for all tasks. With C the
  Gramian of the unit gradients, `w_i ∝ (C⁺ 1)_i / ‖g_i‖`. Weights may be negative.

  Returns:
    A balancer that needs the Gramian. A task whose gradient is zero takes no part; if all are,
    the active tasks weigh the same. Where gradients cancel so that no direction serves all, as
    two opposite ones do, `w_i ∝ 1 / ‖g_i‖`, the limit of nearly opposite ones.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, _ = balancing.aggregate(imtl_g(), J)
  >>> [round(float(x), 4) for x in d]
  [0.0767, 1.0, 1.0]

  Reference:
    Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang: Towards Impartial Multi-task Learning. ICLR
    2021.

  Differences:
    The paper and LibMTL invert a matrix of differences of gradients, which fails where they
    depend on each other; TorchJD takes the pseudo-inverse of the whole Gramian, as we do of that
    of the unit gradients, so that far apart norms cost no accuracy. With fewer parameters than
    tasks that is a least-squares solution. `Σ w_i` before scaling can be nearly zero with three
    tasks or more, and then d is unbounded; TorchJD gives zeros below 1e-12, we hold `Σ |w_i|` at
    1e4. LibMTL always scales the losses as well: see `imtl`.
  """
  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    cosines, norms = solvers.unit_rows(signals.gramian, signals.active)
    return Decision(impartial_weights(cosines, norms, signals.active)), state

  return Balancer("imtl_g", no_state, update, frozenset({"gramian"}), scale="mean")


def equal_projections(cosines: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Solves `C y = 1` over the unit gradients by a pseudo-inverse.

  Args:
    cosines: [T, T] the Gramian of unit rows; zero rows and columns for tasks that do not count.

  Returns:
    [T] `y = C⁺ 1`, and whether the unit gradients have a common direction at all: if `C y = 1`
    can be solved, `1ᵀ y` is at least one; if the gradients cancel, it is zero.

  >>> y, found = equal_projections(jnp.array([[1., 0.5], [0.5, 1.]]))
  >>> [round(float(x), 4) for x in y], bool(found)
  ([0.6667, 0.6667], True)
  """
  eps = jnp.finfo(cosines.dtype).eps
  values, vectors = jnp.linalg.eigh(cosines)
  kept = values > 8 * len(cosines) * eps * values[-1]
  shares = jnp.where(kept, jnp.sum(vectors, axis=0) / jnp.where(kept, values, 1), 0)
  y = jnp.matmul(vectors, shares, precision=jax.lax.Precision.HIGHEST)
  return jnp.where(jnp.diagonal(cosines) > 0, y, 0), jnp.sum(y) > 8 * eps


def impartial_weights(cosines: jax.Array, norms: jax.Array, active: jax.Array) -> jax.Array:
  """The weights [T] of IMTL-G, with sum one, from unit rows [T, T] and norms [T]."""
  live = norms > 0
  y, found = equal_projections(cosines)
  shortest = jnp.min(jnp.where(live, norms, jnp.inf))
  weights = jnp.where(live, jnp.where(found, y, 1) * shortest / jnp.where(live, norms, 1), 0)
  size = jnp.sum(jnp.abs(weights))
  total = jnp.sum(weights)
  total = jnp.where(total < 0, -1, 1) * jnp.maximum(jnp.abs(total), size / LARGEST)
  equal = active.astype(norms.dtype) / masked.count(active, norms.dtype)
  return jnp.where(live.any(), weights / jnp.where(total == 0, 1, total), equal)
