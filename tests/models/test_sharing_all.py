"""What every sharing architecture keeps: a step on eight devices, and an exported forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax
from mtl_jax import balancing, models, tasks
from mtl_jax.training import sharding
from tests.models.sharing_cases import TASKS, TWO, filled

ELSEWHERE = {"mmoe", "cgc", "ple", "dselect_k", "film", "adapters", "lora", "task_norm"}
CASES = {**{name: (name, {}) for name in models.SHARINGS if name not in ELSEWHERE},
         "branched": ("hard", {"branch_at": "hidden1"})}


def make(case):
  name, kwargs = CASES[case]
  sharing = models.SHARINGS[name](models.MLPTrunk(widths=(6, 6)), TASKS, **kwargs)
  model = models.MultiTaskModel(sharing=sharing, streams=TWO,
                                heads={task: models.Linear(2) for task in TASKS})
  rng = np.random.default_rng(0)
  batch = {stream: {"image": jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)}
           for stream in ("x", "y")}
  for task, stream in TWO.items():
    batch[stream][task] = jnp.asarray(rng.integers(0, 2, 8), jnp.int32)
  return model, batch


@pytest.mark.parametrize("case", [
    c if c == "cross_stitch" else pytest.param(c, marks=pytest.mark.slow)
    for c in CASES if c not in ("hard", "independent")])
def test_one_device_equals_eight(case):
  model, batch = make(case)
  some_tasks = tuple(tasks.classification(task, num_classes=2, stream=stream, label=task)
                     for task, stream in TWO.items())
  statics = dict(model=model, tasks=some_tasks, balancer=balancing.equal(),
                 optimizer=optax.sgd(0.1))
  shapes = jax.eval_shape(lambda: mtl_jax.create_train_state(0, batch, **statics))
  state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes).replace(
      task_weights=jnp.ones(len(TASKS)))
  variables = filled(model, batch)
  state = state.replace(params=variables.pop("params"), model_state=variables)
  step, results = functools.partial(mtl_jax.train_step, **statics), []
  for devices in (jax.devices()[:1], jax.devices()):
    mesh = sharding.data_mesh(devices)
    new, logs = sharding.sharded_step(step, mesh)(
        jax.device_put(jax.tree.map(jnp.copy, state), sharding.replicated(mesh)),
        jax.device_put(batch, sharding.split(mesh)))
    results.append(jax.device_get((logs["losses"], logs["penalties"], new.params,
                                   new.model_state)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), *results)
  moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), results[0][2], state.params)
  assert any(jax.tree.leaves(moved["sharing"])) and np.isfinite(results[0][0]).all()


@pytest.mark.parametrize("case", CASES)
def test_the_forward_pass_is_exported_and_read_back(case):
  model, batch = make(case)
  variables = filled(model, batch)
  images = {stream: {"image": columns["image"]} for stream, columns in batch.items()}
  run = jax.jit(model.apply)
  read = jax.export.deserialize(jax.export.export(run)(variables, images).serialize())
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
               read.call(variables, images), run(variables, images))
