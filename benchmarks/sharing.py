"""Every sharing architecture side by side: parameters, step time, test metrics over seeds.

  python benchmarks/sharing.py [--data=digits,fashion] [--fashion=FOLDER] [--steps=200] [--seeds=3]
                               [--only=hard,mmoe] [--rounds=7] [--workdir=runs/sharing]

Trains each architecture around one small residual trunk, with its default arguments, equal weights
and the same budget, beside one run a task alone. Prints a JSON line for each, then the tables. Step
times are medians of rounds that go through all architectures in turn, relative to hard sharing.
Runs lie in the work folder and are not repeated, so a command that was stopped goes on.

`digits` are the bundled scenes, SAMPLE data; `fashion` is Multi-Fashion, its files in FOLDER where
they are not where the Debian package dataset-fashion-mnist puts them.
"""

import argparse
from collections.abc import Mapping
import contextlib
import json
import pathlib
import sys
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
from timing import Sample, medians, sample_of

from mtl_jax.experiment import build, config, datasets, fields, seeds
from mtl_jax.models import SHARINGS
from mtl_jax.training.sharding import create_sharded, data_mesh, sharded_step, split

DATA = {"digits": ("configs/digits_mtl.py", ("digit", "angle", "box")),
        "fashion": ("configs/multi_fashion.py", ("left", "right"))}
COMMON = ["--config.trunk.name=resnet", "--config.trunk.blocks=(1,1,1)",
          "--config.trunk.channels=16", "--config.trunk.stem=imagenet",
          "--config.data.batch_size=64"]


def variants(only: str, tasks: tuple[str, ...]) -> dict[str, tuple[str, list[str]]]:
  """Of each row its config argument and overrides: architectures, then each task alone."""
  names = [name for name in SHARINGS if not only or name in ("hard", *only.split(","))]
  rows = {name: ("", [f"--config.sharing.name={name}"]) for name in names}
  rows["hard, branches from layer3"] = ("", ["--config.sharing.branch_at=layer2"])
  return rows | {f"{task} alone": (f":tasks={task}", []) for task in tasks}


def config_of(args: argparse.Namespace, data: str, row: tuple[str, list[str]]) -> ConfigDict:
  """The complete config of a row, of all its seeds."""
  path, _ = DATA[data]
  argument, overrides = row
  own = [f"--config.train.steps={args.steps}", f"--config.train.evaluate_every_steps={args.steps}",
         f"--config.train.log_every_steps={args.steps}", f"--config.seeds={args.seeds}"]
  if data == "fashion" and args.fashion:
    own.append(f"--config.data.streams.garments.path={args.fashion}")
  return fields.complete(config.load(path + argument, [*COMMON, *own, *overrides]))


def step_of(experiment: build.Experiment) -> Sample:
  """A sample of an experiment's compiled step on its first examples."""
  mesh = data_mesh()
  state = create_sharded(experiment.first_state, mesh)
  size = experiment.config.data.batch_size
  batch = {stream: {name: column[:size] for name, column in examples.arrays().items()}
           for stream, examples in experiment.examples("train").items()}
  return sample_of(sharded_step(experiment.train_step, mesh), state,
                   jax.device_put(batch, split(mesh)))[0]


def measure(args: argparse.Namespace, data: str) -> list[dict[str, Any]]:
  """A record for each row."""
  configs = {name: config_of(args, data, row)
             for name, row in variants(args.only, DATA[data][1]).items()}
  given = datasets.read(configs["hard"])
  first = {name: build.build(one, given) for name, one in configs.items()}
  times = medians({name: step_of(one) for name, one in first.items()}, args.rounds)
  records = []
  for name, one in configs.items():
    folder = pathlib.Path(args.workdir) / data / name.replace(", ", "_").replace(" ", "_")
    with contextlib.redirect_stdout(sys.stderr):
      summary = seeds.train(one, folder)
    metrics = {task.name: {"metric": task.metrics[0].name, "unit": task.metrics[0].unit,
                           **summary["test"][f"{task.name}/{task.metrics[0].name}"]}
               for task in first[name].tasks}
    params = jax.eval_shape(first[name].first_state).params
    records.append({
        "benchmark": "sharing", "data": summary["data"], "sharing": name, "steps": args.steps,
        "parameters": sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params)),
        "step_ms": round(1e3 * times[name], 2),
        "ratio_to_hard": round(times[name] / times["hard"], 2),
        "seeds": args.seeds, "test": metrics, "device": jax.devices()[0].device_kind,
        "jax": jax.__version__})
    print(json.dumps(records[-1]), flush=True)
  return records


def table(records: list[dict[str, Any]]) -> str:
  """The records as a Markdown table."""
  tasks = list(records[0]["test"])
  heads = [f"{task}: {records[0]['test'][task]['metric']}" for task in tasks]
  lines = ["| " + " | ".join(["sharing", "parameters", "step time", *heads]) + " |",
           "| --- |" + " ---: |" * (2 + len(tasks))]
  for record in records:
    cells = [shown(record["test"][task]) if task in record["test"] else "" for task in tasks]
    lines.append("| " + " | ".join([record["sharing"], f"{record['parameters']:,}",
                                    f"{record['ratio_to_hard']:.2f}", *cells]) + " |")
  return "\n".join(lines)


def shown(found: Mapping[str, Any]) -> str:
  """Mean and spread of a metric, in percent where it is a fraction."""
  percent = found["unit"] == "fraction"
  text = [f"{100 * found[key]:.1f}" if percent else f"{found[key]:.3g}"
          for key in ("mean", "std") if found[key] is not None]
  return " ± ".join(text) + (" %" if percent else f" {found['unit']}".rstrip())


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data", default="digits,fashion")
  parser.add_argument("--fashion", default="", help="folder of Fashion-MNIST's IDX files")
  parser.add_argument("--steps", type=int, default=200)
  parser.add_argument("--seeds", type=int, default=3, help="at least 2")
  parser.add_argument("--only", default="", help="architectures, separated by commas")
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--workdir", default="runs/sharing")
  args = parser.parse_args()

  for data in args.data.split(","):
    records = measure(args, data)
    print(f"\n{data}: test after {args.steps} steps of {records[0]['data']}, mean and standard "
          f"deviation of {args.seeds} seeds\n\n{table(records)}\n", flush=True)


if __name__ == "__main__":
  main()
