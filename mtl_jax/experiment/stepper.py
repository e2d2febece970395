"""Training steps over resident or streamed data, compiled for a mesh of devices."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
from typing import Any

import jax
from jax.sharding import Mesh

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


def stepper(experiments: Sequence[Experiment], mesh: Mesh, start: int,
            stack: contextlib.ExitStack) -> Steps:
  """The compiled training steps of one run, with either data engine, or of several seeds.

  Args:
    experiments: what to run, one a seed.
    mesh: of the devices.
    start: the first step that will be asked for.
    stack: closes what reads ahead.

  Returns:
    `steps(states, count) -> (states, logs)`, one a seed, logs with a leading axis of the steps.
  """
  if len(experiments) > 1:
    return seeds_steps(experiments, mesh)
  step = _one_run(experiments[0], mesh, start, stack)

  def steps(states: Sequence[Any], count: int) -> tuple[list[Any], list[Any]]:
    state, logs = step(states[0], count)
    return [state], [logs]
  return steps


def _one_run(experiment: Experiment, mesh: Mesh, start: int,
             stack: contextlib.ExitStack) -> Callable[[Any, int], tuple[Any, Any]]:
  data = experiment.config.data
  train = experiment.examples("train")
  if experiment.engine == "resident":
    columns = {stream: dict(examples.arrays()) for stream, examples in train.items()}
    columns = jax.device_put(columns, replicated(mesh))
    batch_at = lambda columns, seed, step: streams.resident_batch(
        columns, data.batch_size, seed, step)
    compiled = functools.cache(lambda count: sharded_resident_steps(
        experiment.train_step, batch_at, mesh, count))
    return lambda state, count: compiled(count)(state, columns)

  batches: Iterator[Any] = streams.grain_batches(
      train, data.batch_size, experiment.config.seed, start, labels=experiment.labels,
      process=jax.process_index(), num_processes=jax.process_count(), num_threads=data.threads)
  stack.callback(batches.close)
  step = sharded_step(experiment.train_step, mesh)

  def one(state: Any, count: int) -> tuple[Any, Any]:
    assert count == 1
    try:
      batch = next(batches)
    except ValueError as error:
      raise UserError(str(error)) from error
    state, logs = step(state, on_devices(batch, mesh))
    return state, jax.tree.map(lambda x: x[None], logs)
  return one
