"""Training steps over resident or streamed data, compiled for a mesh of devices."""

from collections.abc import Callable, Iterator, Mapping
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
from mtl_jax.training.sharding import replicated, sharded_resident_steps, sharded_step


def steps_per_call(experiment: Experiment) -> int:
  """How many optimizer steps one compiled call makes."""
  if experiment.engine == "grain":
    return 1
  return experiment.config.train.steps_per_call or (1 if jax.default_backend() == "cpu" else 16)


def stepper(experiment: Experiment, mesh: Mesh, start: int, turns: Mapping[str, int],
            stack: contextlib.ExitStack) -> Callable[[Any, int], tuple[Any, Any]]:
  """The compiled training steps, with either data engine.

  Args:
    experiment: what to run.
    mesh: of the devices.
    start: the first step that will be asked for.
    turns: by stream, how many of its batches came before.
    stack: closes what reads ahead.

  Returns:
    `steps(state, count) -> (state, logs)`, logs with a leading axis of the steps.
  """
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
      train, data.batch_size, experiment.config.seed, turns, labels=experiment.labels,
      reads=map(experiment.streams_at, itertools.count(start)),
      process=jax.process_index(), num_processes=jax.process_count(), num_threads=data.threads)
  stack.callback(batches.close)
  step = sharded_step(experiment.train_step, mesh)
  held = _unread(experiment, mesh)

  def one(state: Any, count: int) -> tuple[Any, Any]:
    assert count == 1
    try:
      batch = next(batches)
    except ValueError as error:
      raise UserError(str(error)) from error
    held.update(on_devices(batch, mesh))
    state, logs = step(state, dict(held))
    return state, jax.tree.map(lambda x: x[None], logs)
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
