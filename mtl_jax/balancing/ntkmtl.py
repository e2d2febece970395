"""NTKMTL: tasks are weighed by how fast the shared parameters learn them."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, masked, solvers
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, no_state

LEAST = 1e-14  # share of a gradient's norm in the whole that still counts


def ntkmtl(power: float | jax.Array = 0.5) -> Balancer:
  """Weighs each task by the inverse of its share in the tangent kernel's trace.

  The rule: `w_i = (Σ_j ‖g_j‖² / ‖g_i‖²)^p`. With `p = ½` every weighted gradient has the same
  norm, the square root of that sum.

  Args:
    power: p in [0, 1]; with 0 the gradients are summed as they are.

  Returns:
    A balancer that needs the Gramian, and of that the diagonal only. With n active tasks of the
    same norm the weights are `n^p`; so they are where all gradients are zero, and a task that
    alone has a zero gradient gets the same.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, _ = balancing.aggregate(ntkmtl(), J)
  >>> [round(float(x), 4) for x in d]
  [0.2284, 2.9778, 2.9778]

  Reference:
    Qin, Wang, Yan: NTKMTL: Mitigating Task Imbalance in Multi-Task Learning from Neural Tangent
    Kernel Perspective. NeurIPS 2025.

  Differences:
    The official code multiplies by T and clips the norm to 1; we do neither. Its variant that
    takes the largest eigenvalues over parts of the batch is left out. LibMTL and TorchJD do not
    have the method.
  """
  hyperparameters.check_numbers("ntkmtl", "power", power, "a number in [0, 1]",
                                lambda array: array.ndim == 0 and 0 <= array <= 1)

  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    active = signals.active
    _, norms = solvers.unit_rows(signals.gramian, active)
    dtype, live = norms.dtype, norms > 0
    ratios = norms / jnp.maximum(jnp.max(norms), jnp.finfo(dtype).tiny)
    shares = ratios / jnp.sqrt(jnp.where(live.any(), jnp.sum(ratios**2), 1))
    even = jnp.sqrt(1 / masked.count(active, dtype))
    shares = jnp.where(live, jnp.maximum(shares, LEAST), even)
    weights = shares ** (-2 * jnp.asarray(power, dtype))
    return Decision(jnp.where(active, weights, 0)), state

  return Balancer("ntkmtl", no_state, update, frozenset({"gramian"}), scale="own")
