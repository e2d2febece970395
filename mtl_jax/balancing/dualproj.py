"""DualProj: the mean gradient, projected onto what conflicts with no task."""

import jax
import jax.numpy as jnp

from mtl_jax.balancing import dual_cone, solvers
from mtl_jax.balancing.balancer import Balancer


def dualproj(preference: jax.Array | None = None,
             regularization: float | jax.Array = 0.0) -> Balancer:
  """Projects the combined gradient onto the dual cone of all task gradients.

  The rule: with the dual cone `K = {d : g_j·d ≥ 0 for all j}` and shares `u`,
  `d = Π_K(Σ u_i g_i)`, the nearest direction with which no task conflicts. It is one quadratic
  program, `w = argmin vᵀ G v` over `v ≥ u`.

  Args:
    preference: [T] the shares `u`, none negative, used as they are; 1 over the number of active
      tasks when left out.
    regularization: not negative; this many traces of `G` are added to its diagonal, which keeps
      the weights small where gradients are nearly opposite, at the cost of some conflict.

  Returns:
    A balancer that needs the Gramian. Where nothing conflicts the weights are the shares; so they
    are for a task whose gradient is zero, and with nothing but zeros.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, _ = balancing.aggregate(dualproj(), J)
  >>> [round(float(x), 4) for x in d]
  [0.5556, 1.1111, 1.1111]

  Reference:
    Lopez-Paz, Ranzato: Gradient Episodic Memory for Continual Learning. NeurIPS 2017,
    arXiv:1706.08840. The name is TorchJD's.

  Differences:
    GEM projects the gradient of the current task against those of past tasks, with a margin on
    the multipliers; here, as in TorchJD, the mean of all is projected against all, without one.
    TorchJD adds 1e-4 of the trace of `G` to its diagonal, which shows in the third digit; here
    nothing is added unless asked for.
  """
  def project(cosines: jax.Array, start: jax.Array, live: jax.Array) -> jax.Array:
    largest = jnp.max(start)
    largest = jnp.where(largest > 0, largest, 1)
    start /= largest
    return largest * (solvers.cone_projection(cosines, start, live) - start)

  return dual_cone.balancer("dualproj", preference, regularization, project)
