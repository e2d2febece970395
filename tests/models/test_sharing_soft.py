"""Soft sharing: trunks of their own, pulled together by a penalty of the step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax
from mtl_jax import balancing, models, tasks
from mtl_jax.models.sharing import SHARINGS
from mtl_jax.models.sharing.soft import trace_norm
from mtl_jax.training import penalties
from tests.models.sharing_cases import TASKS, TWO, assert_close, check_owners, filled, images_of

TRUNK = models.MLPTrunk(widths=(3, 2))
IMAGES = images_of({"x": 3, "y": 2})


def batch_of(sizes):
  rng = np.random.default_rng(3)
  batch = {stream: {"image": x} for stream, x in images_of(sizes).items()}
  for task, stream in TWO.items():
    batch[stream][task] = jnp.asarray(rng.integers(0, 2, sizes[stream]), jnp.int32)
  return batch


def stepper(name, learning_rate=1.0, balancer=None, **kwargs):
  some_tasks = tuple(tasks.classification(task, num_classes=2, stream=stream, label=task)
                     for task, stream in TWO.items())
  model = models.MultiTaskModel(sharing=SHARINGS[name](TRUNK, TASKS, **kwargs), streams=TWO,
                                heads={task: models.Linear(2) for task in TASKS})
  statics = dict(model=model, tasks=some_tasks, balancer=balancer or balancing.equal(),
                 optimizer=optax.sgd(learning_rate))
  batch = batch_of({"x": 3, "y": 2})
  state = jax.jit(lambda: mtl_jax.create_train_state(0, batch, **statics))()
  return state, batch, functools.partial(mtl_jax.train_step, **statics), model


@pytest.mark.slow
def test_without_strength_trunks_are_independent():
  taken = {}
  for name, kwargs in (("soft", {"strength": 0.0}), ("independent", {})):
    state, batch, step, _ = stepper(name, **kwargs)
    new, logs = jax.jit(step)(state, batch)
    taken[name] = new.params
    assert set(logs["penalties"]) == ({"soft"} if name == "soft" else set())
  assert_close(taken["soft"], taken["independent"])


@pytest.mark.parametrize("distance", ["mean", pytest.param("trace_norm", marks=pytest.mark.slow)])
def test_the_step_adds_the_gradient_of_the_penalty(distance):
  """Also beside the config's own penalties, and whatever the balancer: it has nothing to do."""
  state, batch, plain, _ = stepper("independent")
  _, _, step, model = stepper("soft", balancer=balancing.mgda(), distance=distance, strength=0.1)
  step = functools.partial(step, penalties={"l2": penalties.l2(0.01)})
  after_plain, _ = jax.jit(plain)(state, batch)
  after, logs = jax.jit(step)(state, batch)
  values, grads = jax.value_and_grad(lambda p: model.penalties(p)["soft"])(state.params)
  decay = jax.grad(penalties.l2(0.01))(state.params)
  extra = jax.tree.map(jnp.subtract, after_plain.params, after.params)
  assert_close(extra, jax.tree.map(jnp.add, grads, decay))
  np.testing.assert_allclose(logs["penalties"]["soft"], values, rtol=1e-5)
  assert set(logs["penalties"]) == {"soft", "l2"}


def test_gradients_of_two_tasks_by_hand():
  """λ = 0.5, difference (2, -4): to the mean 2λ(θ_a − θ̄), in a chain 2λ(θ_a − θ_b)."""
  params = {"trunks_a": {"w": jnp.array([3., 0.])}, "trunks_b": {"w": jnp.array([1., 4.])}}
  for distance, value, grad in (("mean", 0.5 * 10, [1., -2.]),
                                ("consecutive", 0.5 * 20, [2., -4.])):
    sharing = SHARINGS["soft"](TRUNK, ("a", "b"), distance=distance, strength=0.5)
    found, grads = jax.value_and_grad(lambda p, s=sharing: s.penalties(p)["soft"])(params)
    assert float(found) == pytest.approx(value)
    np.testing.assert_allclose(grads["trunks_a"]["w"], grad, atol=1e-6)
    np.testing.assert_allclose(grads["trunks_b"]["w"], [-g for g in grad], atol=1e-6)


def test_the_trace_norm_is_that_of_numpy_and_its_gradient_the_polar_factor():
  x = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
  u, s, vt = np.linalg.svd(x.reshape(3, 8), full_matrices=False)
  value, grad = jax.value_and_grad(trace_norm)(jnp.asarray(x))
  np.testing.assert_allclose(value, s.sum(), rtol=1e-4)
  np.testing.assert_allclose(grad.reshape(3, 8), u @ vt, atol=1e-3)


@pytest.mark.parametrize("x", [np.zeros((2, 3)), np.ones((2, 3))])
def test_the_trace_norm_of_equal_rows_has_a_gradient(x):
  value, grad = jax.value_and_grad(trace_norm)(jnp.asarray(x, jnp.float32))
  assert float(value) == pytest.approx(np.linalg.norm(x, "nuc"), rel=2e-3, abs=1e-5)
  expected = x / max(np.linalg.norm(x), 1)
  np.testing.assert_allclose(grad, expected, atol=2e-3)


@pytest.mark.parametrize("distance", ["mean", "consecutive"])
def test_a_large_strength_pulls_trunks_together(distance):
  strength = 100.0
  state, batch, step, model = stepper("soft", 1e-3, distance=distance, strength=strength)
  step, distances = jax.jit(step), []
  for _ in range(8):
    state, logs = step(state, batch)
    distances.append(float(logs["penalties"]["soft"]) / strength)
  assert np.all(np.diff(distances) < 0) and distances[-1] < 0.1 * distances[0]


def test_a_large_trace_norm_lowers_the_singular_values():
  """The norm falls step by step, and the smallest singular value with it."""
  state, batch, step, _ = stepper("soft", 1e-2, distance="trace_norm", strength=1.0)
  step, norms = jax.jit(step), []
  smallest = lambda state: np.linalg.svd(np.stack(
      [np.ravel(state.params["sharing"][f"trunks_{task}"]["dense1"]["kernel"]) for task in TASKS]),
                                         compute_uv=False)[-1]
  before = smallest(state)
  for _ in range(8):
    state, logs = step(state, batch)
    norms.append(float(logs["penalties"]["soft"]))
  assert np.all(np.diff(norms) < 0) and smallest(state) < before


def test_who_owns_what():
  sharing = SHARINGS["soft"](TRUNK, TASKS)
  check_owners(sharing, IMAGES, TWO)
  variables = filled(sharing, IMAGES, TWO, False)
  assert set(variables["params"]) == {f"trunks_{task}" for task in TASKS}
  assert all(sharing.owner((name,)) for name in variables["params"])


@pytest.mark.parametrize("kwargs, message", [
    ({"distance": "l1"}, r"distance: expected one of \['mean', 'consecutive', 'trace_norm'\]"),
    ({"strength": -1.0}, "strength: expected a number from 0 on, found -1.0")])
def test_what_does_not_fit_is_said(kwargs, message):
  with pytest.raises(ValueError, match=message):
    SHARINGS["soft"](TRUNK, TASKS, **kwargs)


def test_a_penalty_of_the_same_name_is_refused():
  state, batch, step, _ = stepper("soft")
  with pytest.raises(ValueError, match=r"does not use itself, found \['soft'\]"):
    jax.eval_shape(functools.partial(step, penalties={"soft": penalties.l2(1.0)}), state, batch)
