"""Krum: the gradients that have the nearest neighbours, and no others."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, no_state

DISTANCES = ("squared", "plain")


def krum(byzantine: int | jax.Array = 1, selected: int | jax.Array = 1,
         distance: str = "squared") -> Balancer:
  """Averages the gradients that are closest to the others, so that a few may be anything.

  The rule: among n active tasks the score of one is the sum of the (squared) distances to its
  `n - byzantine - 2` nearest others; `d` is the mean of the `selected` gradients of lowest score.

  Args:
    byzantine: how many tasks may be arbitrarily wrong; an integer not below 0.
    selected: how many to average, Multi-Krum's m; an integer not below 1.
    distance: "squared" or "plain" Euclidean distances.

  Returns:
    A balancer that needs the Gramian; the weights sum to one. With fewer than `byzantine + 3`
    active tasks scores mean nothing: then, and if `selected` is not below n, all are averaged.
    Where several tasks tie for the last places, they share them.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[1., 1.], [1., 1.5], [1.5, 1.], [75., -666.]])
  >>> d, _ = balancing.aggregate(krum(byzantine=1, selected=3), J)
  >>> [round(float(x), 4) for x in d]
  [1.1667, 1.1667]

  Reference:
    Blanchard, El Mhamdi, Guerraoui, Stainer: Machine Learning with Adversaries: Byzantine
    Tolerant Gradient Descent. NeurIPS 2017, arXiv:1703.02757.

  Differences:
    TorchJD sums plain distances and fails with too few gradients. The paper and TorchJD break a
    tie by the order of the tasks; ours does not depend on that order, and zero gradients weigh
    the same. LibMTL does not have the method.
  """
  hyperparameters.check_numbers("krum", "byzantine", byzantine, "an integer not below 0",
                                lambda array: array.ndim == 0 and array >= 0 and array % 1 == 0)
  hyperparameters.check_numbers("krum", "selected", selected, "an integer not below 1",
                                lambda array: array.ndim == 0 and array >= 1 and array % 1 == 0)
  hyperparameters.check_choice("krum", "distance", distance, DISTANCES)

  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    active, dtype = signals.active, signals.gramian.dtype
    count = jnp.sum(active, dtype=dtype)
    neighbours = count - jnp.asarray(byzantine, dtype) - 2
    distances = squared_distances(signals.gramian, active)
    if distance == "plain":
      distances = jnp.sqrt(distances)
    nearest = jnp.arange(len(active), dtype=jnp.int32) < neighbours.astype(jnp.int32)
    scores = jnp.sum(jnp.where(nearest[None], jnp.sort(distances, axis=1), 0), axis=1)
    scores = jnp.where(active & (neighbours >= 1), scores, jnp.where(active, 0, jnp.inf))

    places = jnp.minimum(jnp.asarray(selected, dtype), count)
    last = jnp.sort(scores)[jnp.maximum(places.astype(jnp.int32) - 1, 0)]
    sure, tied = active & (scores < last), active & (scores == last)
    free = places - jnp.sum(sure, dtype=dtype)
    share = free / jnp.maximum(jnp.sum(tied, dtype=dtype), 1)
    weights = jnp.where(sure, 1, jnp.where(tied, share, 0))
    return Decision(weights / jnp.maximum(places, 1)), state

  return Balancer("krum", no_state, update, frozenset({"gramian"}), scale="mean")


def squared_distances(gramian: jax.Array, active: jax.Array) -> jax.Array:
  """Between gradients, [T, T]; infinite to oneself and to inactive tasks."""
  others = active[:, None] & active[None] & ~jnp.eye(len(active), dtype=bool)
  squares = jnp.where(active, jnp.diagonal(gramian), 0)
  products = gramian + gramian.T  # exactly symmetric, so that two tasks see the same distance
  distances = squares[:, None] + squares[None] - jnp.where(others, products, 0)
  return jnp.where(others, jnp.maximum(distances, 0), jnp.inf)
