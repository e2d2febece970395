"""Metrics as `update / merge / compute` over small device-side states.

A state is a pytree of sums, so that states merge exactly whatever the split of the examples into
batches and devices: integers are counted in two words, which no number of pixels overflows, and
only sums of real numbers round, in float32. Where only all examples together have a value, such as
the area under a curve, a metric is `gathered`: its state is what it keeps of each example, along a
leading axis. Unit and direction belong to the metric.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np


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


_LOW_BITS = 30


class Count(NamedTuple):
  """Integers below 2^61 in two int32 words: 27 000 images of 288 x 384 hold 2^31 pixels."""

  high: jax.Array
  low: jax.Array  # below 2^30


def counted(numbers: jax.Array) -> Count:
  """int32 numbers, not negative, as counts.

  >>> number(added(counted(jnp.array([2**31 - 1])), counted(jnp.array([2**31 - 1])))).tolist()
  [4294967294]
  """
  return Count(numbers >> _LOW_BITS, numbers & (2 ** _LOW_BITS - 1))


def added(a: Count, b: Count) -> Count:
  """The sum of two counts, exactly."""
  low = counted(a.low + b.low)
  return Count(a.high + b.high + low.high, low.low)


def number(count: Count) -> np.ndarray:
  """A count as int64 on the host."""
  high, low = (np.asarray(word).astype(np.int64) for word in count)
  return (high << _LOW_BITS) + low


class Sum(NamedTuple):
  """Total of the values and number of the examples, or of their parts, behind it."""

  total: jax.Array | Count  # shape=(), float32; a count where values are boolean
  count: Count  # shape=()


@dataclasses.dataclass(frozen=True)
class MeanMetric:
  """The mean of a value over the examples that carry a label, or over their labelled parts.

  Attributes:
    name: as shown, "accuracy".
    values: `values(outputs, labels) -> [B]`, or [B, …] where parts count each on their own;
      boolean values are counted in integers, exactly.
    unit: of the value, "" where it has none.
    higher_is_better: direction of progress.
    parts: `parts(labels) -> bool [B, …]`, of the values' shape: which of them count; all if None.
    finish: from the mean to the value, such as a root.
  """

  name: str
  values: Callable[[Any, Any], jax.Array]
  unit: str
  higher_is_better: bool
  parts: Callable[[Any], jax.Array] | None = None
  finish: Callable[[float], float] = float
  gathered = False

  def update(self, outputs: Any, labels: Any, mask: jax.Array) -> Sum:
    """State of one batch; `mask` [B] is False where the label is missing."""
    values = self.values(outputs, labels)
    there = mask.reshape(mask.shape + (1,) * (values.ndim - 1))
    there = jnp.broadcast_to(there, values.shape)
    if self.parts is not None:
      there &= self.parts(labels)
    if values.dtype == jnp.bool_:
      total = counted((there & values).sum(dtype=jnp.int32))
    else:
      total = jnp.where(there, values.astype(jnp.float32), 0).sum()
    return Sum(total, counted(there.sum(dtype=jnp.int32)))

  def merge(self, a: Sum, b: Sum) -> Sum:
    """State of the examples of both."""
    total = added(a.total, b.total) if isinstance(a.total, Count) else a.total + b.total
    return Sum(total, added(a.count, b.count))

  def compute(self, state: Sum) -> float:
    """The value as a Python float; NaN where no example carried a label.

    >>> accuracy = MeanMetric("accuracy", lambda o, y: o == y, "fraction", True)
    >>> a = accuracy.update(jnp.array([1, 2]), jnp.array([1, 1]), jnp.array([True, True]))
    >>> b = accuracy.update(jnp.array([5, 5]), jnp.array([5, -1]), jnp.array([True, False]))
    >>> round(accuracy.compute(accuracy.merge(a, b)), 4)
    0.6667
    """
    count = int(number(state.count))
    total = number(state.total) if isinstance(state.total, Count) else state.total
    return self.finish(float(total) / count) if count else float("nan")


@dataclasses.dataclass(frozen=True)
class CountMetric:
  """A score of integers that are counted over all examples, exactly.

  Attributes:
    name: as shown, "macro_f1".
    counts: `counts(outputs, labels, mask) -> {what: int32 […]}` of one batch; `mask` [B] is False
      for examples that do not count.
    score: `score({what: int64 […]}) -> float` on the host; NaN where nothing was counted.
    unit: of the score, "" where it has none.
    higher_is_better: direction of progress.
  """

  name: str
  counts: Callable[[Any, Any, jax.Array], Mapping[str, jax.Array]]
  score: Callable[[Mapping[str, np.ndarray]], float]
  unit: str
  higher_is_better: bool
  gathered = False

  def update(self, outputs: Any, labels: Any, mask: jax.Array) -> dict[str, Count]:
    """State of one batch."""
    return {what: counted(n) for what, n in self.counts(outputs, labels, mask).items()}

  def merge(self, a: dict[str, Count], b: dict[str, Count]) -> dict[str, Count]:
    """State of the examples of both."""
    return {what: added(a[what], b[what]) for what in a}

  def compute(self, state: dict[str, Count]) -> float:
    """The score as a Python float."""
    return float(self.score({what: number(count) for what, count in state.items()}))
