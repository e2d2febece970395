"""Training steps over resident or streamed data, compiled for a mesh of devices."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import itertools
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from mtl_jax.data import streams
from mtl_jax.errors import UserError
from mtl_jax.experiment.experiment import Experiment
from mtl_jax.experiment.evaluation import on_devices
from mtl_jax.experiment.seeds_stepper import seeds_steps
from mtl_jax.training.sharding import replicated, sharded_resident_steps, sharded_step


def steps_per_call(experiment: Experiment) -> int:
  """How many optimizer steps one compiled call makes."""
  if experiment.engine == "grain":
    return 1
  return experiment.config.train.steps_per_call or (1 if jax.default_backend() == "cpu" else 16)


Steps = Callable[[Sequence[Any], int], tuple[list[Any], list[Any]]]


def stepper(experiments: Sequence[Experiment], mesh: Mesh, state: Any,
            stack: contextlib.ExitStack) -> Steps:
  """The compiled training steps of one run, with either data engine, or of several seeds.

  Args:
    experiments: what to run, one a seed.
    mesh: of the devices.
    state: from which the first steps will go on, as all seeds do.
    stack: closes what reads ahead.

  Returns:
    `steps(states, count) -> (states, logs)`, one a seed, logs with a leading axis of the steps.
  """
  if len(experiments) > 1:
    return seeds_steps(experiments, mesh, stack)
  step = _one_run(experiments[0], mesh, state, stack)

  def steps(states: Sequence[Any], count: int) -> tuple[list[Any], list[Any]]:
    state, logs = step(states[0], count)
    return [state], [logs]
  return steps


def _one_run(experiment: Experiment, mesh: Mesh, state: Any,
             stack: contextlib.ExitStack) -> Callable[[Any, int], tuple[Any, Any]]:
  data = experiment.config.data
  train = experiment.examples("train")
  if experiment.engine == "resident":
    columns = {stream: dict(examples.arrays()) for stream, examples in train.items()}
    columns = jax.device_put(columns, replicated(mesh))
    batch_at = lambda columns, state: streams.resident_batch(
        columns, data.batch_size, state.seed, state.turns)
    compiled = functools.cache(lambda count: sharded_resident_steps(
        experiment.train_step, batch_at, mesh, count))
    return lambda state, count: compiled(count)(state, columns)

  batches: Iterator[Any] = streams.grain_batches(
      train, data.batch_size, experiment.config.seed, jax.device_get(state.turns),
      labels=experiment.labels,
      reads=map(experiment.streams_at, itertools.count(int(state.step))),
      process=jax.process_index(), num_processes=jax.process_count(), num_threads=data.threads)
  stack.callback(batches.close)

  def one_step(state: Any, batch: Any) -> tuple[Any, Any]:
    state, logs = experiment.train_step(state, batch)
    return state, jax.tree.map(lambda x: x[None], logs)
  step, held = sharded_step(one_step, mesh), _unread(experiment, mesh)

  def one(state: Any, count: int) -> tuple[Any, Any]:
    assert count == 1
    try:
      batch = next(batches)
    except ValueError as error:
      raise UserError(str(error)) from error
    held.update(on_devices(batch, mesh))
    return step(state, dict(held))
  return one


def _unread(experiment: Experiment, mesh: Mesh) -> dict[str, Any]:
  """Batches of zeros of those streams that some step leaves out, so that every batch has all."""
  local = experiment.config.data.batch_size // jax.process_count()
  reads = (set(task.stream for task in experiment.tasks if task.name in group)
           for group in experiment.schedule.groups)
  always = set.intersection(*reads)
  zeros = {stream: {name: np.zeros((local, *x.shape[1:]), x.dtype) for name, x in columns.items()}
           for stream, columns in experiment.example_batch().items() if stream not in always}
  return on_devices(zeros, mesh)
