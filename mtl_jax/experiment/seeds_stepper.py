"""Training steps of several seeds over one copy of resident data, compiled once."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import functools
from typing import Any

import jax
from jax.sharding import Mesh

from mtl_jax.data.source import Columns
from mtl_jax.data.views import view_of, viewed_batch
from mtl_jax.experiment.cores import cores
from mtl_jax.experiment.experiment import Experiment
from mtl_jax.experiment.task_sections import alike
from mtl_jax.training.sharding import replicated, sharded_resident_steps, sharded_seeds_steps


def vectorized() -> bool:
  """Whether the seeds of one program train by one step for all, or each by its own in turn.

  In one, every convolution is one of many groups, which accelerators are made for; on CPUs it is up
  to four times slower than the seeds in turn, and an unrolled loop over the seeds takes their
  number times as long to compile and is no faster.
  """
  return jax.default_backend() != "cpu"


def seeds_steps(experiments: Sequence[Experiment], mesh: Mesh,
                stack: contextlib.ExitStack) -> Callable:
  """The steps of experiments that differ in their seed alone; see `stepper.stepper`."""
  shared = jax.device_put(_columns(experiments[0]), replicated(mesh))
  own = [jax.device_put({"views": _views(one), "statistics": one.statistics_arrays},
                        replicated(mesh)) for one in experiments]
  same = alike(experiments)

  @functools.cache
  def compiled(number: int, count: int) -> Callable:
    one = experiments[number]
    compile_steps = sharded_seeds_steps if same and vectorized() else sharded_resident_steps
    return compile_steps(one.prepared_step, functools.partial(_batch_at, one), mesh, count)

  def together(states: Sequence[Any], count: int) -> tuple[list[Any], list[Any]]:
    return compiled(0, count)(list(states), shared, own)

  lanes = [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(_at_once(experiments, mesh))]
  begun = set()

  def in_turn(states: Sequence[Any], count: int) -> tuple[list[Any], list[Any]]:
    def steps_of(number: int) -> tuple[Any, Any]:
      return compiled(0 if same else number, count)(states[number], (shared, own[number]))

    numbers = range(len(states))
    if count in begun:
      calls = [lanes[number % len(lanes)].submit(steps_of, number) for number in numbers]
      results = [call.result() for call in calls]
    else:  # which compiles
      results = [steps_of(number) for number in numbers]
      begun.add(count)
    return [state for state, _ in results], [logs for _, logs in results]
  return together if same and vectorized() else in_turn


def _at_once(experiments: Sequence[Experiment], mesh: Mesh) -> int:
  """How many seeds take a step at a time, in as much memory, each called from its own thread.

  JAX lets the calls of one thread wait for each other. Side by side, one step's small operations,
  which keep one core, leave no other idle. Steps that wait for several devices could wait forever.
  """
  return 1 if mesh.size > 1 else min(len(experiments), cores())


def _batch_at(experiment: Experiment, data: tuple[Any, Any], state: Any) -> Any:
  """One step's preprocessed batch of one seed, out of what all share and what is its own."""
  shared, own = data
  batch = viewed_batch(shared, own["views"], experiment.config.data.batch_size, state.seed,
                       state.turns)
  return experiment.preprocess(batch, state.seed, state.step, train=True,
                               statistics=own["statistics"])


def _columns(experiment: Experiment) -> dict[str, Any]:
  """The examples that the training splits of all seeds are taken from, with the labels read."""
  return {stream: dict(Columns(view_of(source.splits["train"])[0],
                               ("image", *experiment.labels[stream])).arrays())
          for stream, source in experiment.sources.items()}


def _views(experiment: Experiment) -> dict[str, Any]:
  return {stream: view_of(source.splits["train"])[1]
          for stream, source in experiment.sources.items()}
