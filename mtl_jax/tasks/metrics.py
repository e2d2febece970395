"""Metrics as `empty / update / merge / compute` over small device-side states.

A state is a pytree of sums, so that states merge exactly whatever the split of the examples into
batches and devices. Unit and direction belong to the metric.
"""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sum(NamedTuple):
  """Total of the values and number of the examples behind it."""

  total: jax.Array  # shape=(), int32 for counts, else float32
  count: jax.Array  # shape=(), int32


@dataclasses.dataclass(frozen=True)
class MeanMetric:
  """The mean of a per-example value over the examples that carry a label.

  Attributes:
    name: as shown, "accuracy".
    values: `values(outputs, labels) -> [B]`; boolean values are counted in integers, exactly.
    unit: of the mean, "" where it has none.
    higher_is_better: direction of progress.
  """

  name: str
  values: Callable[[jax.Array, jax.Array], jax.Array]
  unit: str
  higher_is_better: bool

  def update(self, outputs: jax.Array, labels: jax.Array, mask: jax.Array) -> Sum:
    """State of one batch; `mask` [B] is False where the label is missing."""
    values = self.values(outputs, labels)
    if values.dtype == jnp.bool_:
      values = values.astype(jnp.int32)
    return Sum(jnp.where(mask, values, 0).sum(), mask.sum(dtype=jnp.int32))

  def merge(self, a: Sum, b: Sum) -> Sum:
    """State of the examples of both."""
    return Sum(a.total + b.total, a.count + b.count)

  def compute(self, state: Sum) -> float:
    """The mean as a Python float; NaN where no example carried a label.

    >>> accuracy = MeanMetric("accuracy", lambda o, y: o == y, "fraction", True)
    >>> a = accuracy.update(jnp.array([1, 2]), jnp.array([1, 1]), jnp.array([True, True]))
    >>> b = accuracy.update(jnp.array([5, 5]), jnp.array([5, -1]), jnp.array([True, False]))
    >>> round(accuracy.compute(accuracy.merge(a, b)), 4)
    0.6667
    """
    return float(state.total) / int(state.count) if int(state.count) else float("nan")
