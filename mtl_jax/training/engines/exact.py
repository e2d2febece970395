"""Gradients of the shared parameters, one backward pass of the trunk a task."""

from collections.abc import Callable
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
  grads, pull = backward.feature_grads[part], backward.pulls[part]
  taking_part = [task for task, grad in grads.items() if grad is not None]
  one = lambda grad: pull({taking_part[0]: grad})
  # Where all tasks read the same features, the way back from one is that from each. In a loop it
  # is compiled once, and the maps of one task only are in memory.
  if (backward.one_stream and backward.one_representation
      and len(grads) == len(taking_part) > 1 and _fast_in_loops(one, grads[taking_part[0]])):
    return jax.lax.map(one, jax.tree.map(lambda *tasks: jnp.stack(tasks), *grads.values()))
  rows = None
  for i, task in enumerate(grads):
    if task not in taking_part:
      continue
    row = pull({task: grads[task]})
    if rows is None:
      rows = jax.tree.map(lambda x: jnp.zeros((len(grads), *x.shape), x.dtype), row)
    # Written in place one by one: stacked, they would all be in memory twice.
    rows = jax.tree.map(lambda rows, x: rows.at[i].set(x), rows, row)  # noqa: B023
  return rows


def _fast_in_loops(function: Callable[[Any], Any], argument: Any) -> bool:
  """False on CPUs for XLA's own convolutions, which are many times slower in loops there."""
  return (jax.default_backend() != "cpu"
          or "conv_general_dilated" not in str(jax.make_jaxpr(function)(argument)))
