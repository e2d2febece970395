"""UPGrad: each gradient is projected onto what conflicts with no task, then they are summed."""

import jax
import jax.numpy as jnp

from mtl_jax.balancing import dual_cone, solvers
from mtl_jax.balancing.balancer import Balancer


def upgrad(preference: jax.Array | None = None,
           regularization: float | jax.Array = 0.0) -> Balancer:
  """Projects every task gradient onto the dual cone of all gradients and combines the results.

  The rule: with the dual cone `K = {d : g_j·d ≥ 0 for all j}` and shares `u`,
  `d = Σ u_i Π_K(g_i)`. So no task conflicts with `d`, and `d` is linear in the scale of each
  gradient. Each projection is a quadratic program, `v_i = argmin vᵀ G v` over `v ≥ e_i`, and
  `w = Σ u_i v_i`.

  Args:
    preference: [T] the shares `u`, none negative, used as they are; 1 over the number of active
      tasks when left out.
    regularization: not negative; this many traces of `G` are added to its diagonal, which keeps
      the weights small where gradients are nearly opposite, at the cost of some conflict.

  Returns:
    A balancer that needs the Gramian. A task whose gradient is zero keeps its share as weight, so
    that with nothing but zeros the weights are the shares.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, _ = balancing.aggregate(upgrad(), J)
  >>> [round(float(x), 4) for x in d]
  [0.2924, 1.9006, 1.9006]

  Reference:
    Quinton, Rey: Jacobian Descent for Multi-Objective Optimization. 2024, arXiv:2406.16232.

  Differences:
    TorchJD, the authors' code, and LibMTL add 1e-4 of the trace to the diagonal and return zero
    for small traces; both solve one program after the other on the host in float64. Here nothing
    is added unless asked for, and all T programs are solved as a batch on the device. With two
    tasks and equal shares `d` is half of what `pcgrad` sums to.
  """
  def project(cosines: jax.Array, start: jax.Array, live: jax.Array) -> jax.Array:
    rows = jnp.eye(len(start), dtype=start.dtype)
    projected = jax.vmap(solvers.cone_projection, (None, 0, None))(cosines, rows, live)
    return jnp.sum(start[:, None] * (projected - rows), axis=0)

  return dual_cone.balancer("upgrad", preference, regularization, project)
