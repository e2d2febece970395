"""Milliseconds and memory of a training step for every balancer and gradient engine.

  python benchmarks/step.py [--tasks=2] [--batch=128] [--own-streams] [--trunk=cnn] [--rounds=9]
                            [--only=mgda,pcgrad] [--engines=exact,sketched]

Prints one JSON line a variant: the median over rounds, and its ratio to equal weights in the same
run; and the peak of the memory that the compiled step works in, besides its arguments and results,
with its ratio to that of equal weights. Rounds go through all variants in turn, so that a noisy
machine disturbs them alike.
"""

import argparse
import functools
import json
import statistics
import time

import jax

import mtl_jax
from mtl_jax import balancing, models, tasks
from mtl_jax.training.engines import ENGINES
from mtl_jax.training.optimizer import optimizer
from mtl_jax.training.sharding import data_mesh, replicated, sharded_step, split
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


def build(args: argparse.Namespace, balancer: balancing.Balancer, engine: str):
  """A compiled step, its state and its batch."""
  streams = [f"s{i}" if args.own_streams else "s" for i in range(args.tasks)]
  some_tasks = tuple(tasks.classification(f"t{i}", num_classes=10, stream=stream, label=f"y{i}")
                     for i, stream in enumerate(streams))
  model = models.MultiTaskModel(
      sharing=models.Hard(models.TRUNKS[args.trunk]()),
      heads={task.name: models.Linear(10) for task in some_tasks},
      streams={task.name: task.stream for task in some_tasks})
  key = jax.random.key(0)
  batch = {stream: {"image": jax.random.normal(key, (args.batch, 32, 32, 3))} for stream in streams}
  for i, task in enumerate(some_tasks):
    batch[task.stream][task.label] = jax.random.randint(
        jax.random.fold_in(key, i), (args.batch,), 0, 10)
  statics = dict(model=model, tasks=some_tasks, balancer=balancer, optimizer=optimizer("adam", 1e-3),
                 gradients="exact" if engine == "none" else engine)
  mesh = data_mesh()
  state = jax.device_put(mtl_jax.create_train_state(0, batch, **statics), replicated(mesh))
  step = sharded_step(functools.partial(mtl_jax.train_step, **statics), mesh)
  return step, state, jax.device_put(batch, split(mesh))


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

  runs, times, megabytes = {}, {}, {}
  for balancer, engine in variants(args.tasks, args.own_streams):
    if args.only and balancer.name not in ("equal", *args.only.split(",")):
      continue
    if args.engines and engine not in ("none", *args.engines.split(",")):
      continue
    step, state, batch = build(args, balancer, engine)
    step = step.lower(state, batch).compile()
    megabytes[balancer.name, engine] = step.memory_analysis().temp_size_in_bytes / 2**20
    state, _ = jax.block_until_ready(step(state, batch))
    runs[balancer.name, engine], times[balancer.name, engine] = [step, state, batch], []
  for _ in range(args.rounds):
    for name, run in runs.items():
      step, state, batch = run
      start = time.perf_counter()
      run[1], _ = jax.block_until_ready(step(state, batch))
      times[name].append(1e3 * (time.perf_counter() - start))
  equal = statistics.median(times["equal", "none"])
  for (name, engine), values in times.items():
    median = statistics.median(values)
    print(json.dumps({
        "benchmark": "step", "balancer": name, "gradients": engine, "tasks": args.tasks,
        "batch": args.batch, "own_streams": args.own_streams, "trunk": args.trunk,
        "milliseconds": round(median, 2), "ratio_to_equal": round(median / equal, 3),
        "megabytes": round(megabytes[name, engine], 1),
        "memory_to_equal": round(megabytes[name, engine] / megabytes["equal", "none"], 3),
        "device": jax.devices()[0].device_kind, "devices": jax.device_count(),
        "jax": jax.__version__}))


if __name__ == "__main__":
  main()
