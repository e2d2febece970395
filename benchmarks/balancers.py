"""Milliseconds of the balancing mathematics alone, for every method, on one core.

  python benchmarks/balancers.py [--tasks=40] [--rounds=25] [--parameters=2000]
  python benchmarks/balancers.py --check-features

Each method updates on one Gramian of gradients whose norms spread over two decades; those that
look at the gradients themselves get the gradients, of so many parameters. No network takes part:
what a step costs is measured by `step.py`. Prints one JSON line a method: the median over rounds.
Rounds go through all methods in turn, so that a noisy machine disturbs them alike.

With --check-features it measures instead how far the weights that the `features` engine leads to
are from the exact ones: for a narrow convolutional network with 8 tasks on one stream of random
images, one JSON line for each method that decides by the Gramian, with the cosine between the two
weight vectors, the cosine between the directions they make of the exact gradients, and the
distance of these directions relative to the length of the exact one. Methods whose weights depend
on the gradients' size differ in length too, since a representation's gradients are of another.
"""

import argparse
import functools
import os
from typing import Any

if hasattr(os, "sched_setaffinity"):  # before jax counts the cores that its threads may use
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from timing import emit, medians, sample_of  # noqa: E402

import mtl_jax  # noqa: E402
from mtl_jax import balancing, models, tasks  # noqa: E402
from mtl_jax.balancing.balancer import LEVELS, fill_in, init_state  # noqa: E402
from mtl_jax.training.optimizer import optimizer  # noqa: E402


def build(name: str, num_tasks: int) -> balancing.Balancer:
  """A method with its defaults, and what has no default."""
  required = {"fixed": {"weights": (1.0,) * num_tasks},
              "pivrg": {"scores": tuple(range(num_tasks))}}
  return balancing.get(name, **required.get(name, {}))


def level(balancer: balancing.Balancer) -> str:
  return next(level for level in LEVELS if level in balancer.needs)


def gradients(num_tasks: int, parameters: int) -> jax.Array:
  """Random gradients [T, P] whose norms spread over two decades."""
  norms = 10 ** np.linspace(-1, 1, num_tasks)[:, None]
  normal = np.random.default_rng(0).normal(size=(num_tasks, parameters))
  return jnp.asarray(norms * normal / np.sqrt(parameters), jnp.float32)


def measure(args: argparse.Namespace) -> None:
  """Prints the milliseconds of every method."""
  rows = gradients(args.tasks, args.parameters)
  plain = balancing.Signals(
      losses=jnp.asarray(np.random.default_rng(0).uniform(0.5, 2, args.tasks), jnp.float32),
      active=jnp.ones(args.tasks, bool), key=jax.random.key(0))
  samples, needs = {}, {}
  for name in balancing.METHODS:
    balancer = build(name, args.tasks)
    state = init_state(balancer, args.tasks, rows)
    signals = fill_in(plain, balancer, state, rows)
    update = jax.jit(lambda state, signals, balancer=balancer:
                     balancer.update(signals, state)[::-1])
    samples[name], _ = sample_of(update, state, signals)
    needs[name] = level(balancer)
  for name, seconds in medians(samples, args.rounds).items():
    emit("balancers", balancer=name, needs=needs[name], tasks=args.tasks,
         parameters=args.parameters, milliseconds=round(1e3 * seconds, 3))


def gramians(num_tasks: int, batch_size: int) -> dict[str, Any]:
  """Losses, and the Gramian that each engine shows to a balancer on the same step."""
  some_tasks = tuple(tasks.classification(f"t{i}", num_classes=10, stream="s", label=f"y{i}")
                     for i in range(num_tasks))
  model = models.MultiTaskModel(
      sharing=models.Hard(models.TRUNKS["cnn"](channels=(8, 16), width=32)),
      heads={task.name: models.Linear(10) for task in some_tasks},
      streams={task.name: task.stream for task in some_tasks})
  key = jax.random.key(0)
  images = jax.random.normal(key, (batch_size, 16, 16, 3))
  labels = {task.label: jax.random.randint(jax.random.fold_in(key, i), (batch_size,), 0, 10)
            for i, task in enumerate(some_tasks)}
  batch = {"s": {"image": images, **labels}}
  statics = dict(model=model, tasks=some_tasks, balancer=balancing.get("mgda"),
                 optimizer=optimizer("adam", 1e-3))
  state = mtl_jax.create_train_state(0, batch, **statics)
  found = {}
  for engine in ("exact", "features"):
    step = jax.jit(functools.partial(mtl_jax.train_step, **statics, gradients=engine))
    logs = step(state, batch)[1]
    found[engine], found["losses"] = logs["gramian"], logs["losses"]
  return found


def check_features(num_tasks: int = 8, batch_size: int = 64) -> None:
  """Prints, method by method, how far the features' weights are from the exact ones."""
  found = gramians(num_tasks, batch_size)
  exact = np.asarray(found["exact"], np.float64)
  for name in balancing.METHODS:
    balancer = build(name, num_tasks)
    if "gramian" not in balancer.needs:
      continue

    def weights_of(gramian: jax.Array, balancer: balancing.Balancer = balancer) -> np.ndarray:
      signals = balancing.Signals(found["losses"], jnp.ones(num_tasks, bool), jax.random.key(0),
                                  gramian)
      decision, _ = jax.jit(balancer.update)(signals, init_state(balancer, num_tasks, None))
      return np.asarray(decision.weights, np.float64)

    def cosine(one: np.ndarray, other: np.ndarray, metric: np.ndarray) -> float:
      return float(one @ metric @ other / np.sqrt(one @ metric @ one * (other @ metric @ other)))

    right, near = weights_of(found["exact"]), weights_of(found["features"])
    # With d = Jᵀ w, lengths and angles of directions are those of weights under the Gramian.
    apart, length = near - right, np.sqrt(right @ exact @ right)
    emit("features", balancer=name, tasks=num_tasks, batch=batch_size,
         weights_cosine=round(cosine(right, near, np.eye(num_tasks)), 4),
         direction_cosine=round(cosine(right, near, exact), 4),
         direction_distance=round(float(np.sqrt(max(apart @ exact @ apart, 0)) / length), 4))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tasks", type=int, default=40)
  parser.add_argument("--rounds", type=int, default=25)
  parser.add_argument("--parameters", type=int, default=2000,
                      help="of the stacked gradients, and behind the Gramian")
  parser.add_argument("--check-features", action="store_true",
                      help="compare the engines' weights instead")
  args = parser.parse_args()
  if args.check_features:
    check_features()
  else:
    measure(args)


if __name__ == "__main__":
  main()
