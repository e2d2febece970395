"""Gradients of the shared representation, one backward pass of the trunk whatever T."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing import Balancer
from mtl_jax.training.engines.engine import Backward, Engine, by_rows


def features() -> Engine:
  """The engine that Sener and Koltun (NeurIPS 2018, arXiv:1810.04650) call MGDA-UB.

  Where all tasks read one stream, inner products are taken example by example; where they do not,
  the gradients are summed over the batch first, since examples of different streams do not
  correspond. Norms are those in feature space: methods whose weights depend on the gradients'
  size, and bounds such as `max_norm`, then make steps of another length.

  >>> from mtl_jax import balancing
  >>> features().objection(balancing.moco(), True, True)
  'keeps gradients of the shared parameters from step to step'
  """
  return Engine("features", by_rows(_rows_of), _objection)


def _objection(balancer: Balancer, one_stream: bool, one_representation: bool) -> str | None:
  if "gradient_state" in balancer.needs:
    return "keeps gradients of the shared parameters from step to step"
  if "task_grads" in balancer.needs and not (one_stream and one_representation):
    return ("returns a direction, which the features engine can apply only where all tasks share "
            "the features of one stream")
  return None


def _rows_of(backward: Backward, part: int) -> Any:
  """Gradients of the representation, stacked: [T, B, ...], or [T, ...] summed over the batch."""
  by_example = backward.one_stream and len(backward.pulls) == 1  # parts hold other examples

  def stacked(*grads):
    rows = grads if by_example else [g.sum(axis=0) for g in grads]
    shapes = {row.shape for row in rows}
    if len(shapes) > 1:
      raise ValueError("gradients: the features engine expected maps of one size for all tasks, "
                       f"found {sorted(shapes)}; use 'exact'")
    return jnp.stack(rows)
  grads = list(backward.feature_grads[part].values())
  zeros = jax.tree.map(jnp.zeros_like, next(grad for grad in grads if grad is not None))
  return jax.tree.map(stacked, *[zeros if grad is None else grad for grad in grads])
