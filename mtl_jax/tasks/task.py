"""A task: what is learned from which label of which stream, and how it is measured."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.tasks.metrics import MeanMetric, Metric
from mtl_jax.tasks.parts import present


@dataclasses.dataclass(frozen=True)
class Task:
  """One task.

  Attributes:
    name: unique among the tasks of a model.
    stream: name of the stream whose images it reads.
    label: key of its labels in that stream's batch.
    loss: `loss(outputs, labels) -> [B]`, one value an example, in float32 whatever the outputs'
      type. Of an example that does not count it sees labels of 0, and its value is not used.
    num_outputs: size of the last axis of what its head must give: [B, num_outputs], or
      [B, H, W, num_outputs] where the labels are maps; the task's kind says if it is more.
    metrics: besides the loss; the first is the one that selects the best checkpoint.
    weight: constant factor of its loss before any balancing.
    partial: whether an example's label may be missing in part, as pixels of a mask may, or single
      numbers of several: loss and metrics then see -1 or NaN there and leave it out, and the
      example counts if any part is there. Otherwise one with any part missing does not count.
  """

  name: str
  stream: str
  label: str
  loss: Callable[[Any, Any], jax.Array]
  num_outputs: int
  metrics: Sequence[Metric] = ()
  weight: float = 1.0
  partial: bool = False

  def __post_init__(self):
    if not self.weight > 0:
      raise ValueError(f"{self.name}: weight: expected a number > 0, found {self.weight!r}")

  @property
  def all_metrics(self) -> Sequence[Metric]:
    """The loss as a metric, then the others."""
    return (MeanMetric("loss", self.loss, "", higher_is_better=False), *self.metrics)


def labelled(labels: jax.Array, partial: bool = False) -> jax.Array:
  """Which examples carry a label: [B, ...] -> [B] bool, whole, or any part of one if `partial`.

  >>> labelled(jnp.array([3, -1])).tolist(), labelled(jnp.array([[0.5, jnp.nan]])).tolist()
  ([True, False], [False])
  >>> labelled(jnp.array([[0.5, jnp.nan]]), partial=True).tolist()
  [True]
  """
  parts = present(labels).reshape(labels.shape[0], -1)
  return parts.any(axis=1) if partial else parts.all(axis=1)


def labels_of(task: Task, batch: Mapping[str, Mapping[str, jax.Array]]
              ) -> tuple[jax.Array, jax.Array]:
  """A task's labels [B, …] in a batch, and which examples count, [B].

  Labels are 0 where the example does not count, so that no NaN is ever computed. An example whose
  stream says that it is not `present` does not count, whatever its label.
  """
  columns = batch[task.stream]
  if task.label not in columns:
    raise ValueError(f"task {task.name}: expected the label {task.label!r} in stream "
                     f"{task.stream!r}, found {sorted(columns)}")
  labels = columns[task.label]
  mask = labelled(labels, task.partial)
  if "present" in columns:
    mask &= columns["present"]
  wide = mask.reshape(mask.shape + (1,) * (labels.ndim - 1))
  return jnp.where(wide, labels, jnp.zeros_like(labels)), mask


def task_losses(tasks: Sequence[Task], outputs: Mapping[str, Any],
                batch: Mapping[str, Mapping[str, jax.Array]]) -> tuple[jax.Array, jax.Array]:
  """Mean loss of every task over its labelled examples: the one place where losses are reduced.

  Args:
    tasks: the T tasks.
    outputs: of each task's head, [B, ...], or a dict of such.
    batch: `{stream: {"image": …, label: [B, …]}}`.

  Returns:
    losses: [T] float32, times each task's constant weight; 0 where a task has no label.
    active: [T] bool, whether the batch holds any label of the task.
  """
  losses, active = [], []
  for task in tasks:
    labels, mask = labels_of(task, batch)
    values = jnp.where(mask, task.loss(outputs[task.name], labels).astype(jnp.float32), 0.0)
    count = mask.sum(dtype=jnp.int32)
    losses.append(task.weight * values.sum() / jnp.maximum(count, 1).astype(jnp.float32))
    active.append(count > 0)
  return jnp.stack(losses), jnp.stack(active)


def task_metrics(tasks: Sequence[Task], outputs: Mapping[str, Any],
                 batch: Mapping[str, Mapping[str, jax.Array]], *,
                 gathered: bool = True) -> dict[str, dict[str, Any]]:
  """Metric states of one batch: `{task: {metric: state}}`, the loss among them.

  Metrics that are gathered are left out where `gathered` is False, as in training steps.
  """
  states = {}
  for task in tasks:
    labels, mask = labels_of(task, batch)
    states[task.name] = {metric.name: metric.update(outputs[task.name], labels, mask)
                         for metric in task.all_metrics if gathered or not metric.gathered}
  return states


def empty_metrics(tasks: Sequence[Task], outputs: Mapping[str, Any],
                  batch: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, dict[str, Any]]:
  """States of no example at all, as `task_metrics` gives for a training step.

  Args:
    tasks: some tasks.
    outputs: shapes of their heads' outputs, [B, …].
    batch: shapes of their labels, [B, …].
  """
  one = lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype)
  nobody = jnp.zeros(1, jnp.bool_)
  return {task.name: {metric.name: metric.update(jax.tree.map(one, outputs[task.name]),
                                                 one(batch[task.stream][task.label]), nobody)
                      for metric in task.all_metrics if not metric.gathered}
          for task in tasks}


def merge_metrics(tasks: Sequence[Task], a: dict, b: dict) -> dict:
  """Metric states of the examples of both, of those metrics that are in them."""
  return {task.name: {metric.name: metric.merge(a[task.name][metric.name],
                                                b[task.name][metric.name])
                      for metric in task.all_metrics if metric.name in a[task.name]}
          for task in tasks}


def compute_metrics(tasks: Sequence[Task], states: dict) -> dict[str, float]:
  """Values of those metrics that are in the states: `{"<task>/<metric>": float}`."""
  return {f"{task.name}/{metric.name}": metric.compute(states[task.name][metric.name])
          for task in tasks for metric in task.all_metrics if metric.name in states[task.name]}
