"""ConFIG: a direction at the same angle to every gradient."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, masked, solvers
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, no_state
from mtl_jax.balancing.imtl_g import equal_projections

LENGTHS = ("projection", "min", "max", "mean", "harmonic", "geometric")


def conflict_free(length: str = "projection") -> Balancer:
  """Goes where the cosine with every gradient is the same and positive.

  The rule: with U the unit gradients, `v = U⁺ 1 / ‖U⁺ 1‖` and `d = ℓ v`. As long as the gradients
  are linearly independent, `v·g_i / ‖g_i‖` is the same positive number for all tasks.

  Args:
    length: the length `ℓ`: "projection" the sum `Σ g_i·v`, or of the gradients' norms the "min",
      the "max", the arithmetic "mean", the "harmonic" or the "geometric" mean.

  Returns:
    A balancer that needs the Gramian; weights may be negative. A task whose gradient is zero
    takes no part; if all are, the active tasks weigh the same. Where gradients cancel, as two
    opposite ones do, no such direction exists and all weights are zero.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, _ = balancing.aggregate(conflict_free(), J)
  >>> [round(float(x), 4) for x in d]
  [0.1588, 2.0706, 2.0706]

  Reference:
    Liu, Chu, Thuerey: ConFIG: Towards Conflict-free Training of Physics Informed Neural
    Networks. ICLR 2025, arXiv:2408.11104.

  Differences:
    The official code and TorchJD solve for v in the space of the parameters; here the
    pseudo-inverse is that of the cosines [T, T], and d a combination of the gradients. The
    direction is IMTL-G's, the length is not. Preferred cosines other than equal ones and the
    variant with one gradient a step are left out.
  """
  hyperparameters.check_choice("conflict_free", "length", length, LENGTHS)

  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    active = signals.active
    cosines, norms = solvers.unit_rows(signals.gramian, active)
    live = norms > 0
    longest = jnp.max(norms)
    ratios = norms / jnp.where(longest > 0, longest, 1)
    y, found = equal_projections(cosines)
    projections = jnp.matmul(cosines, y, precision=jax.lax.Precision.HIGHEST)
    stretch = jnp.sqrt(jnp.where(found, jnp.sum(y), 1))  # ‖U⁺ 1‖² = 1ᵀ C⁺ 1
    if length == "projection":
      wanted = jnp.sum(ratios * projections) / stretch
    else:
      wanted = typical(ratios, live, length)
    weights = wanted / stretch * y / jnp.where(live, ratios, 1)
    equal = active.astype(norms.dtype)
    if length != "projection":
      equal /= masked.count(active, norms.dtype)
    return Decision(jnp.where(live.any(), jnp.where(found, weights, 0), equal)), state

  return Balancer("conflict_free", no_state, update, frozenset({"gramian"}),
                  scale="sum" if length == "projection" else "mean")


def typical(norms: jax.Array, live: jax.Array, kind: str) -> jax.Array:
  """A length that stands for the norms [T] of the live tasks, the largest of which is one."""
  count = masked.count(live, norms.dtype)
  safe = jnp.where(live, norms, 1)
  if kind == "min":
    return jnp.min(safe)
  if kind == "max":
    return jnp.max(norms)
  if kind == "mean":
    return jnp.sum(norms) / count
  if kind == "harmonic":
    shortest = jnp.min(safe)
    return shortest * count / jnp.maximum(jnp.sum(shortest / safe, where=live), 1)
  return jnp.exp(jnp.sum(jnp.log(safe), where=live) / count)
