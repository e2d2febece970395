"""Trunks stage by stage: parts that add up to the whole, and names that stay."""

import functools
import math

import flax.linen as nn
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models

TRUNKS = {
    "cnn": models.CNN(channels=(4, 6), width=5),
    "resnet18": models.ResNet(blocks=(1, 2), channels=4),
    "vit": models.ViT(patch=4, width=8, depth=2, num_heads=2),
    "mlp": models.MLPTrunk(widths=(7, 6, 5)),
}
SHAPES = {  # of images [1, 12, 8, 3], but for the batch
    "cnn": {"conv1": (6, 4, 4), "conv2": (3, 2, 6), "features": (5,)},
    "resnet18": {"stem": (12, 8, 4), "layer1": (12, 8, 4), "layer2": (6, 4, 8), "features": (8,)},
    "vit": {"patches": (3, 2, 8), "block1": (3, 2, 8), "block2": (3, 2, 8), "features": (8,)},
    "mlp": {"hidden1": (7,), "hidden2": (6,), "features": (5,)},
}
# Modules of torchvision's resnet18, dots as "_" before the block's number and "/" behind it.
RESNET18 = """
  conv1 bn1
  layer1_0/conv1 layer1_0/bn1 layer1_0/conv2 layer1_0/bn2
  layer1_1/conv1 layer1_1/bn1 layer1_1/conv2 layer1_1/bn2
  layer2_0/conv1 layer2_0/bn1 layer2_0/conv2 layer2_0/bn2
  layer2_0/downsample_0 layer2_0/downsample_1
  layer2_1/conv1 layer2_1/bn1 layer2_1/conv2 layer2_1/bn2
  layer3_0/conv1 layer3_0/bn1 layer3_0/conv2 layer3_0/bn2
  layer3_0/downsample_0 layer3_0/downsample_1
  layer3_1/conv1 layer3_1/bn1 layer3_1/conv2 layer3_1/bn2
  layer4_0/conv1 layer4_0/bn1 layer4_0/conv2 layer4_0/bn2
  layer4_0/downsample_0 layer4_0/downsample_1
  layer4_1/conv1 layer4_1/bn1 layer4_1/conv2 layer4_1/bn2
""".split()


def waves(shape):
  return jnp.cos(jnp.arange(math.prod(shape), dtype=jnp.float32)).reshape(shape)


def shapes(module, *args, **kwargs):
  return jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))


def filled(module, *args, **kwargs):
  """Variables without compiling `init`: random parameters, statistics of one."""
  rng = np.random.default_rng(0)
  return {collection: jax.tree.map(
      lambda x: (jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype)
                 if collection == "params" else jnp.ones(x.shape, x.dtype)), tree)  # noqa: B023
          for collection, tree in shapes(module, *args, **kwargs).items()}


def paths(variables):
  return {"/".join(path) for path in flatten_dict(variables["params"])}


def test_names_of_parameters_stay():
  images = jnp.zeros((1, 32, 32, 3))
  assert paths(shapes(models.CNN(), images)) == {
      "conv1/kernel", "conv1/bias", "conv2/kernel", "conv2/bias", "dense/kernel", "dense/bias"}
  variables = shapes(models.resnet18(), images)
  assert paths(variables) == {
      f"{module}/{leaf}" for module in RESNET18
      for leaf in (("scale", "bias") if "bn" in module or module.endswith("downsample_1")
                   else ("kernel",))}
  assert paths(shapes(TRUNKS["mlp"], images)) == {
      f"dense{i}/{leaf}" for i in (1, 2, 3) for leaf in ("kernel", "bias")}


# Written down from the networks before they had stages, with all parameters waves.
@pytest.mark.parametrize("trunk, features", [
    (models.CNN(channels=(4, 6), width=3), [[0.73208475, 0, 0], [0, 0, 0]]),
    (models.ResNet(blocks=(1, 2), channels=2),
     [[10.300848, 5.0881953, 4.4596210, 10.498149], [11.455044, 5.6825404, 4.6673427, 11.482535]]),
    (models.ResNet(blocks=(1, 1), channels=2, stem="imagenet"),
     [[2.9459321, 0, 1.5387203, 3.2670012], [3.3758569, 0.25494769, 1.1926590, 3.5331078]]),
])
def test_features_stay(trunk, features):
  images = waves((2, 9, 7, 3))
  variables = filled(trunk, images)
  variables["params"] = jax.tree.map(lambda x: waves(x.shape), variables["params"])
  found = jax.jit(trunk.apply)(variables, images)
  np.testing.assert_allclose(found, features, rtol=1e-5, atol=1e-5)


def test_the_reference_network_is_made_of_linens_layers():
  class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
      for i, channels in enumerate((4, 6)):
        x = nn.relu(nn.Conv(channels, (3, 3), name=f"conv{i + 1}")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
      return nn.relu(nn.Dense(3, name="dense")(x.reshape(x.shape[0], -1)))

  images = waves((5, 10, 9, 3))
  ours, theirs = models.CNN(channels=(4, 6), width=3), Plain()
  variables = theirs.init(jax.random.key(1), images)
  jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(1), images), variables)
  variables = jax.tree.map(lambda x: waves(x.shape), variables)
  a, b = (jax.jit(jax.value_and_grad(lambda v, m=m: (m.apply(v, images) ** 2).sum()))(variables)
          for m in (ours, theirs))
  assert b[0] > 0
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), a, b)


@pytest.mark.parametrize("name, train", [("cnn", False), ("resnet18", True), ("vit", False),
                                         ("mlp", False)])
def test_blocks_add_up_to_stages_and_these_to_the_whole(name, train):
  images, trunk = waves((2, 12, 8, 3)), TRUNKS[name]

  @jax.jit
  def run(variables):
    apply = functools.partial(trunk.apply, variables, mutable=["batch_stats"])
    whole, maps = apply(images, train=train), apply(images, train=train, method="maps")
    x, steps = images, []
    for stage in trunk.stages:
      for block in trunk.blocks_of(stage):
        x, stats = apply(block, x, train, method="stage")
      steps.append((x, stats))
    return whole, maps, steps

  (whole, stats), (maps, map_stats), steps = run(filled(trunk, images))
  assert tuple(maps) == trunk.stages == tuple(SHAPES[name])  # in order, also out of jit
  assert {stage: x.shape for stage, x in maps.items()} == {
      stage: (2, *shape) for stage, shape in SHAPES[name].items()}
  np.testing.assert_array_equal(maps["features"], whole)
  jax.tree.map(np.testing.assert_array_equal, stats, map_stats)
  for stage, (x, _) in zip(trunk.stages, steps):
    np.testing.assert_allclose(x, maps[stage], rtol=1e-5, atol=1e-6)
  assert jax.tree.leaves(stats) or name != "resnet18"


@pytest.mark.parametrize("name, stage, kept", [
    ("cnn", "conv2", {"conv2"}), ("cnn", "features", {"dense"}),
    ("resnet18", "stem", {"bn1", "conv1"}),
    ("resnet18", "layer2", {"layer2_0", "layer2_1"}), ("resnet18", "layer2_0", {"layer2_0"}),
    ("vit", "block2", {"block2"}), ("mlp", "hidden2", {"dense2"})])
def test_a_stage_alone_has_its_own_parameters_only(name, stage, kept):
  trunk = TRUNKS[name]
  x = jnp.zeros((1, *SHAPES[name].get(dict(zip(trunk.stages[1:], trunk.stages)).get(stage),
                                      (12, 8, 3))))
  assert set(shapes(trunk, stage, x, method="stage")["params"]) == kept


class Branched(nn.Module):
  """Hard sharing with a branch point: early stages of one trunk, late ones of a clone a task."""

  trunk: nn.Module

  def setup(self):
    self.branches = {task: self.trunk.clone(parent=None, name=None) for task in "ab"}

  def __call__(self, images):
    x = self.trunk.stage(self.trunk.stages[0], images, False)
    ends = {}
    for task, branch in self.branches.items():
      ends[task] = x
      for stage in branch.stages[1:]:
        ends[task] = branch.stage(stage, ends[task], False)
    return ends


@pytest.mark.parametrize("name", TRUNKS)
def test_clones_work_side_by_side_each_in_part(name):
  images, module = waves((2, 12, 8, 3)), Branched(TRUNKS[name])
  variables = filled(module, images)
  params = variables["params"]
  assert not set(params["trunk"]) & set(params["branches_a"])
  assert set(params["branches_a"]) == set(params["branches_b"])

  @jax.jit
  def run(variables):
    wholes = {task: TRUNKS[name].apply(
        {collection: {**tree["trunk"], **tree.get(f"branches_{task}", {})}
         for collection, tree in variables.items()}, images) for task in "ab"}
    return module.apply(variables, images), wholes

  ends, wholes = run(variables)
  assert not np.allclose(ends["a"], ends["b"])
  for task in "ab":
    np.testing.assert_allclose(ends[task], wholes[task], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TRUNKS)
def test_an_unknown_stage_is_named(name):
  with pytest.raises(ValueError, match=r"stage: expected one of \[.*'features'\], found 'layer9'"):
    shapes(TRUNKS[name], "layer9", jnp.zeros((1, 12, 8, 3)), method="stage")


@pytest.mark.parametrize("name", ["layer2_9", "stem_0", "features_0"])
def test_an_unknown_block_is_named(name):
  with pytest.raises(ValueError, match=f"stage: expected one of .*, found '{name}'"):
    shapes(TRUNKS["resnet18"], name, jnp.zeros((1, 12, 8, 3)), method="stage")


@pytest.mark.parametrize("name", ["cnn", "resnet18", "vit"])
def test_vectors_are_for_the_mlp(name):
  with pytest.raises(ValueError, match=rf"{name}: images: expected \[B, H, W, C\], found \[2, 5\]"):
    shapes(TRUNKS[name], jnp.zeros((2, 5)))


def test_vit_has_the_parameters_of_vit_tiny():
  """timm's vit_tiny_patch16_224: 5,717,416 with 193,000 of its classifier, 384 of a class token."""
  params = shapes(models.ViT(patch=16), jnp.zeros((1, 224, 224, 3)))["params"]
  assert sum(x.size for x in jax.tree.leaves(params)) == 5_717_416 - 193_000 - 384


def numpy_block(params, x, num_heads):
  """A pre-norm transformer block on tokens [N, D], written with numpy alone."""
  def norm(x, p):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * p["scale"] + p["bias"]

  y, attention = norm(x, params["norm1"]), params["attention"]
  q, k, v = (np.einsum("nd,dhe->hne", y, attention[part]["kernel"])
             + attention[part]["bias"][:, None] for part in ("query", "key", "value"))
  scores = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(x.shape[1] / num_heads))
  y = scores / scores.sum(-1, keepdims=True) @ v
  x = x + np.einsum("hne,hed->nd", y, attention["out"]["kernel"]) + attention["out"]["bias"]
  y = norm(x, params["norm2"]) @ params["dense1"]["kernel"] + params["dense1"]["bias"]
  y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y ** 3)))
  return x + y @ params["dense2"]["kernel"] + params["dense2"]["bias"]


def test_a_transformer_block_is_the_papers():
  x = np.random.default_rng(5).normal(size=(2, 3, 2, 8)).astype(np.float32)
  variables = filled(TRUNKS["vit"], "block1", x, method="stage")
  found = jax.jit(lambda v: TRUNKS["vit"].apply(v, "block1", x, method="stage"))(variables)
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"]["block1"])
  for grid, tokens in zip(found, x.astype(np.float64).reshape(2, 6, 8)):
    np.testing.assert_allclose(grid.reshape(6, 8), numpy_block(params, tokens, 2), rtol=1e-4,
                               atol=1e-5)


def test_patches_are_a_set_but_for_their_positions():
  images = np.random.default_rng(1).normal(size=(2, 12, 8, 3)).astype(np.float32)
  variables = filled(TRUNKS["vit"], images)
  order = np.array([4, 2, 0, 5, 1, 3])

  def permuted(x, side):  # patches of side x side pixels among 3 x 2
    rows = x.reshape(2, 3, side, 2, side, -1).swapaxes(2, 3).reshape(2, 6, side, side, -1)[:, order]
    return rows.reshape(2, 3, 2, side, side, -1).swapaxes(2, 3).reshape(x.shape)

  run = jax.jit(functools.partial(TRUNKS["vit"].apply, method="maps"))
  assert not np.allclose(run(variables, images)["features"],
                         run(variables, permuted(images, 4))["features"], atol=1e-4)
  variables["params"]["positions"] = jnp.zeros_like(variables["params"]["positions"])
  a, b = run(variables, images), run(variables, permuted(images, 4))
  np.testing.assert_allclose(permuted(a["block2"], 1), b["block2"], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(a["features"], b["features"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trunk", [models.ViT(patch=4, width=8, depth=1, num_heads=2, dropout=0.5),
                                   models.MLPTrunk(widths=(8,), dropout=0.5)])
def test_dropout_is_for_training(trunk):
  images = waves((2, 8, 8, 3))
  variables = filled(trunk, images)
  run = jax.jit(lambda variables, key: trunk.apply(variables, images, train=True,
                                                   rngs={"dropout": key}))
  assert not np.allclose(run(variables, jax.random.key(1)), run(variables, jax.random.key(2)))
  quiet = jax.make_jaxpr(lambda: trunk.apply(variables, images, train=False))()
  assert "random" not in str(quiet)


@pytest.mark.parametrize("fields, size, message", [
    ({}, (12, 10), "sides that patches of 4 pixels divide, found 12x10"),
    ({"num_heads": 5}, (8, 8), "num_heads: expected a divisor of the width 192, found 5"),
    ({"dropout": 1.0}, (8, 8), r"dropout: expected a rate in \[0, 1\), found 1.0"),
])
def test_vit_says_what_does_not_fit(fields, size, message):
  with pytest.raises(ValueError, match=message):
    shapes(models.ViT(depth=1, **fields), jnp.zeros((1, *size, 3)))


def test_vit_has_positions_for_one_size():
  sharing = models.Hard(models.ViT(depth=0, width=6))
  images = {"x": jnp.zeros((1, 8, 8, 3)), "y": jnp.zeros((1, 8, 12, 3))}
  with pytest.raises(ValueError, match="expected 2x2 patches, as the positions are for, found 2x3"):
    shapes(sharing, images, {"a": "x", "b": "y"}, False)


@pytest.mark.parametrize("fields, message", [
    ({"widths": ()}, "widths: expected at least one layer"),
    ({"dropout": -0.1}, r"dropout: expected a rate in \[0, 1\), found -0.1")])
def test_mlp_says_what_does_not_fit(fields, message):
  with pytest.raises(ValueError, match=f"mlp: {message}"):
    shapes(models.MLPTrunk(**fields), jnp.zeros((1, 4)))
