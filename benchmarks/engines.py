"""How far the cheap gradient engines lead from the exact Gramian, over the steps of a training.

  python benchmarks/engines.py [--tasks=40] [--steps=200] [--batch=128] [--balancers=mgda,cagrad]

The tasks are binary, on the bundled sample of two handwritten digits an image: whether the first,
or the second, of them is among five digits drawn for the task. One network is trained by the
method on the exact Gramian. At each step every engine looks at the same gradients, with what it
kept from the steps before, and its weights are compared with the exact ones. Prints one JSON line
a setting, with medians over all steps but the first quarter: the largest difference of a weight
over the largest weight; the cosine between the two directions that the weights make of the exact
gradients; the distance of these directions over the length of the exact one; and, of a sketch, the
relative error of the Gramian (Frobenius) and of the gradients' norms, for the Gramian of the step
and for the exact average over steps that the sketch estimates. Equal weights, and the exact weights
of the step before, are listed for comparison: where these are far off, weights depend on the
batch more than on the network.
"""

import argparse
import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import balancing
from mtl_jax.balancing.balancer import init_state
from mtl_jax.data.sample import digits
from mtl_jax.training.engines import Backward, Engine, exact, matrix_free, sketched
from mtl_jax.training.optimizer import optimizer

SETTINGS = (
    *(("matrix_free", {"products": n}, matrix_free(n)) for n in (2, 3, 5, 9)),
    *(("sketched", {"directions": n, "decay": decay}, sketched(n, decay))
      for n, decay in ((1, 0.9), (1, 0.99), (4, 0.9), (4, 0.99), (16, 0.99))),
)


class Problem(NamedTuple):
  """Images [N, P] and labels [N, T]."""

  images: jax.Array
  labels: jax.Array


def problem(num_tasks: int) -> Problem:
  """The sample's images at a quarter of their size, and the tasks' binary labels."""
  columns = digits("cifar100").splits["train"].arrays()
  images = columns["image"].astype(np.float32).mean(axis=3)
  images = images.reshape(-1, 16, 2, 16, 2).mean(axis=(2, 4)).reshape(len(images), -1)
  rng = np.random.default_rng(0)
  first, second = columns["label"] // 10, columns["label"] % 10
  labels = np.stack([(rng.permutation(10) < 5)[second if i % 2 else first]
                     for i in range(num_tasks)], axis=1)
  return Problem(jnp.asarray((images - images.mean()) / images.std()),
                 jnp.asarray(labels, jnp.int32))


def init_params(num_tasks: int, widths: tuple[int, ...] = (256, 64, 32)) -> dict[str, Any]:
  """A dense trunk and a head of one logit a task."""
  keys = jax.random.split(jax.random.key(0), len(widths))
  kernels = [jax.random.normal(key, shape) * np.sqrt(2 / shape[0]).astype(np.float32)
             for key, shape in zip(keys, zip(widths, widths[1:]))]
  heads = jax.random.normal(keys[-1], (num_tasks, widths[-1])) / np.sqrt(widths[-1]).astype(
      np.float32)
  return {"trunk": [(kernel, jnp.zeros(kernel.shape[1])) for kernel in kernels], "heads": heads}


def features_of(trunk: Any, images: jax.Array) -> jax.Array:
  """Features [B, F]."""
  for kernel, bias in trunk:
    images = jax.nn.relu(images @ kernel + bias[None])
  return images


def losses_of(heads: jax.Array, features: jax.Array, labels: jax.Array) -> jax.Array:
  """Losses [T] of logits against labels [B, T]."""
  logits = features @ heads.T
  return jnp.mean(jax.nn.softplus(jnp.where(labels > 0, -logits, logits)), axis=0)


def look(params: Any, batch: Problem) -> tuple[jax.Array, Backward]:
  """Losses [T] and the way back, as a training step finds them."""
  num_tasks = batch.labels.shape[1]
  names = [f"t{i}" for i in range(num_tasks)]
  features, push = jax.linearize(lambda trunk: features_of(trunk, batch.images), params["trunk"])
  pull = jax.linear_transpose(push, params["trunk"])
  grads = jax.jacrev(losses_of, argnums=1)(params["heads"], features, batch.labels)

  def push_all(tangents: Any) -> dict[str, jax.Array]:
    return dict.fromkeys(names, push(tangents))

  def pull_all(cotangents: dict[str, jax.Array]) -> Any:
    return pull(functools.reduce(jnp.add, cotangents.values()))[0]
  backward = Backward([dict(zip(names, grads))], [pull_all], [push_all], lambda *_: None,
                      True, True, True)
  return losses_of(params["heads"], features, batch.labels), backward


def step_of(balancer: balancing.Balancer, engines: list[Engine], data: Problem, batch_size: int):
  """`step(carry, number) -> (carry, found)`: one step of training, all engines looking on."""
  optim = optimizer("adam", 1e-3)
  served = [engine.adapt(balancer) for engine in engines]

  def step(carry: Any, number: jax.Array) -> tuple[Any, Any]:
    params, opt_state, states = carry
    key = jax.random.fold_in(jax.random.key(1), number)
    chosen = jax.random.randint(key, (batch_size,), 0, data.images.shape[0])
    batch = Problem(data.images[chosen], data.labels[chosen])
    losses, backward = look(params, batch)
    signals = balancing.Signals(losses, jnp.ones(len(losses), bool), key)
    found, new_states = [], []
    for engine, method, state in zip(engines, served, states):
      seen, _, state = engine.look(method, signals, state, backward)
      decision, state = method.update(seen, state)
      found.append({"weights": decision.weights, "gramian": seen.gramian})
      new_states.append(state)
    grads = {"trunk": backward.pull(found[0]["weights"]),
             "heads": jax.grad(lambda heads: losses_of(
                 heads, features_of(params["trunk"], batch.images), batch.labels).sum())(
                     params["heads"])}
    updates, opt_state = optim.update(grads, opt_state, params)
    params = jax.tree.map(jnp.add, params, updates)
    return (params, opt_state, new_states), found

  num_tasks = data.labels.shape[1]
  params = init_params(num_tasks)
  states = [init_state(method, num_tasks, None) for method in served]
  return step, (params, optim.init(params), states)


def compare(gramian: np.ndarray, right: np.ndarray, near: np.ndarray) -> dict[str, float]:
  """Medians over steps of how far weights [N, T] are from the right ones; gramian [N, T, T]."""
  inner = lambda a, b: np.einsum("nt,ntu,nu->n", a, gramian, b)
  length = np.sqrt(inner(right, right))
  cosine = inner(right, near) / np.maximum(length * np.sqrt(inner(near, near)), 1e-30)
  apart = np.sqrt(np.maximum(inner(near - right, near - right), 0)) / length
  largest = np.abs(near - right).max(axis=1) / np.abs(right).max(axis=1)
  median = lambda values: round(float(np.median(values)), 4)
  return {"weights_error": median(largest), "direction_cosine": median(cosine),
          "direction_distance": median(apart)}


def averaged(gramian: np.ndarray, decay: float) -> np.ndarray:
  """The moving average that a sketch of that decay estimates."""
  total, seen, result = np.zeros_like(gramian[0]), 0.0, []
  for one in gramian:
    total, seen = decay * total + (1 - decay) * one, decay * seen + 1 - decay
    result.append(total / seen)
  return np.stack(result)


def gramian_errors(found: np.ndarray, right: np.ndarray) -> tuple[float, float]:
  """Medians over steps of the relative error of the Gramian and of the norms."""
  whole = np.linalg.norm(found - right, axis=(1, 2)) / np.linalg.norm(right, axis=(1, 2))
  lengths = lambda matrices: np.sqrt(np.maximum(np.einsum("ntt->nt", matrices), 0))
  norms = np.abs(lengths(found) / lengths(right) - 1).mean(axis=1)
  return round(float(np.median(whole)), 4), round(float(np.median(norms)), 4)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tasks", type=int, default=40)
  parser.add_argument("--steps", type=int, default=200)
  parser.add_argument("--batch", type=int, default=128)
  parser.add_argument("--balancers", default="mgda,cagrad", help="separated by commas")
  args = parser.parse_args()

  data, start = problem(args.tasks), args.steps // 4
  for name in args.balancers.split(","):
    balancer = balancing.get(name)
    settings = [setting for setting in SETTINGS if not setting[2].objection(balancer, True, True)]
    step, carry = step_of(balancer, [exact(), *(engine for *_, engine in settings)], data,
                          args.batch)
    _, (right, *others) = jax.device_get(jax.jit(lambda carry, step=step: jax.lax.scan(
        step, carry, jnp.arange(args.steps)))(carry))
    gramian = right["gramian"].astype(np.float64)
    weights = right["weights"].astype(np.float64)

    def line(engine: str, near: np.ndarray, **found: Any) -> None:
      errors = compare(gramian[start:], weights[start:], near.astype(np.float64))  # noqa: B023
      print(json.dumps({"benchmark": "engines", "balancer": name,  # noqa: B023
                        "gradients": engine, "tasks": args.tasks, "batch": args.batch,
                        "steps": args.steps, **found, **errors,
                        "device": jax.devices()[0].device_kind, "jax": jax.__version__}))
    equal = np.full_like(weights[start:], weights[start:].sum(axis=1).mean() / args.tasks)
    line("equal weights", equal)
    line("exact of the step before", weights[start - 1:-1])
    for (engine, arguments, _), other in zip(settings, others):
      found = dict(arguments)
      if engine == "sketched":
        seen = other["gramian"].astype(np.float64)
        mean = averaged(gramian, arguments["decay"])
        for what, reference in (("step", gramian), ("average", mean)):
          found[f"gramian_error_of_{what}"], found[f"norms_error_of_{what}"] = gramian_errors(
              seen[start:], reference[start:])
      line(engine, other["weights"][start:], **found)


if __name__ == "__main__":
  main()
