"""Metrics of a whole split."""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from mtl_jax.data import streams
from mtl_jax.errors import UserError
from mtl_jax.experiment.experiment import Experiment
from mtl_jax.experiment.task_sections import alike
from mtl_jax.tasks import Task, compute_metrics, merge_metrics
from mtl_jax.training.sharding import sharded_eval, split


class Program(NamedTuple):
  """Compiled evaluation, for any experiments that differ in their data alone.

  Attributes:
    step: `step(state, batch, statistics) -> metric states`.
    merge: `merge(states, states) -> states`.
  """

  step: Callable[[Any, Any, Any], Any]
  merge: Callable[[Any, Any], Any]


def program(experiment: Experiment, mesh: Mesh) -> Program:
  """What evaluates an experiment."""
  return Program(sharded_eval(experiment.eval_step, mesh),
                 jax.jit(lambda a, b: merge_metrics(experiment.tasks, a, b)))


def evaluator(experiment: Experiment, mesh: Mesh,
              compiled: Program | None = None) -> Callable[[Any, str], dict[str, float]]:
  """`evaluate(state, split) -> {"<task>/<metric>": value}`, exact whatever the batches.

  Args:
    experiment: whose data is evaluated.
    mesh: of the devices.
    compiled: the program, where another experiment has it already.
  """
  step, merge = compiled or program(experiment, mesh)
  statistics = experiment.statistics_arrays
  data = experiment.config.data
  batch_size = data.evaluation_batch_size or _multiple(4 * data.batch_size, mesh.size)

  def evaluate(state: Any, name: str) -> dict[str, float]:
    total, kept = None, []
    batches = streams.evaluation_batches(
        experiment.examples(name), batch_size, labels=experiment.labels,
        process=jax.process_index(), num_processes=jax.process_count())
    try:
      for batch in batches:
        states, gathered = _apart(
            experiment.tasks, step(state, on_devices(batch, mesh), statistics))
        total = states if total is None else merge(total, states)
        kept.append(jax.device_get(gathered))
    except ValueError as error:  # a label out of range
      raise UserError(f"{name}: {error}") from error
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *kept)
    total = {task: {**values, **joined[task]} for task, values in jax.device_get(total).items()}
    return compute_metrics(experiment.tasks, total)
  return evaluate


def evaluators(experiments: Sequence[Experiment],
               mesh: Mesh) -> list[Callable[[Any, str], dict[str, float]]]:
  """One evaluator each for experiments that differ in their seed alone, compiled once if it can."""
  compiled = program(experiments[0], mesh) if alike(experiments) else None
  return [evaluator(experiment, mesh, compiled) for experiment in experiments]


def _apart(tasks: Sequence[Task], states: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """Metric states that merge on the device, and those that are gathered on the host."""
  gathered = {task.name: {m.name for m in task.all_metrics if m.gathered} for task in tasks}
  keep = lambda wanted: {task: {name: state for name, state in values.items()
                                if (name in gathered[task]) == wanted}
                         for task, values in states.items()}
  return keep(False), keep(True)


def _multiple(size: int, of: int) -> int:
  return math.ceil(size / of) * of


def on_devices(batch: Any, mesh: Mesh) -> Any:
  """This process's share of a batch, as arrays over all devices."""
  sharding = split(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def score(experiment: Experiment, metrics: dict[str, float],
          first: dict[str, float]) -> float:
  """What selects the best checkpoint: the mean over tasks of each one's first metric.

  Where the tasks' first metrics have one unit and direction, their values are averaged; else, how
  much each has gained since the first evaluation, relative to its size there. A task without
  labels does not count.

  Args:
    experiment: whose tasks they are.
    metrics: on validation.
    first: those of the first evaluation.
  """
  firsts = {task.name: (*task.metrics, *task.all_metrics)[0] for task in experiment.tasks}
  alike = len({(metric.unit, metric.higher_is_better) for metric in firsts.values()}) == 1
  values = []
  for task, metric in firsts.items():
    name = f"{task}/{metric.name}"
    value = metrics[name] if alike else (metrics[name] - first[name]) / max(abs(first[name]), 1e-6)
    if math.isfinite(value):
      values.append(value if metric.higher_is_better else -value)
  return sum(values) / len(values) if values else -math.inf
