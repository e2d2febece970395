"""The run: evaluate → save → next batch → step → log, in this order, whatever happens."""

from collections.abc import Sequence
import contextlib
import os
import time
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from mtl_jax.errors import UserError
from mtl_jax.experiment.checkpoint import Checkpoints, restore_together
from mtl_jax.experiment.console import Console
from mtl_jax.experiment.evaluation import evaluator, evaluators
from mtl_jax.experiment.experiment import Experiment
from mtl_jax.experiment.run import Run, shapes_of
from mtl_jax.experiment.run_folder import RunFolder, without_nan
from mtl_jax.experiment.stepper import Steps, stepper, steps_per_call
from mtl_jax.experiment.stopping import Interrupted, memory_errors, stop_signals
from mtl_jax.experiment.transfer import first_states
from mtl_jax.training.sharding import check_divides, data_mesh, replicated


def train(experiment: Experiment, workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Trains to the end, from the beginning or from the newest sound checkpoint.

  Args:
    experiment: what to run.
    workdir: the run folder.

  Returns:
    The summary, as written to `summary.json`.

  Raises:
    UserError: for a folder of another run, one that cannot be written, or a run that diverged.
    Interrupted: after SIGTERM or Ctrl-C, once all is saved.
    ValueError: for a config of several seeds, which `seeds.train` runs.
  """
  if experiment.config.seeds > 1:
    raise ValueError(f"config.seeds: expected 1, found {experiment.config.seeds}; see seeds.train")
  first = jax.process_index() == 0
  folder, console = RunFolder(workdir, writes=first), Console(quiet=not first)
  summary, = train_together([experiment], [folder], console)
  console.summary(summary, experiment.tasks)
  console.say(f"run folder: {folder.path}")
  return summary


def train_together(experiments: Sequence[Experiment], folders: Sequence[RunFolder],
                   console: Console) -> list[dict[str, Any]]:
  """Trains one run, or experiments that differ in their seed alone, step by step together.

  Runs that are finished are left as they are. The others go on from the newest step that all of
  them have saved.

  Args:
    experiments: what to run.
    folders: one run folder each, not yet open.
    console: is told.

  Returns:
    Their summaries.

  Raises:
    UserError, Interrupted: as `train`.
  """
  mesh = _mesh(experiments[0])
  console.data_banner(experiments[0].data, experiments[0].reports)
  with contextlib.ExitStack() as stack:
    for experiment, folder in zip(experiments, folders):
      stack.enter_context(contextlib.closing(folder))
      folder.open(experiment.config.to_dict(), experiment.data)
    summaries = [folder.summary() for folder in folders]
    left = [i for i, summary in enumerate(summaries) if summary is None]
    for folder, summary in zip(folders, summaries):
      if summary is not None:
        console.say(f"{folder.path} holds a finished run")
    if left:
      with stop_signals() as stop, memory_errors():
        runs = _begin([experiments[i] for i in left], [folders[i] for i in left], mesh, console,
                      stack)
        steps = stepper([run.experiment for run in runs], mesh, runs[0].state, stack)
        _to_the_end(runs, steps, stop, console)
        for i, run in zip(left, runs):
          summaries[i] = run.finish()
  return summaries


def evaluate(experiment: Experiment, workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Evaluates a finished run again, from its best checkpoint.

  Returns:
    `{"validation": …, "test": …}`.

  Raises:
    UserError: where there is no finished run of this config and data, or its numbers are not
      reproduced.
  """
  folder = RunFolder(workdir, writes=False)
  console = Console(quiet=jax.process_index() != 0)
  if not (folder.path / "config.json").exists():
    raise UserError(f"--workdir: expected the folder of a run, found none at {folder.path}")
  folder.check(experiment.config.to_dict(), experiment.data)
  summary = folder.summary()
  if summary is None:
    raise UserError(f"{folder.path}: expected a finished run, found no summary.json; "
                    "launch with --mode=train to finish it")
  mesh = _mesh(experiment)
  console.data_banner(experiment.data)
  with contextlib.closing(Checkpoints(folder.path / "checkpoints")) as checkpoints:
    state = checkpoints.restore(summary["best_step"], _abstract_state(experiment, mesh))
  evaluate_split = evaluator(experiment, mesh)
  found = without_nan({split: evaluate_split(state, split) for split in ("validation", "test")})
  console.summary({**summary, **found}, experiment.tasks)
  differ = [f"{split} {name}: {value!r} here, {summary[split][name]!r} in summary.json"
            for split, values in found.items() for name, value in values.items()
            if value != summary[split][name]]
  if differ:
    raise UserError(f"{len(differ)} numbers differ from those of the run, such as {differ[0]}\n"
                    "they are the same only with the run's devices and package versions")
  console.say("reproduced exactly")
  return found


def _mesh(experiment: Experiment) -> Mesh:
  mesh = data_mesh()
  data = experiment.config.data
  for name in ("batch_size", "evaluation_batch_size"):
    if data[name] is not None:
      try:
        check_divides(data[name], mesh)
      except ValueError as error:
        raise UserError(f"config.data.{str(error).replace('batch_size', name)}") from error
  return mesh


def _abstract_state(experiment: Experiment, mesh: Mesh) -> Any:
  return shapes_of(jax.eval_shape(experiment.first_state), replicated(mesh))


def _begin(experiments: Sequence[Experiment], folders: Sequence[RunFolder], mesh: Mesh,
           console: Console, stack: contextlib.ExitStack) -> list[Run]:
  """The runs at step 0, or as they were when they last saved."""
  several = [stack.enter_context(contextlib.closing(Checkpoints(folder.path / "checkpoints")))
             for folder in folders]
  restored = restore_together(several, _abstract_state(experiments[0], mesh), console.warn)
  is_new = restored[0] is None
  if is_new:
    try:
      restored = [(0, state, None) for state in first_states(experiments, mesh, console)]
    except UserError:
      for folder in folders:
        folder.give_up()
      raise
  evaluate = evaluators(experiments, mesh)
  runs = [Run(*parts, console, stack, is_only=len(experiments) == 1)
          for parts in zip(experiments, folders, several, evaluate, restored)]
  if not is_new:
    console.say(f"continuing from step {runs[0].step}")
  elif experiments[0].rule:
    for run in runs:
      run.evaluate_at_start()
  return runs


def _to_the_end(runs: Sequence[Run], steps: Steps, stop: Sequence[int],
                console: Console) -> None:
  """Trains, evaluates and saves until the last step is done, or `stop` holds a signal.

  What a call has logged is read while the next one runs, where that runs on another thread or on an
  accelerator: devices do not wait for the host.
  """
  experiment = runs[0].experiment
  step, total, every = runs[0].step, experiment.num_steps, experiment.evaluate_every
  per_call = steps_per_call(experiment)
  examples = experiment.config.data.batch_size * sum(experiment.schedule.shares.values())
  unread, read_at = None, time.perf_counter()
  first, began = step, read_at  # of the calls since the last evaluation

  def read(logs, count, is_last=False):
    nonlocal read_at
    logs = _on_host(logs)
    now = time.perf_counter()
    # Where a call returns when it is done, the last two are read at once: no time of its own.
    done, since = (step - first, began) if is_last else (count, read_at)
    rate, read_at = done * examples / (now - since), now
    losses = [run.log(one, count, rate) for run, one in zip(runs, logs)]
    console.advance(runs[0].step, np.mean(losses, axis=0), experiment.tasks)

  console.start_progress(step, total)
  try:
    while step < total:
      event = min((step // every + 1) * every, total)
      count = min((step // per_call + 1) * per_call, event) - step
      states, logs = steps([run.state for run in runs], count)
      step += count
      for run, state in zip(runs, states):
        run.state = state
      if unread:
        read(*unread)
      unread, stopping = (logs, count), bool(stop)
      if step < event and not stopping:
        continue
      read(*unread, is_last=True)
      if step == event:
        for run in runs:
          run.validate()
      _save(runs)
      unread, read_at = None, time.perf_counter()
      first, began = step, read_at
      if stopping:
        _wait(runs)
        raise Interrupted(stop[0])
    _wait(runs)
  finally:
    console.stop_progress()


def _on_host(logs: Any) -> Any:
  """As NumPy's arrays; `jax.device_get` would take a millisecond to copy what is there already."""
  is_there = jax.default_backend() == "cpu"
  return jax.tree.map(np.asarray, logs) if is_there else jax.device_get(logs)


def _save(runs: Sequence[Run]) -> None:
  _wait(runs)  # that all have saved the step before: the newest that a death may leave in common
  for run in runs:
    run.save()


def _wait(runs: Sequence[Run]) -> None:
  for run in runs:
    run.checkpoints.wait()
