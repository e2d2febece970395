"""Milliseconds and memory of a training step for every balancer and gradient engine.

  python benchmarks/step.py [--tasks=2] [--batch=128] [--own-streams] [--trunk=cnn] [--rounds=9]
                            [--only=mgda,pcgrad] [--engines=exact,sketched]

Prints one JSON line a variant: the median over rounds, and its ratio to equal weights in the same
run; and the peak of the memory that the compiled step works in, besides its arguments and results,
with its ratio to that of equal weights. Rounds go through all variants in turn, so that a noisy
machine disturbs them alike.
"""

import argparse
from collections.abc import Sequence
import functools
import os
from typing import Any

import jax
import numpy as np
from timing import emit, medians, sample_of

import mtl_jax
from mtl_jax import balancing, models, tasks
from mtl_jax.experiment import allocator
from mtl_jax.training.engines import ENGINES
from mtl_jax.training.optimizer import optimizer
from mtl_jax.training.sharding import (create_sharded, data_mesh, replicated,
                                       sharded_resident_steps, sharded_step, split)
from mtl_jax.training.task_gradients import check_engine


def variants(num_tasks: int, own_streams: bool) -> list[tuple[balancing.Balancer, str]]:
  """Every balancer with the engines that can serve it; losses need none."""
  arguments = {"fixed": {"weights": (1.0,) * num_tasks}, "pivrg": {"scores": (0.0,) * num_tasks}}
  result = []
  for name in balancing.METHODS:
    balancer = balancing.get(name, **arguments.get(name, {}))
    if "losses" in balancer.needs:
      result.append((balancer, "none"))
      continue
    result += [(balancer, engine) for engine in ENGINES if _serves(engine, balancer, own_streams)]
  return result


def _serves(engine: str, balancer: balancing.Balancer, own_streams: bool) -> bool:
  try:
    check_engine(engine, balancer, one_stream=not own_streams, one_representation=True)
  except ValueError:
    return False
  return True


def statics_of(balancer: balancing.Balancer, *, num_tasks: int, own_streams: bool = False,
               trunk: str = "cnn") -> dict[str, Any]:
  """The static arguments of a step: classification into 10 classes by linear heads, Adam."""
  streams = [f"s{i}" if own_streams else "s" for i in range(num_tasks)]
  some_tasks = tuple(tasks.classification(f"t{i}", num_classes=10, stream=stream, label=f"y{i}")
                     for i, stream in enumerate(streams))
  model = models.MultiTaskModel(
      sharing=models.Hard(models.TRUNKS[trunk]()),
      heads={task.name: models.Linear(10) for task in some_tasks},
      streams={task.name: task.stream for task in some_tasks})
  return dict(model=model, tasks=some_tasks, balancer=balancer, optimizer=optimizer("adam", 1e-3))


def random_batch(some_tasks: Sequence[tasks.Task], batch_size: int) -> dict[str, Any]:
  """A batch of random images [B, 32, 32, 3] and labels for such tasks, the same at every call."""
  random = np.random.default_rng(0)
  images = random.standard_normal((batch_size, 32, 32, 3), np.float32)
  batch = {task.stream: {"image": images} for task in some_tasks}
  for task in some_tasks:
    batch[task.stream][task.label] = random.integers(0, task.num_outputs, batch_size, np.int32)
  return batch


def build(balancer: balancing.Balancer, engine: str, *, num_tasks: int, batch_size: int,
          own_streams: bool = False, trunk: str = "cnn",
          precision: str = "float32", in_one: int = 0) -> tuple[Any, Any, Any]:
  """A step to be compiled, or `in_one` of them in one program; its state and its batch."""
  statics = statics_of(balancer, num_tasks=num_tasks, own_streams=own_streams, trunk=trunk)
  statics["gradients"] = "exact" if engine == "none" else engine
  batch = random_batch(statics["tasks"], batch_size)
  mesh = data_mesh()
  create = lambda: mtl_jax.create_train_state(0, batch, **statics)
  if trunk == "cnn":  # Not under jit: many variants share what a few operations compile to.
    state = jax.device_put(create(), replicated(mesh))
  else:  # which has few variants, and parameters of many shapes
    state = create_sharded(create, mesh)
  step = functools.partial(mtl_jax.train_step, **statics, precision=precision)
  if in_one:
    return (sharded_resident_steps(step, lambda batch, state: batch, mesh, in_one), state,
            jax.device_put(batch, replicated(mesh)))
  return sharded_step(step, mesh), state, jax.device_put(batch, split(mesh))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tasks", type=int, default=2)
  parser.add_argument("--batch", type=int, default=128, help="examples of each stream")
  parser.add_argument("--own-streams", action="store_true", help="each task reads its own stream")
  parser.add_argument("--trunk", default="cnn", choices=models.TRUNKS)
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument("--only", default="", help="balancers, separated by commas; all if empty")
  parser.add_argument("--engines", default="", help="separated by commas; all if empty")
  args = parser.parse_args()

  allocator.keep_freed(os.environ)
  samples, megabytes = {}, {}
  for balancer, engine in variants(args.tasks, args.own_streams):
    if args.only and balancer.name not in ("equal", *args.only.split(",")):
      continue
    if args.engines and engine not in ("none", *args.engines.split(",")):
      continue
    step, state, batch = build(balancer, engine, num_tasks=args.tasks, batch_size=args.batch,
                               own_streams=args.own_streams, trunk=args.trunk)
    step = step.lower(state, batch).compile()
    megabytes[balancer.name, engine] = step.memory_analysis().temp_size_in_bytes / 2**20
    samples[balancer.name, engine], _ = sample_of(step, state, batch)
  found = medians(samples, args.rounds)
  for (name, engine), median in found.items():
    emit("step", balancer=name, gradients=engine, tasks=args.tasks, batch=args.batch,
         own_streams=args.own_streams, trunk=args.trunk, milliseconds=round(1e3 * median, 2),
         ratio_to_equal=round(median / found["equal", "none"], 3),
         megabytes=round(megabytes[name, engine], 1),
         memory_to_equal=round(megabytes[name, engine] / megabytes["equal", "none"], 3))


if __name__ == "__main__":
  main()
