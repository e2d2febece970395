"""Metrics as `update / merge / compute` over small device-side states.

A state is a pytree of sums, so that states merge exactly whatever the split of the examples into
batches and devices. Where only all examples together have a value, such as the area under a curve,
a metric is `gathered`: its state is what it keeps of each example, along a leading axis. Unit and
direction belong to the metric.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp


class Metric(Protocol):
  """What a metric is.

  Attributes:
    name: as shown, "accuracy".
    unit: of the value, "" where it has none.
    higher_is_better: direction of progress.
    gathered: False where `update` and `merge` run on the device, on states of fixed shapes. True
      where `update` gives arrays [B, …], which are joined along their first axis on the host and
      handed to `compute`; such a metric is not taken in training steps.
  """

  name: str
  unit: str
  higher_is_better: bool
  gathered: bool

  def update(self, outputs: Any, labels: Any, mask: jax.Array) -> Any:
    """State of one batch; `mask` [B] is False for examples that do not count."""
    ...

  def merge(self, a: Any, b: Any) -> Any:
    """State of the examples of both."""
    ...

  def compute(self, state: Any) -> float:
    """The value as a Python float; NaN where no example counted."""
    ...


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
  gathered = False

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
