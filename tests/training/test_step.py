"""The step against gradients taken the plain way."""

import functools

import flax.linen as nn
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax
from mtl_jax import balancing, models, tasks
from mtl_jax.training import penalties, sharding
from mtl_jax.training.optimizer import optimizer

SGD = optax.sgd(1.0)  # the update is minus the gradient
slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


class Trunk(nn.Module):
  """Two dense layers."""

  @nn.compact
  def __call__(self, images):
    x = images.reshape(images.shape[0], -1)
    return nn.tanh(nn.Dense(6, name="b")(nn.tanh(nn.Dense(5, name="a")(x))))


def make_tasks(*streams):
  """Tasks t0, t1, … in another order than that of their names."""
  made = [tasks.classification(f"t{i}", num_classes=3 + i, stream=stream, label=f"y{i}")
          for i, stream in enumerate(streams)]
  return (*made[1:], made[0])


def make_batch(some_tasks, size=8, missing=0.0):
  rng = np.random.default_rng(0)
  batch = {}
  for task in some_tasks:
    stream = batch.setdefault(task.stream, {})
    stream.setdefault("image", jnp.asarray(rng.normal(size=(size, 2, 2, 3)), jnp.float32))
    labels = rng.integers(0, task.num_outputs, size)
    labels[rng.random(size) < missing] = -1
    stream[task.label] = jnp.asarray(labels, jnp.int32)
  return batch


def make(streams=("s", "s", "s"), balancer=None, sharing="hard", trunk=None, opt=SGD,
         gradients="exact", **step):
  some_tasks = make_tasks(*streams)
  model = models.MultiTaskModel(
      sharing=models.SHARINGS[sharing](trunk or Trunk(), tuple(t.name for t in some_tasks)),
      heads={t.name: nn.Dense(t.num_outputs) for t in some_tasks},
      streams={t.name: t.stream for t in some_tasks})
  statics = dict(model=model, tasks=some_tasks, balancer=balancer or balancing.equal(),
                 optimizer=opt, gradients=gradients)
  batch = make_batch(some_tasks)
  state = jax.jit(lambda: mtl_jax.create_train_state(0, batch, **statics))()
  return state, batch, functools.partial(mtl_jax.train_step, **statics, **step), model, some_tasks


def loss_of(params, index, batch, model, some_tasks):
  outputs = model.apply({"params": params}, batch, train=True)
  return tasks.task_losses(some_tasks, outputs, batch)[0][index]


def plain_jacobian(state, batch, model, some_tasks):
  """Gradients of each loss with respect to all parameters, one `jax.grad` a task."""
  return [jax.grad(loss_of)(state.params, i, batch, model, some_tasks)
          for i in range(len(some_tasks))]


def gradient_taken(before, after):
  return jax.tree.map(jnp.subtract, before.params, after.params)


def assert_close(a, b, tolerance=2e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance), dict(a), dict(b))


@pytest.mark.parametrize("streams", [slow(("s", "s", "s")), ("s", "r", "r")])
@pytest.mark.parametrize("engine", ["exact", "features"])
def test_equal_weights_give_the_gradient_of_the_sum(streams, engine):
  state, batch, step, model, some_tasks = make(streams, gradients=engine)
  new, logs = jax.jit(step)(state, batch)
  rows = plain_jacobian(state, batch, model, some_tasks)
  assert_close(gradient_taken(state, new), jax.tree.map(lambda *g: sum(g), *rows))
  assert int(new.step) == 1 and np.isfinite(logs["gradient_norm"])


@pytest.mark.parametrize("streams", [("s", "s", "s"), ("s", "r", "r")])
def test_exact_gramian_is_that_of_the_shared_parameters(streams):
  state, batch, step, model, some_tasks = make(streams, balancing.mgda())
  new, logs = jax.jit(step)(state, batch)
  rows = plain_jacobian(state, batch, model, some_tasks)
  flat = np.stack([np.concatenate([np.ravel(x) for x in jax.tree.leaves(row["sharing"])])
                   for row in rows])
  np.testing.assert_allclose(logs["gramian"], flat @ flat.T, rtol=1e-4, atol=1e-6)
  taken = gradient_taken(state, new)
  shared = np.concatenate([np.ravel(x) for x in jax.tree.leaves(taken["sharing"])])
  np.testing.assert_allclose(shared, np.asarray(logs["weights"]) @ flat, atol=1e-6)
  for i, task in enumerate(some_tasks):  # heads get their own task's gradient, unweighted
    assert_close(taken[f"heads_{task.name}"], rows[i][f"heads_{task.name}"])


def test_exact_gradients_of_own_streams_take_the_operations_of_equal_weights():
  flops = {}
  for balancer in (balancing.equal(), balancing.mgda()):
    state, batch, step, *_ = make(("s", "r"), balancer, trunk=models.CNN(channels=(16,), width=16))
    # No more than go through the convolutions at once: what a loop does is counted once.
    batch = jax.tree.map(lambda x: jnp.concatenate([x] * 8), batch)
    flops[balancer.name] = jax.jit(step).lower(state, batch).cost_analysis()["flops"]
  assert flops["mgda"] < 1.15 * flops["equal"]


@pytest.mark.parametrize("streams", [("s", "s", "s"), ("s", "r", "r")])
def test_features_gramian_is_that_of_the_representation(streams):
  state, batch, step, model, some_tasks = make(streams, balancing.mgda(), gradients="features")
  _, logs = jax.jit(step)(state, batch)
  features = model.apply({"params": state.params}, batch, method="features")
  rows = []
  for i, task in enumerate(some_tasks):
    def loss(x, i=i, task=task):
      outputs = model.apply({"params": state.params}, {**features, task.name: x}, method="outputs")
      return tasks.task_losses(some_tasks, outputs, batch)[0][i]
    row = np.asarray(jax.grad(loss)(features[task.name]))
    rows.append(row.reshape(-1) if len(set(streams)) == 1 else row.sum(0))
  np.testing.assert_allclose(logs["gramian"], np.stack(rows) @ np.stack(rows).T, rtol=1e-4,
                             atol=1e-7)


def test_features_direction_is_pulled_back_once():
  balancer = balancing.graddrop(leak=1.0)  # keeps everything: the sum of the gradients
  state, batch, step, model, some_tasks = make(balancer=balancer, gradients="features")
  new, _ = jax.jit(step)(state, batch)
  rows = plain_jacobian(state, batch, model, some_tasks)
  assert_close(gradient_taken(state, new), jax.tree.map(lambda *g: sum(g), *rows))


def test_features_engine_refuses_a_direction_across_streams():
  state, batch, step, *_ = make(("s", "r"), balancing.graddrop(), gradients="features")
  with pytest.raises(ValueError, match="graddrop returns a direction.*use 'exact'"):
    step(state, batch)


def test_graddrop_exact_equals_aggregate():
  state, batch, step, model, some_tasks = make(balancer=balancing.graddrop())
  new, logs = jax.jit(step)(state, batch)
  taken = flatten_dict(gradient_taken(state, new)["sharing"])
  total = jax.tree.map(lambda *g: sum(g), *plain_jacobian(state, batch, model, some_tasks))
  for path, total_leaf in flatten_dict(total["sharing"]).items():
    kept = np.asarray(taken[path])
    assert np.isfinite(kept).all() and not np.allclose(kept, total_leaf)
  assert ((np.asarray(logs["weights"]) >= 0) & (np.asarray(logs["weights"]) <= 1)).all()


def test_fixed_weights_reach_the_heads():
  state, batch, step, model, some_tasks = make(balancer=balancing.fixed((2.0, 0.5, 1.0)))
  new, _ = jax.jit(step)(state, batch)
  rows = plain_jacobian(state, batch, model, some_tasks)
  expected = jax.tree.map(lambda a, b, c: 2 * a + 0.5 * b + c, *rows)
  assert_close(gradient_taken(state, new), expected)


@pytest.mark.parametrize("balancer", [
    slow(balancing.equal()), balancing.pcgrad(), slow(balancing.graddrop())])
def test_nothing_shared_equals_single_tasks(balancer):
  state, batch, step, model, some_tasks = make(("s", "r"), balancer, sharing="independent")
  new, logs = jax.jit(step)(state, batch)
  rows = plain_jacobian(state, batch, model, some_tasks)
  assert_close(gradient_taken(state, new), jax.tree.map(lambda *g: sum(g), *rows))
  assert np.ptp(logs["weights"]) == 0


@pytest.mark.parametrize("name", [
    *map(slow, ("equal", "fixed", "uncertainty")), "mgda", slow("pcgrad"), "graddrop"])
@pytest.mark.parametrize("engine", ["exact", "features"])
def test_a_task_without_labels_leaves_the_balance(name, engine):
  kwargs = {"fixed": {"weights": (1.0, 1.0, 1.0)}}.get(name, {})
  state, batch, step, _, some_tasks = make(balancer=balancing.get(name, **kwargs), gradients=engine)
  absent = [task.name for task in some_tasks].index("t1")
  batch["s"]["y1"] = jnp.full_like(batch["s"]["y1"], -1)
  new, logs = jax.jit(step)(state, batch)
  assert logs["active"].tolist() == [i != absent for i in range(3)]
  assert float(logs["weights"][absent]) == 0 and float(logs["losses"][absent]) == 0
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((new, logs)))
  assert_close(new.params["heads_t1"], state.params["heads_t1"], 0)


def test_missing_labels_equal_examples_left_out():
  state, batch, step, model, some_tasks = make()
  labels = batch["s"]["y0"]
  batch["s"]["y0"] = labels.at[5:].set(-1)
  new, logs = step(state, batch)
  short = {"s": {"image": batch["s"]["image"][:5], "y0": labels[:5], "y1": batch["s"]["y1"][:5],
                 "y2": batch["s"]["y2"][:5]}}
  index = [task.name for task in some_tasks].index("t0")
  head = jax.grad(loss_of)(state.params, index, short, model, some_tasks)["heads_t0"]
  assert_close(gradient_taken(state, new)["heads_t0"], head)
  assert int(logs["metrics"]["t0"]["accuracy"].count.low) == 5


def test_float_labels_missing_as_nan():
  losses, active = tasks.task_losses(
      (tasks.Task("a", "s", "y", lambda o, y: (o[:, 0] - y) ** 2, 1),),
      {"a": jnp.array([[1.0], [jnp.nan]])}, {"s": {"y": jnp.array([3.0, jnp.nan])}})
  assert losses.tolist() == [4.0] and active.tolist() == [True]


def test_task_weight_scales_the_loss_not_the_metric():
  task = tasks.classification("t0", num_classes=3, stream="s", label="y0", weight=3.0)
  outputs, batch = {"t0": jnp.zeros((2, 3))}, {"s": {"y0": jnp.array([0, 1])}}
  losses, _ = tasks.task_losses((task,), outputs, batch)
  metrics = tasks.compute_metrics((task,), tasks.task_metrics((task,), outputs, batch))
  np.testing.assert_allclose(losses, [3 * np.log(3)], rtol=1e-6)
  np.testing.assert_allclose(metrics["t0/loss"], np.log(3), rtol=1e-6)


def test_penalties_add_their_gradient_after_balancing():
  plain, batch, step, *_ = make()
  with_l2 = functools.partial(step, penalties={"l2": penalties.l2(0.5), "l1": penalties.l1(0.1)})
  a, _ = step(plain, batch)
  b, logs = with_l2(plain, batch)
  for path, x in flatten_dict(plain.params).items():
    extra = flatten_dict(a.params)[path] - flatten_dict(b.params)[path]
    expected = x + 0.1 * np.sign(x) if x.ndim > 1 else 0 * x
    np.testing.assert_allclose(extra, expected, atol=1e-5)
  kernels = [x for x in jax.tree.leaves(plain.params) if x.ndim > 1]
  np.testing.assert_allclose(logs["penalties"]["l2"], 0.5 * sum((x ** 2).sum() for x in kernels),
                             rtol=1e-5)


def test_batch_statistics_move_and_evaluation_uses_them():
  state, batch, step, model, some_tasks = make(trunk=models.ResNet(blocks=(1,), channels=4))
  new, _ = jax.jit(step)(state, batch)
  before, after = (jax.tree.leaves(s.model_state["batch_stats"]) for s in (state, new))
  assert all(not np.allclose(x, y) for x, y in zip(before, after))
  evaluate = functools.partial(mtl_jax.eval_step, model=model, tasks=some_tasks)
  whole = evaluate(new, batch)
  halves = [evaluate(new, jax.tree.map(lambda x: x[half], batch))  # noqa: B023
            for half in (slice(0, 4), slice(4, 8))]
  merged = tasks.merge_metrics(some_tasks, *halves)
  a, b = (tasks.compute_metrics(some_tasks, m) for m in (whole, merged))
  assert a == pytest.approx(b, rel=1e-6)
  assert a["t0/accuracy"] == b["t0/accuracy"]


def test_dropout_depends_on_seed_and_step_alone():
  some_tasks = make_tasks("s")
  model = models.MultiTaskModel(sharing=models.Hard(Trunk()), streams={"t0": "s"},
                                heads={"t0": models.MLP(3, hidden=(16,), dropout=0.5)})
  statics = dict(model=model, tasks=some_tasks, balancer=balancing.equal(), optimizer=SGD)
  batch = make_batch(some_tasks)
  state = mtl_jax.create_train_state(0, batch, **statics)
  step = jax.jit(functools.partial(mtl_jax.train_step, **statics))
  loss = lambda s: float(step(s, batch)[1]["losses"][0])
  assert loss(state) == loss(state)
  assert loss(state) != loss(state.replace(step=state.step + 1))
  assert loss(state) != loss(state.replace(seed=state.seed + jnp.uint32(1)))


@pytest.mark.parametrize("name, engine", [slow("equal", "exact"), ("pcgrad", "exact"),
                                          slow("mgda", "features")])
def test_one_device_equals_eight(name, engine):
  trunk = models.ResNet(blocks=(1,), channels=4)  # BatchNorm's statistics are global, too
  state, batch, step, *_ = make(("s", "r"), balancing.get(name), trunk=trunk,
                                opt=optimizer("adam", 1e-2), gradients=engine)
  results = []
  for devices in (jax.devices()[:1], jax.devices()):
    mesh = sharding.data_mesh(devices)
    current = jax.device_put(jax.tree.map(jnp.copy, state), sharding.replicated(mesh))
    run = sharding.sharded_step(step, mesh)
    for _ in range(3):
      current, logs = run(current, jax.device_put(batch, sharding.split(mesh)))
      jax.block_until_ready(current)
    results.append(jax.device_get((logs["losses"], logs["weights"], current.params)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), *results)


def test_many_steps_compile_once_and_donate():
  state, batch, step, *_ = make(opt=optimizer("adam", 1e-3))
  traces = []
  mesh = sharding.data_mesh(jax.devices()[:1])
  run = sharding.sharded_step(lambda s, b: (traces.append(1), step(s, b))[1], mesh)
  first = state = jax.device_put(state, sharding.replicated(mesh))
  for _ in range(3):
    state, _ = run(state, batch)
  assert len(traces) == 1
  assert jax.tree.leaves(first.params)[0].is_deleted()


def test_a_fresh_state_can_be_donated_whatever_the_balancer():
  """FAMO starts two parts of its state as the same zeros."""
  state, batch, step, *_ = make(balancer=balancing.famo())
  new, _ = jax.jit(step, donate_argnums=0)(state, batch)
  assert int(new.step) == 1


def test_resident_steps_in_one_call_equal_single_steps():
  state, batch, step, *_ = make(opt=optimizer("sgd", 0.1))
  mesh = sharding.data_mesh(jax.devices()[:1])
  data = {"factor": jnp.ones(())}
  batch_at = lambda data, state: {"s": {**batch["s"], "image": batch["s"]["image"] * (
      data["factor"] + state.step.astype(jnp.float32))}}
  ends = []
  for chunks in ((1, 1, 1, 1), (3, 1), (4,)):
    current, losses = jax.tree.map(jnp.copy, state), []
    for count in chunks:
      current, logs = sharding.sharded_resident_steps(step, batch_at, mesh, count)(current, data)
      assert logs["losses"].shape == (count, 3)
      losses.append(logs["losses"])
    ends.append((current.params, jnp.concatenate(losses)))
  for other in ends[1:]:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
                 ends[0], other)


def test_heads_and_tasks_must_match():
  state, batch, step, model, some_tasks = make()
  with pytest.raises(ValueError, match="one head for each task"):
    mtl_jax.create_train_state(0, batch, model=model, tasks=some_tasks[:2],
                               balancer=balancing.equal(), optimizer=SGD)


def test_a_stream_without_the_label_is_named():
  state, batch, step, *_ = make()
  del batch["s"]["y1"]
  with pytest.raises(ValueError, match="task t1: expected the label 'y1' in stream 's'"):
    step(state, batch)


def test_a_batch_that_does_not_divide_names_the_nearest():
  with pytest.raises(ValueError, match="multiple of the 8 devices, found 100; the nearest is 96 or 104"):
    sharding.check_divides(100, sharding.data_mesh())
  with pytest.raises(ValueError, match="found 3; the nearest is 8"):
    sharding.check_divides(3, sharding.data_mesh())


@pytest.mark.parametrize("engine", ["exact", slow("features")])
def test_amortised_weights_need_no_gradients_in_between(engine):
  """With `every=2` the second step uses the first one's weights, and sees no Gramian."""
  state, batch, step, *_ = make(balancer=balancing.get("mgda", every=2), gradients=engine)
  plain_state, _, plain, *_ = make(balancer=balancing.mgda(), gradients=engine)
  step = jax.jit(step)
  first, logs = step(state, batch)
  _, expected = plain(plain_state, batch)
  np.testing.assert_allclose(logs["weights"], expected["weights"], atol=1e-6)
  second, later = step(first, batch)
  np.testing.assert_array_equal(later["weights"], logs["weights"])
  assert np.isfinite(logs["gramian"]).all() and np.isnan(later["gramian"]).all()
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(second))


@pytest.mark.slow
def test_losses_after_the_step_are_those_of_the_new_parameters():
  seen = balancing.Balancer(
      "seen", lambda num_tasks: jnp.zeros(num_tasks),
      lambda signals, state: (balancing.Decision(jnp.ones(3)), state),
      frozenset({"losses", "losses_after_step"}),
      after_step=lambda losses, active, state: losses)
  state, batch, step, model, some_tasks = make(
      balancer=seen, trunk=models.ResNet(blocks=(1,), channels=4), opt=optax.sgd(0.1))
  new, _ = jax.jit(step)(state, batch)
  outputs, _ = model.apply({"params": new.params, **state.model_state}, batch, train=True,
                           mutable=["batch_stats"])
  np.testing.assert_allclose(new.balancer_state, tasks.task_losses(some_tasks, outputs, batch)[0],
                             rtol=1e-5)
  plain = make(trunk=models.ResNet(blocks=(1,), channels=4), opt=optax.sgd(0.1))
  expected, _ = plain[2](plain[0], batch)
  assert_close(new.model_state["batch_stats"], expected.model_state["batch_stats"])


@pytest.mark.parametrize("name", [slow("equal"), "mgda"])
def test_diagnosed_steps_see_the_exact_gramian(name):
  """Every second step, whatever the engine; and how far its weights are from the exact ones."""
  exact_state, batch, exact, *_ = make(balancer=balancing.mgda())
  _, expected = exact(exact_state, batch)
  state, _, step, *_ = make(balancer=balancing.get(name), gradients="features")
  step = jax.jit(functools.partial(step, diagnose_every=2))
  _, logs = step(state, batch)
  assert np.isnan(logs["gramian"]).all()
  _, logs = step(state.replace(step=state.step + 1), batch)
  np.testing.assert_allclose(logs["gramian"], expected["gramian"], rtol=1e-4, atol=1e-6)
  assert ("weights_error" in logs) == (name == "mgda")
  if name == "mgda":
    error = np.abs(np.asarray(logs["weights"]) - np.asarray(expected["weights"])).max()
    np.testing.assert_allclose(logs["weights_error"], error, atol=1e-4)
