"""Regression: numbers an example, on a line or on a circle."""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_jax.tasks import arguments
from mtl_jax.tasks.class_counts import mean_of_defined
from mtl_jax.tasks.metrics import MeanMetric
from mtl_jax.tasks.parts import filled, mean_of_parts, outputs_like, present
from mtl_jax.tasks.task import Task

LOSSES = {
    "mse": lambda error, delta: error ** 2,
    "l1": lambda error, delta: jnp.abs(error),
    "huber": lambda error, delta: optax.losses.huber_loss(error, delta=delta),
}


def regression(name: str, *, size: int, loss: str = "mse", delta: float = 1.0,
               mean: Sequence[float] | float | None = None,
               std: Sequence[float] | float | None = None, scale_targets: bool = True,
               period: float | None = None, unit: str = "", stream: str | None = None,
               label: str = "label", weight: float = 1.0) -> Task:
  """Numbers an image: squared, absolute or Huber error; MAE, RMSE and R².

  Labels are float32 [B] or [B, D], each number missing on its own where NaN; an example's loss is
  the mean over those it has. The head gives [B, size] in scaled units, (label - mean) / std, in
  which the loss is taken, so that the losses of tasks in different units compare. Metrics are in
  the labels' own unit, over all numbers; R² is each column's, then their mean, as in scikit-learn.

  With a `period` labels lie on a circle, as angles do: the head gives [B, 2 size], sine and cosine
  of each, the loss compares both with the label's, and the one metric is the MAE the short way
  round. Nothing is scaled then.

  Args:
    name: of the task.
    size: D; 1 for labels [B].
    loss: "mse", "l1" or "huber".
    delta: error, in scaled units, from which Huber's loss is straight instead of half the square.
    mean: of the labels in train, one a column or one for all.
    std: their standard deviation.
    scale_targets: False leaves labels as they are, whatever `mean` and `std`.
    period: after which labels repeat: 360 for degrees, 2π for radians.
    unit: of the labels, "years", as shown beside MAE and RMSE.
    stream: whose images it reads; the task's name when left out.
    label: key of the labels in that stream.
    weight: constant factor of the loss before any balancing.

  Raises:
    ValueError: for an unknown loss, numbers that cannot be, or labels to scale without their mean.

  >>> task = regression("age", size=1, mean=30., std=10.)
  >>> task.loss(jnp.array([[1.], [0.]]), jnp.array([40., 20.])).tolist()
  [0.0, 1.0]
  """
  arguments.check(name, "size", size >= 1, "at least 1", size)
  arguments.check_choice(name, "loss", loss, tuple(LOSSES))
  arguments.check(name, "delta", delta > 0, "a number > 0", delta)
  target = _target(name, size, mean, std, scale_targets, period)

  def losses(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    labels = _columns(name, labels, size)
    return mean_of_parts(LOSSES[loss](target.scaled_error(outputs, labels), delta),
                         target.parts(labels))

  def errors(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return target.error(outputs, _columns(name, labels, size))

  there = lambda labels: present(_columns(name, labels, size))
  metrics = [MeanMetric("mae", lambda o, y: jnp.abs(errors(o, y)), unit, False, there)]
  if period is None:
    metrics += [MeanMetric("rmse", lambda o, y: errors(o, y) ** 2, unit, False, there, math.sqrt),
                R2("r2", errors, lambda y: _columns(name, y, size) - target.mean, there)]
  return Task(name=name, stream=stream or name, label=label, loss=losses,
              num_outputs=size if period is None else 2 * size, metrics=tuple(metrics),
              weight=weight, partial=True)


def _columns(name: str, labels: jax.Array, size: int) -> jax.Array:
  columns = labels.reshape(labels.shape[0], -1)
  if columns.shape[1] != size:
    raise ValueError(f"task {name}: size: expected that of its labels, {columns.shape[1]}, "
                     f"found {size}")
  return columns


@dataclasses.dataclass(frozen=True)
class _Line:
  """Targets are labels less `mean`, over `std`; both float32 [1, D]."""

  name: str
  mean: np.ndarray
  std: np.ndarray

  def parts(self, labels: jax.Array) -> jax.Array:
    """Which parts of the scaled error are there."""
    return present(labels)

  def scaled_error(self, outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Outputs less targets, [B, D]."""
    return outputs_like(self.name, outputs, labels) - (filled(labels) - self.mean) / self.std

  def error(self, outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Predictions less labels in the labels' unit, [B, D]."""
    return self.std * self.scaled_error(outputs, labels)


@dataclasses.dataclass(frozen=True)
class _Circle:
  """Targets are the sine and cosine of labels that repeat after `period`."""

  name: str
  period: float

  def parts(self, labels: jax.Array) -> jax.Array:
    """Which parts of the scaled error are there."""
    return jnp.repeat(present(labels), 2, axis=1)

  def scaled_error(self, outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Outputs less targets, [B, 2 D]."""
    angles = filled(labels) * (2 * math.pi / self.period)
    targets = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(len(labels), -1)
    return outputs_like(self.name, outputs, targets) - targets

  def error(self, outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Predictions less labels the short way round, in the labels' unit, [B, D]."""
    outputs = outputs.astype(jnp.float32).reshape(*labels.shape, 2)
    predicted = jnp.arctan2(outputs[..., 0], outputs[..., 1]) * (self.period / (2 * math.pi))
    half = self.period / 2
    return jnp.mod(predicted - filled(labels) + half, self.period) - half


def _target(name: str, size: int, mean: Sequence[float] | float | None,
            std: Sequence[float] | float | None, scale_targets: bool,
            period: float | None) -> _Line | _Circle:
  if period is not None:
    arguments.check(name, "period", 0 < period < math.inf, "a number > 0", period)
    return _Circle(name, float(period))
  if not scale_targets:
    mean, std = 0.0, 1.0
  if mean is None or std is None:
    raise ValueError(f"{name}: mean and std: expected those of the labels in train, found none; "
                     "give them, or scale_targets=False")
  return _Line(name, arguments.numbers(name, "mean", mean, size)[None],
               arguments.numbers(name, "std", std, size, above=0)[None])


class Spread(NamedTuple):
  """What R² needs of each column, all [D]; the mean is `origin + offset`.

  The origin is never computed with, so that it does not round, and the offset is small beside it.
  """

  count: jax.Array  # int32
  origin: jax.Array
  offset: jax.Array
  squares: jax.Array  # of labels less their mean, summed
  residual: jax.Array  # of predictions less labels, squared and summed


@dataclasses.dataclass(frozen=True)
class R2:
  """The coefficient of determination: 1 - Σ error² / Σ (label - mean)², the mean over columns.

  The mean is that of all evaluated labels: sums of squares about the means of two batches merge
  exactly (Chan, Golub, LeVeque: Updating Formulae and a Pairwise Algorithm for Computing Sample
  Variances. 1979). A column whose labels do not vary is left out; NaN where none does.

  Attributes:
    name: as shown.
    errors: `errors(outputs, labels) -> [B, D]`.
    columns: `columns(labels) -> [B, D]`, labels up to a constant, NaN where missing.
    parts: `parts(labels) -> bool [B, D]`, which of them are there.
  """

  name: str
  errors: Callable[[jax.Array, jax.Array], jax.Array]
  columns: Callable[[jax.Array], jax.Array]
  parts: Callable[[jax.Array], jax.Array]
  unit = ""
  higher_is_better = True
  gathered = False

  def update(self, outputs: jax.Array, labels: jax.Array, mask: jax.Array) -> Spread:
    """State of one batch; `mask` [B] is False for examples that do not count."""
    there = self.parts(labels) & mask[:, None]
    columns, errors = self.columns(labels), self.errors(outputs, labels)
    count = there.sum(axis=0, dtype=jnp.int32)
    among = jnp.maximum(count, 1).astype(jnp.float32)
    origin = jnp.where(there, columns, 0).sum(axis=0) / among
    apart = jnp.where(there, columns - origin[None], 0)
    offset = apart.sum(axis=0) / among
    squares = jnp.where(there, (apart - offset[None]) ** 2, 0).sum(axis=0)
    residual = jnp.where(there, errors ** 2, 0).sum(axis=0)
    return Spread(count, origin, offset, squares, residual)

  def merge(self, a: Spread, b: Spread) -> Spread:
    """State of the examples of both."""
    origin = jnp.where(a.count > 0, a.origin, b.origin)
    offset_b = b.offset + (b.origin - origin)
    offset_a = jnp.where(a.count > 0, a.offset, offset_b)
    n_a, n_b = a.count.astype(jnp.float32), b.count.astype(jnp.float32)
    share = n_b / jnp.maximum(n_a + n_b, 1)
    apart = offset_b - offset_a
    return Spread(a.count + b.count, origin, offset_a + apart * share,
                  a.squares + b.squares + apart ** 2 * n_a * share, a.residual + b.residual)

  def compute(self, state: Spread) -> float:
    """The value as a Python float."""
    squares, residual = (np.asarray(x, np.float64) for x in (state.squares, state.residual))
    varies = squares > 0
    return mean_of_defined(np.where(varies, 1 - residual / np.where(varies, squares, 1), np.nan))
