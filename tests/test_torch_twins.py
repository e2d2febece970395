"""The networks and methods that the benchmarks time in PyTorch are ours; skipped without it.

Their process is left out: the same module is loaded here. What peers solve by iteration they solve
less far than we do, which the tolerances allow for.
"""

import functools

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_benchmarks import load

import mtl_jax
from mtl_jax import balancing, models, tasks
from mtl_jax.training.optimizer import optimizer

torch = pytest.importorskip("torch")
# The solvers that the peers call announce their own future changes.
pytestmark = pytest.mark.filterwarnings("ignore")

TRUNKS = {"cnn": models.CNN(channels=(4, 6), width=8), "resnet18": models.resnet18(channels=2)}


@functools.cache
def ours(network, num_tasks=2):
  """Statics, state and batch of a small network of classification tasks on one stream."""
  some_tasks = tuple(tasks.classification(f"t{i}", num_classes=3, stream="s", label=f"y{i}")
                     for i in range(num_tasks))
  model = models.MultiTaskModel(
      sharing=models.Hard(TRUNKS[network]), heads={t.name: models.Linear(3) for t in some_tasks},
      streams={t.name: "s" for t in some_tasks})
  key = jax.random.key(1)
  batch = {"s": {"image": jax.random.normal(key, (6, 8, 8, 3)), **{
      f"y{i}": jax.random.randint(jax.random.fold_in(key, i), (6,), 0, 3)
      for i in range(num_tasks)}}}
  statics = dict(model=model, tasks=some_tasks, balancer=balancing.get("equal"),
                 optimizer=optimizer("adam", 1e-3))
  return statics, jax.jit(lambda: mtl_jax.create_train_state(0, batch, **statics))(), batch


def twin(tmp_path, state, batch, network, way="equal", **options):
  """The same in PyTorch."""
  labels = jnp.stack([batch["s"][name] for name in sorted(batch["s"]) if name.startswith("y")])
  peers = load("peers").Peers("python", 1, tmp_path)
  file = peers.write(state.params, batch["s"]["image"], labels)
  return load("torch_side").Training(str(file), network, way, **options)


@functools.cache
def our_rows(network, num_tasks=2):
  """Losses [T] and the gradients of each, leaves [T, …], of the first state."""
  statics, state, batch = ours(network, num_tasks)

  def losses(params):
    outputs, _ = statics["model"].apply({"params": params, **state.model_state}, batch, train=True,
                                        mutable=list(state.model_state))
    return tasks.task_losses(statics["tasks"], outputs, batch)[0]

  def rows(params):
    found, pull = jax.vjp(losses, params)
    return found, jax.tree.map(lambda *x: jnp.stack(x),
                               *(pull(one)[0] for one in jnp.eye(num_tasks)))
  return jax.jit(rows)(state.params)


def by_path(tree):
  return {"/".join(path): np.asarray(x) for path, x in flatten_dict(tree).items()}


def in_their_layout(network, tree):
  """Parameters, or gradients of them, in PyTorch's order: of a network that has them as weights."""
  return [x.detach() for x in load("torch_side").Model(network, by_path(tree)).parameters()]


def relative_distance(found, expected):
  """Of lists of tensors, over the length of the expected."""
  apart = sum(float((x - y).square().sum()) for x, y in zip(found, expected, strict=True))
  return (apart / sum(float(x.square().sum()) for x in expected)) ** 0.5


@pytest.mark.parametrize("network, layout", [
    ("cnn", "channels_first"), ("cnn", "channels_last"),
    pytest.param("resnet18", "channels_first", marks=pytest.mark.slow),
    pytest.param("resnet18", "channels_last", marks=pytest.mark.slow)])
def test_networks_are_the_same(network, layout, tmp_path):
  """Losses and gradients from the same weights."""
  _, state, batch = ours(network)
  training = twin(tmp_path, state, batch, network, layout=layout)
  losses, rows = our_rows(network)
  np.testing.assert_allclose([float(x) for x in training.gradients()], losses, rtol=1e-5)
  expected = in_their_layout(network, jax.tree.map(lambda x: x.sum(axis=0), rows))
  found = [parameter.grad for parameter in training.model.parameters()]
  assert len(found) == len(jax.tree.leaves(state.params))
  for one, other in zip(found, expected):
    assert relative_distance([one], [other]) <= 1e-3


@pytest.mark.parametrize("network", ["cnn", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_steps_are_the_same(network, tmp_path):
  """The losses before each of some steps of Adam."""
  statics, state, batch = ours(network)
  training = twin(tmp_path, state, batch, network)
  step = jax.jit(functools.partial(mtl_jax.train_step, **statics))
  for _ in range(3):
    state, logs = step(state, batch)
    np.testing.assert_allclose([float(x) for x in training.step()], logs["losses"], rtol=1e-3)


# Ours that each way is, number of tasks, and how far apart solvers may stop, over the length.
WAYS = {
    "libmtl:pcgrad": (balancing.pcgrad(), 2, 1e-4),
    "libmtl:mgda": (balancing.mgda(), 3, 3e-2),
    "libmtl:cagrad": (balancing.cagrad(), 3, 3e-2),
    "libmtl:nash_mtl": (balancing.nash_mtl(), 3, 1e-2),
    "libmtl:upgrad": (balancing.upgrad(regularization=1e-4), 3, 1e-3),
    "torchjd:pcgrad": (balancing.pcgrad(), 2, 1e-4),
    "torchjd:mgda": (balancing.mgda(), 3, 3e-2),
    "torchjd:cagrad": (balancing.cagrad(c=0.5, rescale=0), 3, 1e-3),
    "torchjd:nash_mtl": (balancing.nash_mtl(), 3, 1e-2),
    "torchjd:upgrad": (balancing.upgrad(regularization=1e-4), 3, 1e-3),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_give_our_directions(way, tmp_path):
  """The gradient of the trunk that each way fills in is the one that our method makes."""
  for package in ("torchjd",) if way.startswith("torchjd") else ("scipy", "cvxpy", "quadprog"):
    pytest.importorskip(package)
  balancer, num_tasks, tolerance = WAYS[way]
  _, state, batch = ours("cnn", num_tasks)
  training = twin(tmp_path, state, batch, "cnn", way)
  training.gradients()
  _, rows = our_rows("cnn", num_tasks)
  direction, _ = jax.jit(lambda rows: balancing.aggregate(balancer, rows))(rows["sharing"])
  expected = in_their_layout("cnn", {**state.params, "sharing": direction})
  found = [parameter.grad for parameter in training.model.trunk.parameters()]
  assert relative_distance(found, expected[:len(found)]) <= tolerance
