"""Gradients of the shared parameters, one backward pass of the trunk a task."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing import Balancer, Signals
from mtl_jax.balancing.balancer import gramian_of
from mtl_jax.training.engines.engine import Backward, Engine, with_inner


def exact() -> Engine:
  """The engine to which all others compare; it serves every method.

  >>> exact().objection(None, False, False) is None
  True
  """
  def look(balancer: Balancer, signals: Signals, state: Any,
           backward: Backward) -> tuple[Signals, Any, Any]:
    parts = range(len(backward.pulls))
    rows = [rows_of(backward, part) for part in parts]
    signals = with_inner(balancer.needs, signals, lambda p, q: gramian_of(rows[p], rows[q]),
                         len(parts))
    return signals, rows[0] if balancer.needs & {"gramian", "task_grads"} else None, state

  return Engine("exact", look, lambda *_: None, rows_of_parameters=True)


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
