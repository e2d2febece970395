"""Several seeds in one program: a run folder each, as the seed alone leaves, and their spread."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict

from mtl_jax.errors import UserError
from mtl_jax.experiment import datasets, loop
from mtl_jax.experiment.build import build
from mtl_jax.experiment.console import Console
from mtl_jax.experiment.experiment import Experiment
from mtl_jax.experiment.run_folder import RunFolder, without_nan
from mtl_jax.experiment.spread import of_runs


def train(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Trains and evaluates the seeds `config.seed`, `config.seed + 1`, … side by side.

  A seed that diverges ends them all, with its number named.

  Args:
    config: complete, with `seeds` above 1.
    workdir: gets a run folder `seed<number>` for each seed, and `summary.json`: for each metric on
      validation and test its mean, sample standard deviation and values.

  Returns:
    That summary.

  Raises:
    UserError: as `loop.train`, and for data that is not resident on the device.
    Interrupted: as `loop.train`; the same call continues.
  """
  first = jax.process_index() == 0
  whole, console = RunFolder(workdir, writes=first), Console(quiet=not first)
  experiments = list(_experiments(config))
  tasks = experiments[0].tasks
  title = f"{config.seeds} seeds from {config.seed} on"
  with contextlib.closing(whole):
    whole.open(config.to_dict(), experiments[0].data)
    summary = whole.summary()
    if summary is not None:
      console.say(f"{whole.path} holds finished runs")
      console.spread(title, summary, tasks)
      return summary
    folders = [RunFolder(_folder(whole.path, one), writes=first, within=whole)
               for one in experiments]
    runs = loop.train_together(experiments, folders, console)
    summary = without_nan({
        "seeds": [one.config.seed for one in experiments], "data": runs[0]["data"],
        **{split: of_runs(runs, split) for split in ("validation", "test")}})
    whole.write_summary(summary)
  console.spread(title, summary, tasks)
  console.say(f"run folders: {whole.path}/seed*")
  return summary


def evaluate(config: ConfigDict, workdir: str | os.PathLike[str]) -> None:
  """Evaluates every finished seed again; see `loop.evaluate`."""
  for experiment in _experiments(config):
    loop.evaluate(experiment, _folder(pathlib.Path(workdir), experiment))


def _folder(whole: pathlib.Path, experiment: Experiment) -> pathlib.Path:
  return whole / f"seed{experiment.config.seed}"


def _experiments(config: ConfigDict) -> Iterator[Experiment]:
  """One experiment a seed, as its config alone builds it, on data that is read once."""
  given = datasets.read(config)
  for seed in range(config.seed, config.seed + config.seeds):
    one = ConfigDict(config.to_dict())
    one.seed, one.seeds = seed, 1
    experiment = build(one, given)
    if experiment.engine != "resident":
      raise UserError(f"config.seeds: expected 1 with data from the host ({experiment.engine}), "
                      f"found {config.seeds}; set config.data.engine=resident if it fits there")
    yield experiment
