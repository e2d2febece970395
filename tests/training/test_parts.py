"""Steps of methods that look at several parts of a batch, or ahead, against the plain way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_jax
from mtl_jax import balancing, tasks
from mtl_jax.tasks.metrics import number
from mtl_jax.training import passes, sharding
from mtl_jax.training.lookahead import look_ahead
from mtl_jax.training.optimizer import optimizer
from tests.training.test_step import (assert_close, gradient_taken, loss_of, make, make_batch,
                                      make_tasks, plain_jacobian)


def flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def shared_rows(state, part, model, some_tasks):
  return np.stack([flat(row["sharing"]) for row in plain_jacobian(state, part, model, some_tasks)])


@pytest.mark.slow
@pytest.mark.parametrize("streams", [("s", "s", "s"), ("s", "r", "r")])
def test_modo_weighs_one_third_by_the_other_two(streams):
  state, batch, step, model, some_tasks = make(streams, balancing.modo(weight_step=0.5))
  new, logs = jax.jit(step)(state, batch)
  parts = passes.cut(batch, 3)
  first, second, third = (shared_rows(state, part, model, some_tasks) for part in parts)
  slope = second @ third.T @ np.full(3, 1 / 3) + 0.1 / 3
  weights = np.full(3, 1 / 3) - 0.5 * slope
  weights += (1 - weights.sum()) / 3
  np.testing.assert_allclose(logs["weights"], weights, atol=1e-5)
  taken = gradient_taken(state, new)
  np.testing.assert_allclose(flat(taken["sharing"]), weights @ first, atol=1e-5)
  rows = plain_jacobian(state, parts[0], model, some_tasks)
  for i, task in enumerate(some_tasks):  # heads follow the same third, unweighted
    assert_close(taken[f"heads_{task.name}"], rows[i][f"heads_{task.name}"])


@pytest.mark.slow
def test_metrics_are_those_of_the_whole_batch():
  state, batch, step, _, some_tasks = make(balancer=balancing.modo())
  _, logs = jax.jit(step)(state, batch)
  for task in some_tasks:
    assert tasks.compute_metrics(some_tasks, logs["metrics"])[f"{task.name}/loss"] > 0
    count = logs["metrics"][task.name]["loss"].count
    assert int(number(count)) == 8


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["exact", "features"])
def test_auto_lambda_is_the_derivative_of_the_held_out_loss(engine):
  """Against a difference quotient of the held-out loss in each weight, as the paper defines it."""
  balancer = balancing.auto_lambda(inner_learning_rate=0.5, learning_rate=0.01)
  state, batch, step, model, some_tasks = make(("s", "r", "r"), balancer, gradients=engine)
  train, held_out = passes.cut(batch, 2)
  total = lambda params, part: sum(
      loss_of(params, i, part, model, some_tasks) for i in range(3))

  def held_out_loss(weights):
    inner = lambda params: sum(w * loss_of(params, i, train, model, some_tasks)
                               for i, w in enumerate(weights))
    grads = jax.grad(inner)(state.params)
    return total(jax.tree.map(lambda x, g: x - 0.5 * g, state.params, grads), held_out)

  new, logs = jax.jit(step)(state, batch)
  derivative = jax.grad(held_out_loss)(jnp.full(3, 0.1))
  np.testing.assert_allclose(new.balancer_state.adam.mu, 0.1 * derivative, rtol=2e-3, atol=1e-6)
  expected = 0.1 - 0.01 * np.sign(derivative)
  np.testing.assert_allclose(logs["weights"], expected, atol=1e-4)
  rows = plain_jacobian(state, train, model, some_tasks)
  weighted = jax.tree.map(lambda *g: sum(float(w) * x for w, x in zip(expected, g)), *rows)
  assert_close(gradient_taken(state, new), weighted, 1e-5)  # heads too


@pytest.mark.slow
def test_moml_sees_every_held_out_loss():
  balancer = balancing.moml(inner_learning_rate=0.5)
  state, batch, step, model, some_tasks = make(balancer=balancer)
  train, held_out = passes.cut(batch, 2)
  losses = lambda params, part: jnp.stack([
      loss_of(params, i, (train, held_out)[part], model, some_tasks) for i in range(3)])
  ahead = jax.jit(lambda params: look_ahead(
      balancer.lookahead, jnp.full(3, 1 / 3), params, losses))(state.params)
  grads = jax.grad(lambda p: losses(p, 0).mean())(state.params)
  moved = jax.tree.map(lambda x, g: x - 0.5 * g, state.params, grads)
  before = np.stack([flat(jax.grad(lambda p, i=i: losses(p, 0)[i])(state.params))
                     for i in range(3)])
  after = np.stack([flat(jax.grad(lambda p, i=i: losses(p, 1)[i])(moved)) for i in range(3)])
  np.testing.assert_allclose(ahead.slopes, after @ before.T, rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(ahead.losses, losses(moved, 0), rtol=1e-4)
  _, logs = jax.jit(step)(state, batch)
  assert abs(float(logs["weights"].sum()) - 1) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["exact", "features"])
def test_forum_follows_both_halves(engine):
  balancer = balancing.forum(slack=5.0)
  state, batch, step, model, some_tasks = make(balancer=balancer, gradients=engine)
  new, _ = jax.jit(step)(state, batch)
  shares = np.asarray(new.balancer_state.shares)
  halves = [plain_jacobian(state, part, model, some_tasks) for part in passes.cut(batch, 2)]
  train, held_out = (np.stack([flat(row["sharing"]) for row in rows]) for rows in halves)
  taken = gradient_taken(state, new)
  pressed = flat(taken["sharing"]) - shares @ held_out
  pressure = pressed @ train.mean(axis=0) / (train.mean(axis=0) @ train.mean(axis=0))
  np.testing.assert_allclose(pressed, pressure * train.mean(axis=0), atol=1e-4)
  assert pressure > 0.5
  for i, task in enumerate(some_tasks):
    name = f"heads_{task.name}"
    expected = jax.tree.map(lambda a, b, i=i: pressure / 3 * a + shares[i] * b,
                            halves[0][i][name], halves[1][i][name])
    assert_close(taken[name], expected, 1e-4)


@pytest.mark.parametrize("name", [
    "modo", pytest.param("auto_lambda", marks=pytest.mark.slow),
    pytest.param("forum", marks=pytest.mark.slow)])
def test_a_task_without_labels_in_one_part_leaves_the_balance(name):
  state, batch, step, _, some_tasks = make(balancer=balancing.get(name))
  label = some_tasks[0].label
  batch["s"][label] = batch["s"][label].at[4:].set(-1)  # there in part 0, not in the last
  new, logs = jax.jit(step)(state, batch)
  assert logs["active"].tolist() == [False, True, True] and float(logs["weights"][0]) == 0
  for leaf in jax.tree.leaves((new.params, logs)):
    assert np.isfinite(leaf).all() or leaf.dtype == jnp.int32


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) for name in ("sdmgrad", "moml", "forum")])
def test_eight_devices_are_one(name):
  some_tasks, balancer = make_tasks("s", "s"), balancing.get(name)
  _, _, _, model, _ = make(("s", "s"))
  statics = dict(model=model, tasks=some_tasks, balancer=balancer,
                 optimizer=optimizer("adam", 1e-2))
  batch, results = make_batch(some_tasks, size=48), []
  for devices in (1, 8):
    mesh = sharding.data_mesh(jax.devices()[:devices])
    step = sharding.sharded_step(functools.partial(mtl_jax.train_step, **statics), mesh)
    state = sharding.create_sharded(
        lambda: mtl_jax.create_train_state(0, batch, **statics), mesh)
    on_mesh = jax.device_put(batch, sharding.split(mesh))
    for _ in range(2):
      state, logs = step(state, on_mesh)
    results.append(jax.device_get((state.params, logs["weights"])))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *results)


@pytest.mark.slow
def test_amortised_methods_look_ahead_when_due():
  state, batch, step, _, _ = make(balancer=balancing.get("auto_lambda", every=2))
  jitted, weights = jax.jit(step), []
  for _ in range(4):
    state, logs = jitted(state, batch)
    weights.append(np.asarray(logs["weights"]))
  np.testing.assert_array_equal(weights[0], weights[1])
  np.testing.assert_array_equal(weights[2], weights[3])
  assert not np.array_equal(weights[1], weights[2])


def test_too_small_a_batch_is_named():
  state, batch, step, _, _ = make(balancer=balancing.modo())
  small = jax.tree.map(lambda x: x[:2], batch)
  with pytest.raises(ValueError, match="batch: expected at least 3 examples of each stream"):
    jax.eval_shape(step, state, small)


@pytest.mark.slow
def test_nothing_shared_needs_no_products():
  state, batch, step, _, _ = make(balancer=balancing.modo(), sharing="independent")
  _, logs = jax.jit(step)(state, batch)
  np.testing.assert_allclose(logs["weights"], np.full(3, 1 / 3), rtol=1e-6)
