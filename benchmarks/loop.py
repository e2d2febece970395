"""Images a second of the real loop beside the bare step, on the bundled sample.

  python benchmarks/loop.py [--config=configs/cifar_mtl.py] [--steps=120] [--repeats=3]

The real loop draws, augments and normalises its batches, logs every step, evaluates and saves;
the bare step trains on one batch that lies ready. Repeats alternate between them and the two data
engines. Prints JSON lines with medians, and the ratio to the bare step in the same run.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

import jax
from timing import emit, programs_kept

from mtl_jax.data import streams
from mtl_jax.experiment import allocator, build, config, fields, loop
from mtl_jax.training.sharding import create_sharded, data_mesh, sharded_step, split
from mtl_jax.training.step import train_step


def experiment_of(file: str, steps: int, engine: str, data_dir: str,
                  seed: int = 0) -> build.Experiment:
  """What a config file describes, so many steps of it, on the bundled sample."""
  overrides = [f"--config.seed={seed}", f"--config.train.steps={steps}",
               "--config.train.log_every_steps=10",
               f"--config.data.engine={engine}", "--config.data.download=False",
               "--config.data.missing=sample", f"--config.data.dir={data_dir}"]
  return build.build(fields.complete(config.load(file, overrides)))


def bare_rate(experiment: build.Experiment, steps: int) -> float:
  """Images a second of the step alone, from one batch on the device."""
  mesh = data_mesh()
  state = create_sharded(experiment.first_state, mesh)
  size = experiment.config.data.batch_size
  batch = {stream: {k: v[:size] for k, v in examples.arrays().items()}
           for stream, examples in experiment.examples("train").items()}
  batch = experiment.preprocess(jax.device_put(batch), state.seed, state.step, train=True)
  step = sharded_step(functools.partial(
      train_step, model=experiment.model, tasks=experiment.tasks, balancer=experiment.balancer,
      optimizer=experiment.optimizer, gradients=experiment.gradients,
      precision=experiment.config.train.precision), mesh)
  batch = jax.device_put(batch, split(mesh))
  state, _ = jax.block_until_ready(step(state, batch))
  times = []
  for _ in range(steps):
    start = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, batch))
    times.append(time.perf_counter() - start)
  return size * len(batch) / statistics.median(times)


def loop_rate(experiment: build.Experiment) -> float:
  """Images a second that a real run logs, its first and last records left out.

  The first holds the compilation, the last is an average over all calls.
  """
  with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
    loop.train(experiment, pathlib.Path(folder) / "run")
    lines = (pathlib.Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  rates = [r["examples_per_second"] for r in records if r["split"] == "train"]
  return statistics.median(rates[1:-1])


def rates(file: str, steps: int, repeats: int) -> dict[str, float]:
  """Images a second of the bare step and of the loop with each data engine, medians."""
  found = {"bare step": [], **{engine: [] for engine in streams.ENGINES}}
  with tempfile.TemporaryDirectory() as data_dir:
    experiments = {engine: experiment_of(file, steps, engine, data_dir)
                   for engine in streams.ENGINES}
    for _ in range(repeats):
      found["bare step"].append(bare_rate(experiments["resident"], steps))
      for engine, experiment in experiments.items():
        found[engine].append(loop_rate(experiment))
  return {what: statistics.median(values) for what, values in found.items()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", default="configs/cifar_mtl.py")
  parser.add_argument("--steps", type=int, default=120)
  parser.add_argument("--repeats", type=int, default=3)
  args = parser.parse_args()
  allocator.keep_freed(os.environ)
  with programs_kept():
    found = rates(args.config, args.steps, args.repeats)
  for what, rate in found.items():
    emit("loop", what=what, config=args.config, images_per_second=round(rate, 1),
         ratio_to_bare=round(rate / found["bare step"], 3))


if __name__ == "__main__":
  main()
