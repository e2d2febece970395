"""Models whose heads read maps, vectors or both, alone and in a training step."""

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

SIZE = (4, 4)


class Small(models.Trunk):
  """Two maps and features, quick to compile."""

  stages = ("pixels", "coarse", "features")

  @nn.compact
  def stage(self, name, x, train=False):
    x = x.reshape(x.shape[0], -1) if name == "features" else x[:, ::2, ::2]
    return nn.tanh(nn.Dense(3, name=name)(x))


class Pixels(nn.Module):
  """A dense head on one map alone."""

  reads = "maps"

  @nn.compact
  def __call__(self, maps):
    return nn.Dense(2)(maps["pixels"].repeat(2, axis=1).repeat(2, axis=2))


class Features(nn.Module):
  """A trunk with features alone."""

  @nn.compact
  def __call__(self, images):
    return nn.Dense(4)(images.reshape(images.shape[0], -1))


class Sharing(nn.Module):
  """One of somebody's own, which knows nothing of maps."""

  trunk: nn.Module
  one_representation = True

  def __call__(self, images, streams, train):
    return {task: self.trunk(images[stream], train) for task, stream in streams.items()}

  def owner(self, path):
    return None


def dense_task(name, stream):
  loss = lambda outputs, labels: ((outputs - labels) ** 2).mean(axis=(1, 2, 3))
  return tasks.Task(name, stream, name, loss, 2)


def make_tasks(streams):
  """A classification "b" and dense tasks "c", "a": in another order than that of their names."""
  made = {"b": tasks.classification("b", num_classes=3, stream=streams["b"], label="b")}
  made |= {name: dense_task(name, streams[name]) for name in ("c", "a")}
  return tuple(made.values())


def make_model(streams, sharing="hard", trunk=None, **heads):
  heads = {"b": models.Linear(3), "c": models.Upsampling(2, SIZE, channels=3), "a": Pixels(),
           **heads}
  trunk = trunk or Small()
  return models.MultiTaskModel(sharing=models.SHARINGS[sharing](trunk, tuple(heads)), heads=heads,
                               streams=streams)


def make_batch(streams, size=3):
  rng = np.random.default_rng(0)
  batch = {stream: {"image": jnp.asarray(rng.normal(size=(size, *SIZE, 3)), jnp.float32)}
           for stream in sorted(set(streams.values()))}
  for name, stream in streams.items():
    batch[stream][name] = (jnp.asarray(rng.integers(0, 3, size), jnp.int32) if name == "b" else
                           jnp.asarray(rng.normal(size=(size, *SIZE, 2)), jnp.float32))
  return batch


ONE, TWO = {"b": "x", "c": "x", "a": "x"}, {"b": "x", "c": "y", "a": "y"}
STREAMS = [pytest.param(ONE, id="one"), pytest.param(TWO, id="two", marks=pytest.mark.slow)]


CNN = models.CNN(channels=(4, 3), width=5)
DENSE = {"c": models.Upsampling(2, SIZE, channels=4, skips=("conv1",)),
         "a": models.SemanticFPN(2, SIZE, channels=4)}


def filled(module, *args):
  """Parameters without compiling `init`."""
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype),
                      jax.eval_shape(lambda: module.init(jax.random.key(0), *args)))


def state_of(batch, **statics):
  state = jax.eval_shape(lambda: mtl_jax.create_train_state(0, batch, **statics))
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state).replace(
      params=filled(statics["model"], batch)["params"], task_weights=jnp.ones(len(statics["tasks"])))


def stepper(streams, balancer, gradients):
  batch = make_batch(streams)
  statics = dict(model=make_model(streams), tasks=make_tasks(streams), balancer=balancer,
                 optimizer=optax.sgd(1.0))
  step = jax.jit(functools.partial(mtl_jax.train_step, **statics, gradients=gradients))
  return state_of(batch, **statics), batch, step, statics["model"], statics["tasks"]


def jacobian_of(state, batch, model, some_tasks):
  return jax.jit(jax.jacrev(lambda params: tasks.task_losses(
      some_tasks, model.apply({"params": params}, batch, train=True), batch)[0]))(state.params)


@functools.cache
def plain_jacobian(two):
  """The tasks' gradients taken the plain way; `stepper` always starts from the same state."""
  state, batch, _, model, some_tasks = stepper(TWO if two else ONE, balancing.equal(), "exact")
  return jacobian_of(state, batch, model, some_tasks)


def assert_close(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


@pytest.mark.parametrize("sharing, trunk, heads", [("hard", CNN, DENSE), ("independent", None, {})])
def test_owner_tells_whose_loss_a_parameter_moves(sharing, trunk, heads):
  model, batch = make_model(TWO, sharing, trunk, **heads), make_batch(TWO)
  params = filled(model, batch)["params"]
  moved = jax.jit(jax.jacrev(lambda p: jnp.stack([(out ** 2).sum() for out in model.apply(
      {"params": p}, batch).values()])))(params)
  order = list(model.heads)
  for path, rows in flatten_dict(moved).items():
    owner = model.owner(path)
    reached = {order[i] for i in range(3) if np.abs(rows[i]).sum() > 0}
    assert reached <= ({owner} if owner else set(order)), path
    if path[0].startswith("heads_"):
      assert reached == {owner} or path[-1] == "bias", path
    elif path[-2] in ("dense", "features"):  # behind the maps: only one head reads features
      assert reached == ({"b"} & {owner or "b"}), path
    elif path[-2] in ("conv1", "pixels"):
      assert reached == ({owner} if owner else set(order)), path


@pytest.mark.parametrize("sharing", ["hard", "independent"])
def test_each_head_gets_what_it_reads(sharing):
  model, batch = make_model(TWO, sharing, CNN, **DENSE), make_batch(TWO)
  variables = filled(model, batch)

  @jax.jit
  def run(variables):
    outputs, expected = model.apply(variables, batch), {}
    for task, head in model.heads.items():
      trunk = "trunk" if sharing == "hard" else f"trunks_{task}"
      maps = CNN.apply(
          {"params": variables["params"]["sharing"][trunk]}, batch[TWO[task]]["image"],
          method="maps")
      expected[task] = head.apply({"params": variables["params"][f"heads_{task}"]},
                                  maps["features"] if task == "b" else maps)
    return outputs, expected

  assert_close(*run(variables))


def test_heads_that_read_features_leave_no_trace_of_maps():
  """A sharing that knows nothing of maps serves, and its features are arrays."""
  model = models.MultiTaskModel(sharing=Sharing(models.CNN(channels=(4,), width=5)),
                                heads={"b": models.Linear(3)}, streams={"b": "x"})
  batch = make_batch({"b": "x"})
  variables = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))
  features = jax.eval_shape(lambda v: model.apply(v, batch, method="features"), variables)
  assert features["b"].shape == (3, 5)


def test_a_trunk_without_stages_has_no_maps():
  model = make_model(ONE, trunk=Features())
  with pytest.raises(ValueError, match="Features: expected a trunk whose stages have maps"):
    jax.eval_shape(lambda: model.init(jax.random.key(0), make_batch(ONE)))


def test_a_head_reads_features_or_maps():
  class Odd(nn.Module):
    reads = "layer4"
  model = models.MultiTaskModel(sharing=models.Hard(models.CNN()), heads={"b": Odd()})
  with pytest.raises(ValueError, match="Odd: reads: expected 'features' or 'maps', found 'layer4'"):
    model.init(jax.random.key(0), make_batch({"b": "b"}))


def test_heads_see_the_stages_in_order_throughout_a_step():
  seen = []

  class Watching(nn.Module):
    reads = "maps"

    @nn.compact
    def __call__(self, maps):
      seen.append(tuple(maps))
      return nn.Dense(2)(maps["stem"])

  trunk = models.ResNet(blocks=(1,), channels=2)  # "layer1" sorts before "stem"
  model = models.MultiTaskModel(sharing=models.Hard(trunk), heads={"a": Watching()},
                                streams={"a": "x"})
  batch = make_batch({"a": "x"})
  statics = dict(model=model, tasks=(dense_task("a", "x"),), balancer=balancing.equal(),
                 optimizer=optax.sgd(0.1))
  jax.eval_shape(lambda: mtl_jax.train_step(mtl_jax.create_train_state(0, batch, **statics), batch,
                                            **statics))
  assert len(seen) > 1 and set(seen) == {trunk.stages}


@pytest.mark.parametrize("streams", STREAMS)
def test_both_engines_give_the_gradient_of_the_sum(streams):
  taken = {}
  for engine in ("exact", "features"):
    state, batch, step, *_ = stepper(streams, balancing.equal(), engine)
    new, logs = step(state, batch)
    taken[engine] = jax.tree.map(jnp.subtract, state.params, new.params)
    assert logs["finite"].all() and logs["losses"].shape == (3,)
  assert_close(taken["exact"], taken["features"])
  rows = plain_jacobian(streams is TWO)
  assert_close(taken["exact"], jax.tree.map(lambda x: x.sum(axis=0), rows))


@pytest.mark.slow
def test_exact_weights_are_those_of_the_shared_parameters():
  state, batch, step, _, some_tasks = stepper(TWO, balancing.mgda(), "exact")
  new, logs = step(state, batch)
  rows = plain_jacobian(two=True)
  flat = np.concatenate([x.reshape(3, -1) for x in jax.tree.leaves(rows["sharing"])], axis=1)
  np.testing.assert_allclose(logs["gramian"], flat @ flat.T, rtol=1e-3, atol=1e-5)
  taken = jax.tree.map(jnp.subtract, state.params, new.params)
  weights = np.asarray(logs["weights"])
  assert_close(taken["sharing"], jax.tree.map(lambda x: np.tensordot(weights, x, 1),
                                              rows["sharing"]))
  for i, task in enumerate(some_tasks):
    assert_close(taken[f"heads_{task.name}"],
                 jax.tree.map(lambda x: x[i], rows[f"heads_{task.name}"]))  # noqa: B023


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.slow
def test_features_gramian_is_over_all_maps(streams):
  state, batch, step, model, some_tasks = stepper(streams, balancing.mgda(), "features")
  _, logs = step(state, batch)

  @jax.jit
  def row_of(params):
    features = model.apply({"params": params}, batch, method="features", train=True)
    def losses(features):
      outputs = model.apply({"params": params}, features, method="outputs", train=True)
      return tasks.task_losses(some_tasks, outputs, batch)[0]
    return jax.jacrev(losses)(features)

  jacobian = row_of(state.params)
  rows = []
  for i, task in enumerate(some_tasks):
    leaves = [np.asarray(x[i]) for x in jax.tree.leaves(jacobian[task.name])]
    rows.append(np.concatenate([
        np.ravel(x if len(set(streams.values())) == 1 else x.sum(axis=0)) for x in leaves]))
  np.testing.assert_allclose(logs["gramian"], np.stack(rows) @ np.stack(rows).T, rtol=1e-4,
                             atol=1e-6)


def test_a_direction_in_the_space_of_maps_is_pulled_back_once():
  balancer = balancing.graddrop(leak=1.0)  # keeps everything: the sum of the gradients
  state, batch, step, *_ = stepper(ONE, balancer, "features")
  new, _ = step(state, batch)
  rows = plain_jacobian(two=False)
  assert_close(jax.tree.map(jnp.subtract, state.params, new.params),
               jax.tree.map(lambda x: x.sum(axis=0), rows))


def test_maps_of_different_sizes_cannot_be_compared():
  trunk = models.ResNet(blocks=(1,), channels=4)
  model = models.MultiTaskModel(
      sharing=models.Hard(trunk), streams={"a": "x", "c": "y"},
      heads={"a": models.Upsampling(2, (8, 8)), "c": models.Upsampling(2, (6, 6))})
  batch = {stream: {"image": jnp.zeros((2, side, side, 3)), task: jnp.zeros((2, side, side, 2))}
           for stream, task, side in (("x", "a", 8), ("y", "c", 6))}
  statics = dict(model=model, tasks=(dense_task("a", "x"), dense_task("c", "y")),
                 balancer=balancing.mgda(), optimizer=optax.sgd(0.1))
  state = jax.eval_shape(lambda: mtl_jax.create_train_state(0, batch, **statics))
  run = lambda engine: jax.eval_shape(
      lambda s: mtl_jax.train_step(s, batch, gradients=engine, **statics), state)
  assert run("exact")[1]["gramian"].shape == (2, 2)
  with pytest.raises(ValueError, match="maps of one size for all tasks, found.*use 'exact'"):
    run("features")


def test_a_loss_that_is_not_finite_is_named():
  state, batch, step, *_ = stepper(ONE, balancing.equal(), "exact")
  head = state.params["heads_c"]
  head["output"]["kernel"] = jnp.full_like(head["output"]["kernel"], jnp.nan)
  _, logs = step(state, batch)
  assert logs["finite"].tolist() == [True, False, True]


@pytest.mark.parametrize("engine", ["exact", "features"])
@pytest.mark.parametrize("streams", [("x", "x"), ("x", "y")], ids=["one", "two"])
def test_vectors_train_as_images_do(streams, engine):
  some_tasks = tuple(tasks.classification(f"t{i}", num_classes=3, stream=stream, label=f"t{i}")
                     for i, stream in enumerate(streams))
  rng = np.random.default_rng(0)
  batch = {}
  for task in some_tasks:
    stream = batch.setdefault(task.stream, {})
    stream.setdefault("image", jnp.asarray(rng.normal(size=(4, 6)), jnp.float32))
    stream[task.label] = jnp.asarray(rng.integers(0, 3, 4), jnp.int32)
  model = models.MultiTaskModel(sharing=models.Hard(models.MLPTrunk(widths=(5, 4))),
                                heads={task.name: models.Linear(3) for task in some_tasks},
                                streams={task.name: task.stream for task in some_tasks})
  statics = dict(model=model, tasks=some_tasks, balancer=balancing.equal(),
                 optimizer=optax.sgd(1.0))
  state = state_of(batch, **statics)
  new, _ = jax.jit(functools.partial(mtl_jax.train_step, gradients=engine, **statics))(state, batch)
  rows = jacobian_of(state, batch, model, some_tasks)
  assert_close(jax.tree.map(jnp.subtract, state.params, new.params),
               jax.tree.map(lambda x: x.sum(axis=0), rows))
