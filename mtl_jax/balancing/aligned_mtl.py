"""Aligned-MTL: the principal components of the gradients are made equally long."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, no_state

SCALES = ("min", "median", "rmse")


def aligned_mtl(scale: str = "min",
                preference: Sequence[float] | jax.Array | None = None) -> Balancer:
  """Replaces the gradients by the nearest orthogonal ones of equal length, and sums those.

  The rule: with `G = V Λ Vᵀ` the Gramian, `d = Jᵀ B p`, where `B = σ V Λ^(-½) Vᵀ` on the span of
  the nonzero eigenvalues. The aligned gradients `B J` have a condition number of one: all their
  singular values are `σ`. Weights `B p` may be negative.

  Args:
    scale: the common length `σ`, of the singular values of J that are not zero: "min" the
      smallest, "median" the median, of an even number the lower of the middle two, "rmse" the
      root of the mean of their squares.
    preference: p, a number a task, none negative, not all zero; ones when left out.

  Returns:
    A balancer that needs the Gramian. If all gradients are zero, the weights are p. Eigenvalues
    below T times the rounding error of the largest count as zero.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, _ = balancing.aggregate(aligned_mtl(), J)
  >>> [round(float(x), 4) for x in d]
  [0.4266, 1.9347, 1.9347]

  Reference:
    Senushkin, Patakin, Kuznetsov, Konushin: Independent Component Alignment for Multi-Task
    Learning. CVPR 2023, arXiv:2305.19000.

  Differences:
    The official code and LibMTL sum, as here by default; TorchJD prefers `p_i = 1 / T`. LibMTL
    calls an eigenvalue routine that current PyTorch lacks. Here eigenvalues are masked, not cut
    off, so that the rank need not be known to the compiler.
  """
  hyperparameters.check_choice("aligned_mtl", "scale", scale, SCALES)
  if preference is not None:
    hyperparameters.check_numbers(
        "aligned_mtl", "preference", preference,
        "one number a task, none negative, not all zero",
        lambda array: array.ndim == 1 and (array >= 0).all() and array.any())

  def init(num_tasks: int) -> tuple:
    if preference is not None:
      hyperparameters.check_length("aligned_mtl", "preference", preference, num_tasks)
    return no_state(num_tasks)

  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    active = signals.active
    gramian = jnp.where(active[:, None] & active[None], signals.gramian, 0)
    prefer = jnp.asarray(1 if preference is None else preference, gramian.dtype)
    prefer = jnp.where(active, prefer, 0)
    aligned = jnp.matmul(alignment(gramian, scale), prefer, precision=jax.lax.Precision.HIGHEST)
    some = jnp.any(jnp.diagonal(gramian) > 0)
    return Decision(jnp.where(active, jnp.where(some, aligned, prefer), 0)), state

  return Balancer("aligned_mtl", init, update, frozenset({"gramian"}),
                  scale="sum" if preference is None else "own")


def alignment(gramian: jax.Array, scale: str) -> jax.Array:
  """`σ V Λ^(-½) Vᵀ` [T, T] of a Gramian, over its nonzero eigenvalues; 0 if there are none."""
  largest = jnp.max(jnp.diagonal(gramian))
  values, vectors = jnp.linalg.eigh(gramian / jnp.where(largest > 0, largest, 1))
  num_tasks = len(values)
  kept = values > num_tasks * jnp.finfo(values.dtype).eps * values[-1]
  rank = jnp.sum(kept, dtype=jnp.int32)  # the last ones: eigenvalues ascend
  if scale == "rmse":
    square = jnp.sum(values, where=kept) / jnp.maximum(rank, 1).astype(values.dtype)
  else:
    index = num_tasks - rank + (0 if scale == "min" else (rank - 1) // 2)
    square = values[jnp.clip(index, 0, num_tasks - 1)]
  factors = jnp.where(kept, jnp.sqrt(jnp.where(kept, square / jnp.where(kept, values, 1), 1)), 0)
  return jnp.matmul(vectors * factors[None], vectors.T, precision=jax.lax.Precision.HIGHEST)
