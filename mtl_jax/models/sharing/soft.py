"""Soft sharing: one trunk a task, pulled together by a penalty on how far apart they are."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.models.sharing.independent import Independent


def mean_distance(x: jax.Array) -> jax.Array:
  """`Σ_t ‖x_t − x̄‖²` of [T, …], with the mean `x̄` over tasks.

  >>> float(mean_distance(jnp.array([[0., 1.], [4., 1.]])))
  8.0
  """
  return jnp.square(x - x.mean(axis=0, keepdims=True)).sum()


def consecutive_distance(x: jax.Array) -> jax.Array:
  """`Σ_t ‖x_t − x_{t+1}‖²` of [T, …].

  >>> float(consecutive_distance(jnp.array([[0., 1.], [4., 1.], [4., 3.]])))
  20.0
  """
  return jnp.square(x[1:] - x[:-1]).sum()


def trace_norm(x: jax.Array) -> jax.Array:
  """The sum of the singular values of [T, …], flattened to [T, n]: small where rows are few.

  They are taken from the T×T Gramian, smoothed by a millionth of its trace, so that the gradient
  is finite where rows are the same or zero; each singular value that is zero then counts as a
  thousandth of the Frobenius norm.

  >>> round(float(trace_norm(jnp.array([[3., 0.], [0., 4.]]))), 3)
  7.0
  """
  rows = x.reshape(x.shape[0], -1)
  gramian = jnp.matmul(rows, rows.T, precision="highest")
  floor = 1e-6 * jnp.trace(gramian) + 1e-12
  return jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(gramian), 0) + floor).sum()


DISTANCES = {
    "mean": mean_distance,
    "consecutive": consecutive_distance,
    "trace_norm": trace_norm,
}


class Soft(Independent):
  """One trunk a task, and a penalty `λ Σ distance` over their parameters, tensor by tensor.

  All trunks are their tasks' own, so balancing has nothing to act on; the penalty is added to the
  loss after it, and is logged as `penalty/soft`.

  Attributes:
    distance: of T tensors: "mean" `Σ_t ‖θ_t − θ̄‖²`, "consecutive" `Σ_t ‖θ_t − θ_{t+1}‖²`, or
      "trace_norm", the sum of the singular values of the matrix with a row a task.
    strength: λ, from 0 on.

  >>> from mtl_jax import models
  >>> sharing = Soft(models.CNN(), ("a", "b"), strength=0.5)
  >>> params = {"trunks_a": {"w": jnp.array([1., 2.])}, "trunks_b": {"w": jnp.array([3., 2.])}}
  >>> {name: float(value) for name, value in sharing.penalties(params).items()}
  {'soft': 1.0}

  Reference:
    Duong, Cohn, Bird, Cook: Low Resource Dependency Parsing: Cross-lingual Parameter Sharing in a
    Neural Network Parser. ACL 2015. For the trace norm: Yang, Hospedales: Trace Norm Regularised
    Deep Multi-Task Learning. ICLR 2017 workshop, arXiv:1606.04038.

  Differences:
    Duong et al. have two tasks and penalise chosen layers; here any number of tasks and all
    layers. mtlearn takes "consecutive" and divides each tensor's distance by its size. The mean
    treats all tasks alike, a chain does not; over all pairs the sum of squares is T times that to
    the mean. Of Yang and Hospedales' tensor norms this is the one that flattens along the tasks.
  """

  distance: str = "mean"
  strength: float = 1e-3

  def penalties(self, params: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What the architecture adds to the loss, `{"soft": []}`.

    Args:
      params: of this module, by its own paths.
    """
    distance = DISTANCES[self.distance]
    trunks = [params[f"trunks_{task}"] for task in self.tasks]
    parts = jax.tree.leaves(jax.tree.map(lambda *xs: distance(jnp.stack(xs)), *trunks))
    return {"soft": self.strength * sum(parts[1:], parts[0])}
