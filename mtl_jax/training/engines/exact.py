"""Gradients of the shared parameters, one backward pass of the trunk a task."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.training.engines.engine import Backward, Engine, by_rows


def exact() -> Engine:
  """The engine to which all others compare; it serves every method.

  >>> exact().objection(None, False, False) is None
  True
  """
  return Engine("exact", by_rows(rows_of), lambda *_: None, rows_of_parameters=True)


def rows_of(backward: Backward, part: int) -> Any:
  """Gradients of the shared parameters, stacked: leaves [T, ...]."""
  grads = backward.feature_grads[part]
  rows = None
  for i, (task, grad) in enumerate(grads.items()):
    if grad is None:
      continue
    row = backward.pulls[part]({task: grad})
    if rows is None:
      rows = jax.tree.map(lambda x: jnp.zeros((len(grads), *x.shape), x.dtype), row)
    # Written in place one by one: stacked, they would all be in memory twice.
    rows = jax.tree.map(lambda rows, x: rows.at[i].set(x), rows, row)  # noqa: B023
  return rows
