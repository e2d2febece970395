"""What holds for every way of sharing: owners, streams of any shape, export, steps on devices."""

import functools

from flax.traverse_util import flatten_dict
import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax
from mtl_jax import balancing, models, tasks
from mtl_jax.experiment import sections
from mtl_jax.training import sharding

NAMES = ("mmoe", "cgc", "ple", "dselect_k", "film", "adapters", "lora", "task_norm")
STREAMS = {"a": "x", "b": "x", "c": "y"}
FIELDS = {"mmoe": {"experts": 2, "gate_entropy": 0.1}, "cgc": {"shared_experts": 1},
          "dselect_k": {"experts": 3}, "ple": {"levels": 3, "shared_experts": 1}}


def trunk_of(name):
  """Dense layers compile quickly; task_norm needs norm layers."""
  if name == "task_norm":
    return models.ResNet(blocks=(), channels=3)
  return models.MLPTrunk(widths=(4, 4, 3) if name == "ple" else (4, 3))


def model_of(name, trunk=None, streams=STREAMS, **fields):
  sharing = models.SHARINGS[name](trunk or trunk_of(name), tuple(streams),
                                  **{**FIELDS.get(name, {}), **fields})
  return models.MultiTaskModel(sharing=sharing, streams=streams,
                               heads={task: models.Linear(2) for task in streams})


def batch_of(name, size=4):
  rng = np.random.default_rng(0)
  shape = (4, 4, 3) if name == "task_norm" else (5,)
  batch = {stream: {"image": jnp.asarray(rng.normal(size=(size, *shape)), jnp.float32)}
           for stream in "xy"}
  for task, stream in STREAMS.items():
    batch[stream][task] = jnp.asarray(rng.integers(0, 2, size), jnp.int32)
  return batch


def filled(shapes):
  """Random parameters without compiling `init`; what else there is stays positive."""
  rng = np.random.default_rng(1)
  values = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), dict(shapes))
  return {name: tree if name == "params" else jax.tree.map(jnp.abs, tree)
          for name, tree in values.items()}


@pytest.mark.parametrize("name, fields", [
    *((name, {}) for name in NAMES), *(pytest.param(*row, marks=pytest.mark.slow) for row in (
        ("dselect_k", {"gate_input": "stem"}), ("cgc", {"own_experts": 2}),
        ("ple", {"levels": 2})))])
def test_an_owned_parameter_moves_its_task_alone_and_a_shared_one_several(name, fields):
  model, batch = model_of(name, **fields), batch_of(name, size=9)
  variables = filled(jax.eval_shape(lambda: model.init(jax.random.key(0), batch)))
  moved = jax.jit(jax.jacrev(lambda params: jnp.stack([out.sum() for out in model.apply(
      {**variables, "params": params}, batch).values()])))(variables["params"])
  for path, rows in flatten_dict(moved).items():
    reached = {task for task, row in zip(STREAMS, rows) if np.abs(row).sum() > 0}
    owner = model.owner(path)
    if owner:
      assert reached == {owner}, path
    else:
      assert len(reached) > 1, path


@pytest.mark.parametrize("name", NAMES)
def test_tasks_may_have_streams_of_several_sizes_and_names_alike(name):
  streams = {"a": "x", "a_1": "y", "a_1_0": "y"}
  model = model_of(name, models.ResNet(blocks=(1,), channels=4), streams)
  batch = {"x": {"image": jnp.zeros((2, 8, 8, 3))}, "y": {"image": jnp.zeros((3, 12, 10, 3))}}
  outputs, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), batch)
  assert {task: out.shape for task, out in outputs.items()} == {
      "a": (2, 2), "a_1": (3, 2), "a_1_0": (3, 2)}
  owners = {model.owner(path) for path in flatten_dict(variables["params"])}
  assert owners == {None, *streams}


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_model_gives_the_same_for_any_batch_size(name):
  streams = {"a": "x", "b": "x"}
  model = model_of(name, streams=streams)
  batch = {"x": {"image": batch_of(name)["x"]["image"]}}
  variables = filled(jax.eval_shape(lambda: model.init(jax.random.key(0), batch)))
  size, = export.symbolic_shape("b")
  image = batch["x"]["image"]
  any_size = {"x": {"image": jax.ShapeDtypeStruct((size, *image.shape[1:]), image.dtype)}}
  exported = export.export(jax.jit(model.apply))(
      jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables), any_size)
  again = export.deserialize(exported.serialize())
  expected = jax.jit(model.apply)(variables, batch)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
               again.call(variables, batch), expected)


@pytest.mark.parametrize("name", [
    name if name == "mmoe" else pytest.param(name, marks=pytest.mark.slow)
    for name in NAMES])
def test_a_step_on_one_device_equals_eight(name):
  """Tasks on two streams, weighted by their exact Gramian; BatchNorm's statistics are global."""
  model, batch = model_of(name), batch_of(name, size=8)
  some_tasks = tuple(tasks.classification(task, num_classes=2, stream=stream, label=task)
                     for task, stream in STREAMS.items())
  statics = dict(model=model, tasks=some_tasks, balancer=balancing.mgda(), optimizer=optax.sgd(0.1))
  state = jax.eval_shape(lambda: mtl_jax.create_train_state(0, batch, **statics))
  values = filled({"params": state.params, **state.model_state})
  params, model_state = values.pop("params"), values
  state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state).replace(
      params=params, model_state=model_state, task_weights=jnp.ones(3))
  step, results = functools.partial(mtl_jax.train_step, **statics), []
  for devices in (jax.devices()[:1], jax.devices()):
    mesh = sharding.data_mesh(devices)
    new, logs = sharding.sharded_step(step, mesh)(
        jax.device_put(jax.tree.map(jnp.copy, state), sharding.replicated(mesh)),
        jax.device_put(batch, sharding.split(mesh)))
    results.append(jax.device_get((logs["losses"], logs["gramian"], new.params, new.model_state)))
  assert np.isfinite(results[0][0]).all() and (np.diag(results[0][1]) > 0).all()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *results)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_section_is_completed_from_the_signature(name):
  table = models.SHARINGS
  section = sections.complete("config.sharing", {"name": name}, table, given=("trunk", "tasks"))
  sharing = sections.make("config.sharing", section, table, trunk=trunk_of(name), tasks=("a", "b"))
  assert sharing == table[name](trunk_of(name), ("a", "b"))
