"""Trunks that each task adapts: at the start hard sharing, then the task's own."""

import flax.linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models

RESNET = models.ResNet(blocks=(), channels=2)
ONE, TWO = {"a": "x", "b": "x"}, {"a": "x", "b": "y"}
NAMES = ("film", "adapters", "lora", "task_norm")


def images_of(streams, side=4):
  rng = np.random.default_rng(0)
  return {stream: jnp.asarray(rng.normal(size=(2 + i, side, side, 3)), jnp.float32)
          for i, stream in enumerate(sorted(set(streams.values())))}


def hard_variables(trunk, images):
  """Random variables of hard sharing without compiling `init`; statistics are positive."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(lambda: models.Hard(trunk).init(
      jax.random.key(0), images, {"a": "x"}, False))
  values = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), dict(shapes))
  return {name: tree if name == "params" else jax.tree.map(jnp.abs, tree)
          for name, tree in values.items()}


def fresh(sharing, images, streams, hard):
  """A sharing's variables as they start, around the parameters of hard sharing."""
  variables = flatten_dict(jax.jit(lambda key: sharing.init(key, images, streams, False))(
      jax.random.key(0)))
  flat = flatten_dict({name: tree["trunk"] for name, tree in hard.items()})
  for path in variables:
    collection, place, *rest = path
    if (collection, *rest) in flat:  # shared, or a task's own copy of a norm layer
      variables[path] = flat[collection, *rest]
  return unflatten_dict(variables)


def run(sharing, variables, images, streams, train=False, maps=False):
  mutable = [name for name in variables if name != "params"]
  return jax.jit(lambda v: sharing.apply(v, images, streams, train, maps, mutable=mutable))(
      variables)


def assert_close(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


@pytest.mark.parametrize("train, streams", [(False, TWO), (True, ONE)], ids=["eval", "train"])
@pytest.mark.parametrize("name", NAMES)
def test_at_the_start_it_is_hard_sharing(name, train, streams):
  """With γ = 1 and β = 0, adapters and U at zero, equal norm layers; running statistics, too."""
  images = images_of(streams)
  hard = hard_variables(RESNET, images)
  sharing = models.SHARINGS[name](RESNET, ("a", "b"))
  found, state = run(sharing, fresh(sharing, images, streams, hard), images, streams, train, True)
  expected, expected_state = run(models.Hard(RESNET), hard, images, streams, train, True)
  assert_close(found, expected)
  assert list(found["a"]) == list(RESNET.stages)
  for kept in state["batch_stats"].values():  # of the trunk, or of each task
    assert_close(kept, expected_state["batch_stats"]["trunk"])


@pytest.mark.parametrize("streams", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize("name", ["film", "adapters"])
def test_each_stage_is_changed_before_the_next(name, streams):
  """Two dense stages against the formulas with numpy."""
  trunk = models.MLPTrunk(widths=(3, 2))
  rng = np.random.default_rng(3)
  images = {stream: jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
            for stream in set(streams.values())}
  sharing = models.SHARINGS[name](trunk, ("a", "b"))
  shapes = jax.eval_shape(lambda: sharing.init(jax.random.key(0), images, streams, False))
  variables = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])

  def changed(task, stage, x):
    if name == "film":
      own = params[f"films_{task}"]
      return x * own[f"{stage}_scale"] + own[f"{stage}_bias"]
    return x + x @ params[f"adapters_{task}"][stage]["kernel"]

  found, _ = run(sharing, variables, images, streams)
  for task, stream in streams.items():
    x = np.asarray(images[stream], np.float64)
    for layer, stage in (("dense1", "hidden1"), ("dense2", "features")):
      dense = params["trunk"][layer]
      x = changed(task, stage, np.maximum(x @ dense["kernel"] + dense["bias"], 0))
    np.testing.assert_allclose(found[task], x, rtol=1e-4, atol=1e-5)


def test_film_and_adapters_normalise_all_tasks_together():
  """One update of the running statistics a step, of all streams, as in hard sharing."""
  images = images_of(TWO)
  hard = hard_variables(RESNET, images)
  expected, expected_state = run(models.Hard(RESNET), hard, images, TWO, train=True)
  sharing = models.FiLM(RESNET, ("a", "b"))
  found, state = run(sharing, fresh(sharing, images, TWO, hard), images, TWO, train=True)
  assert_close((found, state["batch_stats"]), (expected, expected_state["batch_stats"]))


@pytest.mark.parametrize("rank, alpha", [(1, 2.0), (9, 4.0)])
def test_lora_adds_alpha_over_rank_of_its_product(rank, alpha):
  """Each task is the trunk with kernels W + α/r · D U; a rank beyond the smaller side is that."""
  images = images_of(TWO)
  trunk = models.CNN(channels=(4,), width=3)
  sharing = models.LoRA(trunk, ("a", "b"), rank=rank, alpha=alpha)
  shapes = jax.eval_shape(lambda: sharing.init(jax.random.key(0), images, TWO, False))
  rng = np.random.default_rng(5)
  variables = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
  params = variables["params"]
  assert params["own_a"]["conv1"]["down"].shape == (27, min(rank, 4))
  found, _ = run(sharing, variables, images, TWO)
  for task, stream in TWO.items():
    changed = jax.tree.map(jnp.copy, params["trunk"])
    for layer, own in params[f"own_{task}"].items():
      product = np.asarray(own["down"], np.float64) @ np.asarray(own["up"], np.float64)
      delta = alpha / own["down"].shape[1] * product
      kernel = params["trunk"][layer]["kernel"]
      changed[layer]["kernel"] = kernel + jnp.asarray(delta.reshape(kernel.shape), jnp.float32)
    assert_close(found[task], trunk.apply({"params": changed}, images[stream]))


def test_lora_starts_random_below_and_zero_above():
  images = {"x": jnp.zeros((1, 100))}
  sharing = models.LoRA(models.MLPTrunk(widths=(50,)), ("a", "b"), rank=10)
  params = jax.jit(lambda key: sharing.init(key, images, ONE, False))(jax.random.key(0))["params"]
  down = {task: np.asarray(params[f"own_{task}"]["dense1"]["down"]) for task in "ab"}
  assert not np.allclose(down["a"], down["b"])
  np.testing.assert_allclose(down["a"].std(), 0.1, rtol=0.1)  # 1000 numbers: ± 2.2 %
  assert not np.any(params["own_a"]["dense1"]["up"])


def test_task_norm_normalises_each_task_by_its_own_images():
  """Streams that differ in scale and shift alone come out equal, which shared statistics miss."""
  x = images_of(ONE)["x"]
  images = {"x": x, "y": 3.0 * x + 2.0}
  trunk = models.ResNet(blocks=(), channels=3)
  hard = hard_variables(trunk, images)
  for sharing, equal in ((models.TaskNorm(trunk, ("a", "b")), True), (models.Hard(trunk), False)):
    variables = hard if not equal else fresh(sharing, images, TWO, hard)
    # Away from the padding the convolution of the shifted image is the scaled one plus a constant.
    variables["params"]["trunk"]["conv1"]["kernel"] = jnp.zeros((3, 3, 3, 3)).at[1, 1].set(
        jnp.eye(3))
    found, state = run(sharing, variables, images, TWO, train=True)
    assert np.allclose(found["a"], found["b"], atol=1e-4) == equal
  assert set(jax.eval_shape(lambda: models.TaskNorm(trunk, ("a", "b")).init(
      jax.random.key(0), images, TWO, False))["batch_stats"]) == {"own_a", "own_b"}


def test_task_norm_finds_the_norm_layers_of_a_transformer():
  sharing = models.TaskNorm(models.ViT(width=4, depth=1, num_heads=1), ("a",))
  params = jax.eval_shape(lambda: sharing.init(
      jax.random.key(0), {"x": jnp.zeros((1, 4, 4, 3))}, {"a": "x"}, False))["params"]
  own = {"/".join(path) for path in flatten_dict(params["own_a"])}
  assert own == {f"{norm}/{leaf}" for norm in ("block1/norm1", "block1/norm2", "norm")
                 for leaf in ("scale", "bias")}
  assert {"positions", "embedding", "block1"} == set(params["trunk"])


class Plain(nn.Module):
  """A trunk without stages, norm layers and kernels."""

  @nn.compact
  def __call__(self, images):
    return images.mean(axis=(1, 2)) * self.param("factor", nn.initializers.ones, (1, 3))


@pytest.mark.parametrize("name, message", [
    ("film", "film: expected a trunk that names its stages, found Plain"),
    ("adapters", "adapters: expected a trunk that names its stages, found Plain"),
    ("lora", r"lora: expected a trunk with parameters named 'kernel', found \['factor'\]"),
    ("task_norm", "task_norm: expected a trunk with norm layers"),
])
def test_what_does_not_fit_is_said(name, message):
  with pytest.raises(ValueError, match=message):
    sharing = models.SHARINGS[name](Plain(), ("a", "b"))
    jax.eval_shape(lambda: sharing.init(jax.random.key(0), images_of(ONE), ONE, False))
  with pytest.raises(ValueError, match="lora: rank: expected at least 1, found 0"):
    models.LoRA(RESNET, ("a",), rank=0)
