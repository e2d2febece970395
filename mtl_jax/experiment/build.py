"""From a complete config to everything that a run needs."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax

from mtl_jax import balancing
from mtl_jax.balancing import Balancer
from mtl_jax.balancing.balancer import init_state
from mtl_jax.data import sources, streams
from mtl_jax.data.augmentation import AUGMENTATIONS, channel_statistics, parse
from mtl_jax.data.source import Examples, Label, Source
from mtl_jax.data.splits import with_validation
from mtl_jax.errors import MissingData, UserError
from mtl_jax.experiment import sections
from mtl_jax.experiment.fields import duration_steps
from mtl_jax.models import HEADS, SHARINGS, TRUNKS, MultiTaskModel
from mtl_jax.tasks import KINDS, Task
from mtl_jax.training import create_train_state, eval_step, train_step
from mtl_jax.training.optimizer import SCHEDULES, optimizer
from mtl_jax.training.penalties import PENALTIES
from mtl_jax.training.task_gradients import check_engine

_RESIDENT_BYTES = 4 * 2 ** 30
_STATISTICS_EXAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What a run is made of; nothing here has touched the run folder yet.

  Attributes:
    config: complete.
    model: the model.
    tasks: the T tasks.
    balancer: the balancing method.
    optimizer: with its schedule.
    penalties: functions of the parameters by name.
    sources: by stream, each with train, validation and test.
    statistics: mean and deviation of each stream's channels, from train only.
    augmentation: names by stream.
    engine: of the data, "resident" or "grain".
    num_steps: length of the run.
    steps_per_epoch: of the longest stream.
    evaluate_every: steps between evaluations.
  """

  config: ConfigDict
  model: MultiTaskModel
  tasks: tuple[Task, ...]
  balancer: Balancer
  optimizer: optax.GradientTransformation
  penalties: Mapping[str, Callable[[Any], jax.Array]]
  sources: Mapping[str, Source]
  statistics: Mapping[str, Mapping[str, tuple[float, ...]]]
  augmentation: Mapping[str, tuple[str, ...]]
  engine: str
  num_steps: int
  steps_per_epoch: int
  evaluate_every: int

  @property
  def data(self) -> dict[str, str]:
    """Where the examples of each stream come from."""
    return {stream: source.origin for stream, source in self.sources.items()}

  @property
  def labels(self) -> dict[str, dict[str, Label]]:
    """The labels that a task reads, by stream, with no more classes than its head tells apart."""
    result = {stream: {} for stream in self.sources}
    for task in self.tasks:
      label = result[task.stream].get(task.label) or self.sources[task.stream].labels[task.label]
      if label.num_classes is not None:
        label = dataclasses.replace(label, num_classes=min(label.num_classes, task.num_outputs))
      result[task.stream][task.label] = label
    return result

  def examples(self, split: str) -> dict[str, Examples]:
    """The examples of one split by stream."""
    return {stream: source.splits[split] for stream, source in self.sources.items()}

  def preprocess(self, batch: Any, seed: jax.Array, step: jax.Array, train: bool) -> Any:
    """Normalised, in training augmented, images in place of the uint8 ones, labels moved along."""
    labels = {stream: source.labels for stream, source in self.sources.items()}
    return streams.preprocess(batch, seed, step, statistics=self.statistics, labels=labels,
                              augmentation=self.augmentation if train else None)

  def create_state(self, seed: int) -> Any:
    """A fresh training state."""
    example = {stream: {"image": np.zeros((1, *np.shape(examples[0]["image"])), np.float32)}
               for stream, examples in self.examples("train").items()}
    return create_train_state(seed, example, model=self.model, tasks=self.tasks,
                              balancer=self.balancer, optimizer=self.optimizer)

  def train_step(self, state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    """One step on a batch with uint8 images."""
    batch = self.preprocess(batch, state.seed, state.step, train=True)
    return train_step(state, batch, model=self.model, tasks=self.tasks, balancer=self.balancer,
                      optimizer=self.optimizer, gradients=self.config.train.gradients,
                      penalties=self.penalties)

  def eval_step(self, state: Any, batch: Any) -> dict[str, Any]:
    """Metric states of a batch with uint8 images."""
    batch = self.preprocess(batch, state.seed, state.step, train=False)
    return eval_step(state, batch, model=self.model, tasks=self.tasks)


def build(config: ConfigDict) -> Experiment:
  """Builds an experiment from a complete config, reading or preparing its data.

  Raises:
    UserError: where parts do not fit each other or the data.
  """
  loaded = {stream: _load(stream, section["name"], config.data)
            for stream, section in config.data.streams.items()}
  tasks = tuple(_task(name, section, loaded[section["stream"]])
                for name, section in config.tasks.items())
  unread = set(loaded) - {task.stream for task in tasks}
  if unread:
    raise UserError(f"config.data.streams: expected streams that a task reads, found that none reads "
                    f"{', '.join(sorted(unread))}")
  loaded = {stream: _with_validation(source, config) for stream, source in loaded.items()}
  longest = max(len(source.splits["train"]) for source in loaded.values())
  batch_size = config.data.batch_size
  steps_per_epoch = max(longest // batch_size, 1)
  units = functools.partial(duration_steps, batch_size=batch_size, steps_per_epoch=steps_per_epoch)
  num_steps = units(config.train, "", default=0)
  if num_steps * batch_size >= 2 ** 32:
    raise UserError(f"config.train: expected fewer than 2**32 examples a stream, found {num_steps} "
                    f"steps of {batch_size}")
  arguments = {name: tuple(value[task.name] for task in tasks) if isinstance(value, Mapping) else value
               for name, value in config.balancer.to_dict().items()}
  balancer = sections.make("config.balancer", arguments, {
      config.balancer.name: functools.partial(balancing.get, config.balancer.name)})
  model = _model(config, tasks)
  try:
    jax.eval_shape(lambda: init_state(balancer, len(tasks), jnp.zeros((len(tasks), 1))))
  except ValueError as error:
    raise UserError(f"config.balancer: {error}") from error
  experiment = Experiment(
      config=config,
      model=model,
      tasks=tasks,
      balancer=balancer,
      optimizer=_optimizer(config.optimizer, num_steps, units),
      penalties={name: PENALTIES[name](strength) for name, strength in config.penalties.items()},
      sources=loaded,
      statistics={stream: _statistics(source) for stream, source in loaded.items()},
      augmentation={stream: _augmentation(stream, config.data, source)
                    for stream, source in loaded.items()},
      engine=_engine(config.data.engine, loaded),
      num_steps=num_steps,
      steps_per_epoch=steps_per_epoch,
      evaluate_every=units(config.train, "evaluate_every_", default=steps_per_epoch),
  )
  if experiment.engine == "grain" and (config.train.steps_per_call or 1) > 1:
    raise UserError("config.train.steps_per_call: expected 1 or None with data from the host (grain), "
                    f"found {config.train.steps_per_call}")
  _check_shapes(experiment)
  if experiment.engine == "resident":  # the grain engine checks as it reads
    _check_labels(experiment)
  return experiment


def _check_labels(experiment: Experiment) -> None:
  for split in ("train", "validation", "test"):
    for stream, examples in experiment.examples(split).items():
      try:
        streams.check_labels(stream, examples.arrays(), experiment.labels[stream])
      except ValueError as error:
        raise UserError(f"{split}: {error}") from error


def _load(stream: str, name: str, data: ConfigDict) -> Source:
  try:
    source = sources.SOURCES[name](data.dir, download=data.download)
  except MissingData:
    alone_on_cpu = jax.process_count() == 1 and jax.default_backend() == "cpu"
    if data.missing == "error" or (data.missing == "auto" and not alone_on_cpu):
      raise
    source = sources.sample(name)
  for split in ("train", "test"):
    if not len(source.splits.get(split, ())):
      raise UserError(f"stream {stream!r}: expected examples to train on and to test on, "
                      f"found no {split} split")
  for split, examples in source.splits.items():
    image = examples[0]["image"]
    if image.ndim != 3 or image.dtype != np.uint8:
      raise UserError(f"stream {stream!r}: {split}: expected images [H, W, C] of uint8, "
                      f"found {list(image.shape)} of {image.dtype}")
  return source


def _task(name: str, section: ConfigDict, source: Source) -> Task:
  where = f"config.tasks.{name}"
  arguments = section.to_dict()
  arguments.pop("head")
  label = arguments["label"]
  if label not in source.labels:
    raise UserError(f"{where}.label: {sections.nearest(label, sorted(source.labels))}; "
                    f"stream {section.stream!r} has no {label!r}")
  if arguments["num_classes"] is None:
    arguments["num_classes"] = source.labels[label].num_classes
  kind = arguments.pop("name")
  try:
    return KINDS[kind](name, **arguments)
  except ValueError as error:
    raise UserError(f"config.tasks.{error}") from error


def _with_validation(source: Source, config: ConfigDict) -> Source:
  try:
    return with_validation(source, config.data.validation, config.seed)
  except ValueError as error:
    raise UserError(f"config.data.{error}") from error


def _model(config: ConfigDict, tasks: tuple[Task, ...]) -> MultiTaskModel:
  trunk = sections.make("config.trunk", config.trunk, TRUNKS)
  sharing = sections.make("config.sharing", config.sharing, SHARINGS, trunk=trunk,
                          tasks=tuple(task.name for task in tasks))
  heads = {task.name: sections.make(f"config.tasks.{task.name}.head",
                                    config.tasks[task.name].head, HEADS,
                                    num_outputs=task.num_outputs) for task in tasks}
  return MultiTaskModel(sharing=sharing, heads=heads,
                        streams={task.name: task.stream for task in tasks})


def _optimizer(section: ConfigDict, num_steps: int,
               units: Callable[..., int]) -> optax.GradientTransformation:
  arguments = section.to_dict()
  schedule = arguments.pop("schedule")
  warmup = units(schedule, "warmup_", default=0)
  schedule = {key: value for key, value in schedule.items() if not key.startswith("warmup_")}
  try:
    arguments["learning_rate"] = sections.make(
        "config.optimizer.schedule", schedule, SCHEDULES, num_steps=num_steps, warmup=warmup,
        learning_rate=arguments["learning_rate"])
    made = optimizer(**arguments)
    probe = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    jax.eval_shape(lambda: made.update(probe, made.init(probe), probe))
    return made
  except ValueError as error:
    raise UserError(f"config.{error}" if str(error).startswith("optimizer")
                    else f"config.optimizer: {error}") from error
  except TypeError as error:
    reason = str(error).splitlines()[0]
    raise UserError(f"config.optimizer: expected arguments that optax's {arguments['name']} takes, "
                    f"found: {reason}") from error


def _statistics(source: Source) -> Mapping[str, tuple[float, ...]]:
  train = source.splits["train"]
  count = min(len(train), _STATISTICS_EXAMPLES)
  chosen = np.linspace(0, len(train) - 1, count).astype(int)
  return channel_statistics(np.stack([train[int(i)]["image"] for i in chosen]))


def _augmentation(stream: str, data: ConfigDict, source: Source) -> tuple[str, ...]:
  where, setting = "config.data.augmentation", data.augmentation
  if "augmentation" in data.streams[stream]:
    where = f"config.data.streams.{stream}.augmentation"
    setting = data.streams[stream].augmentation
  names = tuple(source.augmentation if tuple(setting) == ("auto",) else setting)
  for text in names:
    name = text.partition(":")[0]
    if name not in AUGMENTATIONS:
      raise UserError(f"{where}: {sections.nearest(name, ['auto', *AUGMENTATIONS])}; "
                      f"found {name!r}")
    try:
      parse(text)
    except ValueError as error:
      raise UserError(f"{where}: {error}") from error
  return names


def _engine(setting: str, loaded: Mapping[str, Source]) -> str:
  if setting != "auto":
    return setting
  size = sum(len(source.splits["train"]) * source.splits["train"][0]["image"].nbytes
             for source in loaded.values())
  return "resident" if size <= _RESIDENT_BYTES else "grain"


def _check_shapes(experiment: Experiment) -> None:
  """Traces the model once, so that what does not fit is known before anything runs."""
  try:
    state = jax.eval_shape(lambda: experiment.create_state(0))
  except (ValueError, TypeError, ZeroDivisionError) as error:
    shapes = {stream: list(examples[0]["image"].shape)
              for stream, examples in experiment.examples("train").items()}
    reason = str(error).split("\n")[0]
    raise UserError(f"config.trunk: {reason} (images are {shapes})") from error
  model = experiment.model
  try:
    check_engine(experiment.config.train.gradients, experiment.balancer,
                 one_stream=len(experiment.sources) == 1,
                 one_representation=model.sharing.one_representation,
                 shares_parameters=any(model.owner(path) is None
                                       for path in flatten_dict(state.params)))
  except ValueError as error:
    raise UserError(f"config.train.{error}") from error
