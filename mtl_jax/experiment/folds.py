"""k-fold cross-validation: one run a fold, each in a folder of its own, and what they come to."""

import contextlib
import os
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict

from mtl_jax.experiment import loop
from mtl_jax.experiment.build import build
from mtl_jax.experiment.console import Console
from mtl_jax.experiment.run_folder import RunFolder, without_nan
from mtl_jax.experiment.spread import of_runs


def train(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Trains and evaluates every fold, those that are finished already excepted.

  Args:
    config: complete, with `data.folds` and no `data.fold`.
    workdir: gets a run folder `fold<i>` for each fold, and `summary.json`: for each metric on the
      held-out folds its mean, sample standard deviation and values.

  Returns:
    That summary.

  Raises:
    UserError, Interrupted: as `loop.train`; the same call continues.
  """
  first = jax.process_index() == 0
  folder, console = RunFolder(workdir, writes=first), Console(quiet=not first)
  with contextlib.closing(folder):
    runs, tasks = [], ()
    for fold, experiment in _experiments(config):
      if not fold:
        folder.open(config.to_dict(), experiment.data)
      console.say(f"fold {fold + 1} of {config.data.folds}")
      runs.append(loop.train(experiment, pathlib.Path(workdir) / f"fold{fold}"))
      tasks = experiment.tasks
    summary = without_nan({"folds": config.data.folds, "data": runs[0]["data"],
                           "test": of_runs(runs, "test")})
    folder.write_summary(summary)
  console.spread(f"{config.data.folds} folds, each held out once", summary, tasks)
  return summary


def evaluate(config: ConfigDict, workdir: str | os.PathLike[str]) -> None:
  """Evaluates every finished fold again; see `loop.evaluate`."""
  for fold, experiment in _experiments(config):
    loop.evaluate(experiment, pathlib.Path(workdir) / f"fold{fold}")


def _experiments(config: ConfigDict) -> Any:
  for fold in range(config.data.folds):
    one = ConfigDict(config.to_dict())
    with one.ignore_type():
      one.data.fold = fold
    yield fold, build(one)
