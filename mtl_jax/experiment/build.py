"""From a complete config to everything that a run needs."""

from collections.abc import Callable, Mapping
import dataclasses
import functools

import flax
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax

from mtl_jax import balancing
from mtl_jax.balancing import Balancer
from mtl_jax.balancing.balancer import init_state
from mtl_jax.data import streams
from mtl_jax.data.source import Source, column
from mtl_jax.errors import UserError
from mtl_jax.experiment import datasets, sections
from mtl_jax.experiment.experiment import Experiment
from mtl_jax.experiment.fields import duration_steps
from mtl_jax.experiment.task_sections import head_arguments, num_labelled, task_of
from mtl_jax.models import HEADS, SHARINGS, TRUNKS, MultiTaskModel
from mtl_jax.tasks import Task
from mtl_jax.training.engines import ENGINES, Engine
from mtl_jax.training.optimizer import SCHEDULES, by_part, optimizer
from mtl_jax.training.parameter_groups import check_patterns
from mtl_jax.training.penalties import PENALTIES
from mtl_jax.training.schedules import SCHEDULES as TASK_SCHEDULES
from mtl_jax.training.schedules import TaskSchedule
from mtl_jax.training.task_gradients import check_engine
from mtl_jax.training.task_weights import RULES, Rule, weigh


def build(config: ConfigDict, given: Mapping[str, Source] | None = None) -> Experiment:
  """Builds an experiment from a complete config, reading or preparing its data.

  Args:
    config: complete.
    given: sources by stream that take the place of those that the config names.

  Raises:
    UserError: where parts do not fit each other or the data.
  """
  loaded = datasets.load(config, given)
  tasks = tuple(task_of(name, section, loaded[section["stream"]])
                for name, section in config.tasks.items())
  unread = set(loaded) - {task.stream for task in tasks}
  if unread:
    raise UserError(f"config.data.streams: expected streams that a task reads, found that none reads "
                    f"{', '.join(sorted(unread))}")
  schedule = _schedule(config, tasks, loaded)
  batch_size = config.data.batch_size
  steps_per_epoch = max(round(len(source.splits["train"]) / schedule.shares[stream]) // batch_size
                        for stream, source in loaded.items()) or 1
  units = functools.partial(duration_steps, batch_size=batch_size, steps_per_epoch=steps_per_epoch)
  num_steps = units(config.train, "", default=0)
  weights, rule = _task_weights(config, tasks, loaded)
  experiment = Experiment(
      config=config,
      model=_model(config, tasks, loaded),
      tasks=tasks,
      balancer=_balancer(config, tasks),
      gradients=_engine(config.train.gradients),
      optimizer=_optimizer(config.optimizer, num_steps, units),
      penalties={name: PENALTIES[name](strength) for name, strength in config.penalties.items()},
      sources=loaded,
      statistics={stream: datasets.statistics(source) for stream, source in loaded.items()},
      augmentation={stream: datasets.augmentation(stream, config.data, source)
                    for stream, source in loaded.items()},
      engine=datasets.engine(config.data.engine, loaded),
      task_weights=weights,
      rule=rule,
      schedule=schedule,
      num_steps=num_steps,
      steps_per_epoch=steps_per_epoch,
      evaluate_every=units(config.train, "evaluate_every_", default=steps_per_epoch),
  )
  _check_sizes(experiment)
  _check_shapes(experiment)
  if config.init_from:
    experiment = _with_rates(experiment)
  if experiment.engine == "resident":  # the grain engine checks as it reads
    _check_labels(experiment)
  return experiment


def _check_sizes(experiment: Experiment) -> None:
  config, balancer = experiment.config, experiment.balancer
  batch_size = config.data.batch_size
  if experiment.num_steps * batch_size >= 2 ** 32:
    raise UserError("config.train: expected fewer than 2**32 examples a stream, "
                    f"found {experiment.num_steps} steps of {batch_size}")
  if experiment.engine == "grain" and (config.train.steps_per_call or 1) > 1:
    raise UserError("config.train.steps_per_call: expected 1 or None with data from the host "
                    f"(grain), found {config.train.steps_per_call}")
  if batch_size < balancer.parts:
    raise UserError(f"config.data.batch_size: expected at least {balancer.parts} examples, one for "
                    f"each part that {balancer.name} asks for; found {batch_size}")


def _check_labels(experiment: Experiment) -> None:
  for split in ("train", "validation", "test"):
    for stream, examples in experiment.examples(split).items():
      try:
        labels = experiment.labels[stream]
        streams.check_labels(stream, {name: column(examples, name) for name in labels}, labels)
      except ValueError as error:
        raise UserError(f"{split}: {error}") from error


def _balancer(config: ConfigDict, tasks: tuple[Task, ...]) -> Balancer:
  of_tasks = lambda value: tuple(value[task.name] for task in tasks)
  arguments = {name: of_tasks(value) if isinstance(value, Mapping) else value
               for name, value in config.balancer.to_dict().items()}
  balancer = sections.make("config.balancer", arguments, {
      config.balancer.name: functools.partial(balancing.get, config.balancer.name)})
  try:
    jax.eval_shape(lambda: init_state(balancer, len(tasks), jnp.zeros((len(tasks), 1))))
  except ValueError as error:
    raise UserError(f"config.balancer: {error}") from error
  return balancer


def _schedule(config: ConfigDict, tasks: tuple[Task, ...],
              loaded: Mapping[str, Source]) -> TaskSchedule:
  return sections.make(
      "config.schedule", config.schedule.to_dict(), TASK_SCHEDULES,
      tasks=tuple(task.name for task in tasks),
      streams={task.name: task.stream for task in tasks},
      sizes={task.name: num_labelled(task, loaded[task.stream].splits["train"])
             for task in tasks} if config.schedule.name == "sampled" else {})


def _engine(section: str | ConfigDict) -> Engine:
  section = {"name": section} if isinstance(section, str) else section.to_dict()
  return sections.make("config.train.gradients", section, ENGINES)


def _task_weights(config: ConfigDict, tasks: tuple[Task, ...],
                  loaded: Mapping[str, Source]) -> tuple[tuple[float, ...], Rule | None]:
  """The tasks' weights at the start, and the rule where it needs losses to find them."""
  section = config.task_weights
  if section is None:
    return (1.0,) * len(tasks), None
  if "name" not in section:
    return tuple(section[task.name] for task in tasks), None
  rule = sections.make("config.task_weights", section, RULES)
  if rule.reads != "sizes":
    return (1.0,) * len(tasks), rule
  sizes = [num_labelled(task, loaded[task.stream].splits["train"]) for task in tasks]
  return tuple(weigh(np.asarray(sizes, float), rule.power).tolist()), None


def _model(config: ConfigDict, tasks: tuple[Task, ...],
           loaded: Mapping[str, Source]) -> MultiTaskModel:
  trunk = sections.make("config.trunk", config.trunk, TRUNKS)
  sharing = sections.make("config.sharing", config.sharing, SHARINGS, trunk=trunk,
                          tasks=tuple(task.name for task in tasks))
  heads = {task.name: sections.make(f"config.tasks.{task.name}.head",
                                    config.tasks[task.name].head, HEADS,
                                    **head_arguments(task, HEADS[config.tasks[task.name].head.name],
                                                     loaded[task.stream]))
           for task in tasks}
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
    probe = {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32),
             "bias": jax.ShapeDtypeStruct((2,), jnp.float32)}
    jax.eval_shape(lambda params: made.update(params, made.init(params), params), probe)
    return made
  except ValueError as error:
    raise UserError(f"config.{error}" if str(error).startswith("optimizer")
                    else f"config.optimizer: {error}") from error
  except TypeError as error:
    reason = str(error).splitlines()[0]
    raise UserError(f"config.optimizer: expected arguments that optax's {arguments['name']} takes, "
                    f"found: {reason}") from error


def _with_rates(experiment: Experiment) -> Experiment:
  """The experiment with an optimizer that freezes and scales as `config.init_from` says."""
  section = experiment.config.init_from
  made = by_part(experiment.optimizer, freeze=section.freeze,
                 learning_rate_scale=section.learning_rate_scale.to_dict())
  params = jax.eval_shape(experiment.first_state).params
  try:
    check_patterns("skip", section.skip, list(flatten_dict(params)))
    jax.eval_shape(made.init, params)
  except ValueError as error:
    raise UserError(f"config.init_from.{error}") from error
  return dataclasses.replace(experiment, optimizer=made)


def _check_shapes(experiment: Experiment) -> None:
  """Traces the model once, so that what does not fit is known before anything runs."""
  try:
    state = jax.eval_shape(experiment.first_state)
  except flax.errors.ScopeParamShapeError as error:
    raise UserError("config.trunk: expected one that takes images of any size, such as resnet18 or "
                    f"cnn with pool=mean, for images of {experiment.shapes}") from error
  except (ValueError, TypeError, ZeroDivisionError) as error:
    reason = str(error).split("\n")[0]
    raise UserError(f"config.trunk: {reason} (images are {experiment.shapes})") from error
  model = experiment.model
  try:
    jax.eval_shape(experiment.eval_step, state, experiment.example_batch())
  except (ValueError, TypeError) as error:
    raise UserError(f"config.tasks: {str(error).splitlines()[0]}") from error
  try:
    check_engine(experiment.gradients, experiment.balancer,
                 one_stream=len(experiment.sources) == 1,
                 one_representation=model.sharing.one_representation,
                 shares_parameters=any(model.owner(path) is None
                                       for path in flatten_dict(state.params)))
  except ValueError as error:
    raise UserError(f"config.train.{error}") from error
