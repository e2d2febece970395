"""PCGrad: each gradient gives up what conflicts with the others."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing import solvers
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, no_state


def pcgrad() -> Balancer:
  """Projects each task gradient onto the normal plane of every other that it conflicts with.

  The rule: for each `i` start from `g = g_i`; for the other `j` in random order, wherever
  `g·g_j < 0`, replace `g` by `g - (g·g_j / ‖g_j‖²) g_j`. Then `d` is the sum of the results. With
  two tasks `d` conflicts with neither; with more, some conflict can remain.

  Returns:
    A balancer that needs the Gramian: every result is a combination of the gradients, so the
    projections act on its coefficients. The order is drawn from the step's key. A task whose
    gradient is zero conflicts with nobody and keeps its own weight.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, _ = balancing.aggregate(pcgrad(), J)
  >>> [round(float(x), 4) for x in d]
  [0.5848, 3.8012, 3.8012]

  Reference:
    Yu, Kumar, Gupta, Levine, Hausman, Finn: Gradient Surgery for Multi-Task Learning. NeurIPS
    2020, arXiv:2001.06782.

  Differences:
    The official code discards its shuffle, which fixes the order; we draw one for each task, as
    the paper says. LibMTL and nash-mtl sum, as here; a common PyTorch port averages, whatever its
    reduction says (`reduction="mean"` of `balancing.get`).
  """
  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    active = signals.active
    cosines, norms = solvers.unit_rows(signals.gramian, active)
    tasks = jnp.arange(active.shape[0])
    order = jnp.argsort(jax.random.uniform(signals.key, cosines.shape, jnp.float32), axis=1)

    def project(step: jax.Array, coefficients: jax.Array) -> jax.Array:
      other = order[:, step]
      overlaps = jnp.sum(coefficients * cosines[other], axis=1)
      conflicts = jnp.where(other == tasks, 0, jnp.minimum(overlaps, 0))
      return coefficients.at[tasks, other].add(-conflicts)

    # Row i holds the projected g_i in units of ‖g_i‖, by the directions of all gradients.
    own = jnp.eye(len(tasks), dtype=cosines.dtype)
    added = jax.lax.fori_loop(0, len(tasks), project, own) - own
    lengths = jnp.where(norms > 0, norms, 1)
    weights = 1 + jnp.sum(norms[:, None] * added, axis=0) / lengths
    return Decision(jnp.where(active, weights, 0)), state

  return Balancer("pcgrad", no_state, update, frozenset({"gramian"}))
