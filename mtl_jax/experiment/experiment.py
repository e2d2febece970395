"""What a run is made of."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax

from mtl_jax.balancing import Balancer
from mtl_jax.data import streams
from mtl_jax.data.source import Columns, Examples, Label, Source
from mtl_jax.models import MultiTaskModel
from mtl_jax.tasks import Task
from mtl_jax.training import create_train_state, eval_step, train_step
from mtl_jax.training.engines import Engine
from mtl_jax.training.schedules import TaskSchedule, scheduled_step
from mtl_jax.training.task_weights import Rule


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What a run is made of; nothing here has touched the run folder yet.

  Attributes:
    config: complete.
    model: the model.
    tasks: the T tasks.
    balancer: the balancing method.
    gradients: engine of the task gradients.
    optimizer: with its schedule.
    penalties: functions of the parameters by name.
    sources: by stream, each with train, validation and test.
    statistics: mean and deviation of each stream's channels, from train only.
    augmentation: names by stream.
    engine: of the data, "resident" or "grain".
    task_weights: of each task before any balancing, at the start.
    rule: by which the task weights are found from losses, or None.
    schedule: of the tasks.
    num_steps: length of the run.
    steps_per_epoch: of the stream that takes longest.
    evaluate_every: steps between evaluations.
  """

  config: ConfigDict
  model: MultiTaskModel
  tasks: tuple[Task, ...]
  balancer: Balancer
  gradients: Engine
  optimizer: optax.GradientTransformation
  penalties: Mapping[str, Callable[[Any], jax.Array]]
  sources: Mapping[str, Source]
  statistics: Mapping[str, Mapping[str, tuple[float, ...]]]
  augmentation: Mapping[str, tuple[str, ...]]
  engine: str
  task_weights: tuple[float, ...]
  rule: Rule | None
  schedule: TaskSchedule
  num_steps: int
  steps_per_epoch: int
  evaluate_every: int

  @functools.cached_property
  def shapes(self) -> dict[str, list[int]]:
    """Shape of one image of each stream."""
    return {stream: list(np.shape(source.splits["train"][0]["image"]))
            for stream, source in self.sources.items()}

  @property
  def data(self) -> dict[str, str]:
    """Where the examples of each stream come from."""
    return {stream: source.origin for stream, source in self.sources.items()}

  @property
  def reports(self) -> dict[str, Mapping[str, int]]:
    """What was wrong with the data of each stream, with how many times."""
    return {stream: source.report for stream, source in self.sources.items()}

  @property
  def labels(self) -> dict[str, dict[str, Label]]:
    """The labels that a task reads, by stream, with no more classes than its head tells apart."""
    result = {stream: {} for stream in self.sources}
    for task in self.tasks:
      if task.label == "image":
        continue
      label = result[task.stream].get(task.label) or self.sources[task.stream].labels[task.label]
      if label.num_classes is not None:
        label = dataclasses.replace(label, num_classes=min(label.num_classes, task.num_outputs))
      result[task.stream][task.label] = label
    return result

  @property
  def statistics_arrays(self) -> dict[str, dict[str, np.ndarray]]:
    """The statistics as arrays [C], for programs that are given them."""
    return {stream: {name: np.asarray(values, np.float32) for name, values in found.items()}
            for stream, found in self.statistics.items()}

  def examples(self, split: str) -> dict[str, Examples]:
    """The examples of one split by stream, with the labels that a task reads and no others."""
    return {stream: Columns(source.splits[split], ("image", *self.labels[stream]))
            for stream, source in self.sources.items()}

  def example_batch(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Shapes of a batch of two examples."""
    shape = lambda x: jax.ShapeDtypeStruct((2, *np.shape(x)), np.asarray(x).dtype)
    return {stream: jax.tree.map(shape, dict(examples[0]))
            for stream, examples in self.examples("train").items()}

  def streams_at(self, step: int) -> tuple[str, ...]:
    """The streams that the tasks of a step read."""
    group = self.schedule.groups[0]
    if len(self.schedule.groups) > 1:
      group = self.schedule.groups[int(self._group_at(np.uint32(self.config.seed), np.int32(step)))]
    return tuple(dict.fromkeys(task.stream for task in self.tasks if task.name in group))

  @functools.cached_property
  def _group_at(self) -> Callable[[np.uint32, np.int32], jax.Array]:
    return jax.jit(lambda seed, step: self.schedule.group_at(seed, step, self.num_steps))

  def preprocess(self, batch: Any, seed: jax.Array, step: jax.Array, train: bool,
                 statistics: Any = None) -> Any:
    """Normalised, in training augmented, images in place of the uint8 ones, labels moved along.

    `statistics` take the place of the experiment's own.
    """
    labels = {stream: source.labels for stream, source in self.sources.items()}
    return streams.preprocess(batch, seed, step, statistics=statistics or self.statistics,
                              labels=labels, augmentation=self.augmentation if train else None)

  def create_state(self, seed: int) -> Any:
    """A fresh training state."""
    example = {stream: {"image": np.zeros((1, *self.shapes[stream]), np.float32)}
               for stream in self.sources}
    return create_train_state(seed, example, model=self.model, tasks=self.tasks,
                              balancer=self.balancer, optimizer=self.optimizer,
                              task_weights=jnp.asarray(self.task_weights, jnp.float32),
                              schedule_state=self.schedule.init(len(self.tasks)),
                              gradients=self.gradients)

  @functools.cached_property
  def first_state(self) -> Callable[[], Any]:
    """A fresh training state of the config's seed: one function, which JAX traces once."""
    return functools.partial(self.create_state, self.config.seed)

  def train_step(self, state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    """One step on a batch with uint8 images."""
    return self.prepared_step(state, self.preprocess(batch, state.seed, state.step, train=True))

  def prepared_step(self, state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    """One step, of the tasks whose turn it is, on a batch that has been preprocessed."""
    step = functools.partial(
        train_step, model=self.model, tasks=self.tasks, balancer=self.balancer,
        optimizer=self.optimizer, gradients=self.gradients, penalties=self.penalties,
        diagnose_every=self.config.train.diagnose_every_steps or 0,
        frozen=self.config.init_from.freeze if self.config.init_from else (),
        precision=self.config.train.precision)
    return scheduled_step(state, batch, schedule=self.schedule, num_steps=self.num_steps, step=step)

  def eval_step(self, state: Any, batch: Any, statistics: Any = None) -> dict[str, Any]:
    """Metric states of a batch with uint8 images; see `preprocess` for `statistics`."""
    batch = self.preprocess(batch, state.seed, state.step, train=False, statistics=statistics)
    return eval_step(state, batch, model=self.model, tasks=self.tasks,
                     precision=self.config.train.precision)
