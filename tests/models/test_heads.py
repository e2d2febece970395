"""Heads on maps, and the one that gives cosines."""

from collections import OrderedDict

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models
from mtl_jax.models.heads import pyramid


def maps_of(*sizes, channels=3, batch=2):
  """Maps with numbers that are all their own, and features, in the order of a trunk's stages."""
  rng = np.random.default_rng(0)
  maps = OrderedDict(
      (f"s{i}", jnp.asarray(rng.normal(size=(batch, *size, channels + i)), jnp.float32))
      for i, size in enumerate(sizes))
  maps["features"] = jnp.ones((batch, 4))
  return maps


RESNET_LIKE = [(11, 9), (11, 9), (6, 5), (3, 3), (2, 2)]  # a stem and four layers, odd sizes
VIT_LIKE = [(3, 2)] * 3
VECTORS = OrderedDict(hidden1=jnp.ones((2, 5)), features=jnp.ones((2, 4)))


def shapes(module, inputs):
  return jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), inputs))


def initialised(module, inputs):
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype),
                      shapes(module, inputs)[1])


@pytest.mark.parametrize("sizes, levels, expected", [
    (RESNET_LIKE, None, {"s1": (11, 9), "s2": (6, 5), "s3": (3, 3), "s4": (2, 2)}),
    (RESNET_LIKE, ("s0", "s3"), {"s0": (11, 9), "s3": (3, 3)}),
    (VIT_LIKE, None, {"s2": (3, 2)}),
    (VIT_LIKE, ("s0", "s2"), {"s0": (3, 2), "s2": (3, 2)}),
])
def test_pyramid_has_one_width_on_every_level(sizes, levels, expected):
  found, _ = shapes(models.FeaturePyramid(8, levels), maps_of(*sizes))
  assert list(found) == list(expected)
  assert {stage: x.shape for stage, x in found.items()} == {
      stage: (2, *size, 8) for stage, size in expected.items()}


def test_pyramid_adds_the_nearest_coarser_numbers():
  """By hand: one channel, lateral weights 1, a 3x3 kernel with nothing but a centre of 10."""
  coarse, fine = np.array([[1.0, 2.0], [3.0, 4.0]]), np.arange(9.0).reshape(3, 3)
  maps = OrderedDict(fine=jnp.asarray(fine, jnp.float32)[None, :, :, None],
                     coarse=jnp.asarray(coarse, jnp.float32)[None, :, :, None])
  centre = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(10.0)
  params = {f"{part}_{stage}": {"kernel": kernel, "bias": jnp.zeros(1)} for stage in maps
            for part, kernel in (("lateral", jnp.ones((1, 1, 1, 1))), ("output", centre))}
  levels = jax.jit(models.FeaturePyramid(1).apply)({"params": params}, maps)
  np.testing.assert_allclose(levels["coarse"][0, :, :, 0], 10 * coarse)
  np.testing.assert_allclose(levels["fine"][0, :, :, 0],
                             10 * (fine + [[1, 2, 2], [3, 4, 4], [3, 4, 4]]))


def test_a_coarse_map_reaches_all_finer_levels_and_no_coarser_one():
  maps = maps_of((6, 5), (3, 3), (2, 2))
  module = models.FeaturePyramid(4)
  variables = initialised(module, maps)
  run = jax.jit(module.apply)
  before = run(variables, maps)
  for i, stage in enumerate(before):
    after = run(variables, OrderedDict(maps, **{stage: maps[stage] + 1}))
    moved = [not np.allclose(before[level], after[level]) for level in before]
    assert moved == [level <= i for level in range(3)], stage


@pytest.mark.parametrize("levels, message", [
    (("s2", "s1"), r"from fine to coarse, found \{'s2': \(6, 5\), 's1': \(11, 9\)\}"),
    (("s1", "s9"), r"one of the trunk's stages \['s0', .*'s4'\], found 's9'"),
    (("features",), "found 'features'"),
    ((), "at least one stage"),
])
def test_pyramid_says_what_does_not_fit(levels, message):
  with pytest.raises(ValueError, match=message):
    shapes(models.FeaturePyramid(8, levels), maps_of(*RESNET_LIKE))


@pytest.mark.parametrize("head", [
    models.FeaturePyramid(8), models.SemanticFPN(2, (8, 8)), models.Upsampling(2, (8, 8))])
def test_a_trunk_of_vectors_has_no_maps(head):
  with pytest.raises(ValueError, match=r"expected a trunk with maps \[B, h, w, c\], found"):
    shapes(head, VECTORS)


@pytest.mark.parametrize("name", ["upsampling", "fpn"])
@pytest.mark.parametrize("sizes", [RESNET_LIKE, VIT_LIKE, [(16, 16), (8, 8)], [(1, 1)]])
@pytest.mark.parametrize("size", [(21, 17), (16, 16), [2, 5]])  # the last one smaller than maps
def test_dense_heads_give_the_size_asked_for(name, sizes, size):
  head = models.HEADS[name](num_outputs=5, size=size, channels=8)
  out, _ = shapes(head, maps_of(*sizes))
  assert out.shape == (2, *size, 5) and out.dtype == jnp.float32


@pytest.mark.parametrize("fields, modules", [
    ({}, ["project", "up1", "up2", "up3", "up4", "output"]),  # 2x2, 4x4, 8x8, 16x16, 21x17
    ({"stage": "s3"}, ["project", "up1", "up2", "up3", "output"]),  # 3x3, 6x6, 12x12, 21x17
    ({"skips": ("s1", "s3")},  # 2x2, 3x3 and s3, 6x6, 11x9 and s1, 21x17
     ["project", "up1", "skip_s3", "merge_s3", "up2", "up3", "skip_s1", "merge_s1", "up4",
      "output"]),
])
def test_upsampling_at_most_doubles_in_every_step(fields, modules):
  head = models.Upsampling(num_outputs=5, size=(21, 17), channels=8, **fields)
  _, variables = shapes(head, maps_of(*RESNET_LIKE))
  assert set(variables["params"]) == set(modules)


def test_upsampling_interpolates():
  """By hand: weights that pass the one channel on, so that only the resizing is left."""
  centre = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
  one = {"kernel": jnp.ones((1, 1, 1, 1)), "bias": jnp.zeros(1)}
  params = {"project": one, "up1": {"kernel": centre, "bias": jnp.zeros(1)}, "output": one}
  head = models.Upsampling(num_outputs=1, size=(1, 4), channels=1)
  out = jax.jit(head.apply)({"params": params}, {"s": jnp.array([[[[0.0], [4.0]]]])})
  np.testing.assert_allclose(out.ravel(), [0, 1, 3, 4], atol=1e-6)


@pytest.mark.parametrize("head, used", [
    (models.Upsampling(1, (13, 11), channels=4), {"s3"}),
    (models.Upsampling(1, (13, 11), channels=4, skips=("s1", "s2")), {"s1", "s2", "s3"}),
    (models.SemanticFPN(1, (13, 11), channels=4), {"s1", "s2", "s3"}),
])
def test_every_map_that_a_head_names_reaches_its_output(head, used):
  maps = maps_of((6, 5), (6, 5), (3, 3), (2, 2))
  variables = initialised(head, maps)
  moved = jax.jit(jax.grad(lambda maps: (head.apply(variables, maps) ** 2).sum()))(maps)
  assert {stage for stage, x in moved.items() if np.abs(x).sum() > 0} == used


def test_vit_skips_are_merged_from_deep_to_shallow():
  """Maps of one resolution differ in depth alone, also in jit and where names sort otherwise."""
  maps = maps_of(*[(3, 2)] * 11, channels=1)  # s10 sorts before s2
  head = models.Upsampling(num_outputs=1, size=(3, 2), channels=4, skips=("s2", "s10"), stage="s9")
  text = str(jax.make_jaxpr(lambda maps: head.init_with_output(jax.random.key(0), maps)[0])(maps))
  deep, shallow = (text.index(f"1,1,{1 + stage},4") for stage in (10, 2))
  assert deep < shallow


def test_fpn_doubles_each_level_as_often_as_it_is_deep():
  _, variables = shapes(models.SemanticFPN(5, (22, 18), channels=8), maps_of(*RESNET_LIKE))
  convolutions = {path[0] for path in flatten_dict(variables["params"])
                  if path[0].startswith("conv_")}
  assert convolutions == {"conv_s1_0", "conv_s2_0", "conv_s3_1", "conv_s3_0", "conv_s4_2",
                          "conv_s4_1", "conv_s4_0"}


@pytest.mark.parametrize("name, fields, message", [
    ("upsampling", {"stage": "s9"}, "upsampling: stage: expected one of the trunk's stages"),
    ("upsampling", {"skips": ("s9",)}, "upsampling: skips: expected one of the trunk's stages"),
    ("upsampling", {"stage": "s1", "skips": ("s4",)}, r"no coarser than the start, \(11, 9\)"),
    ("upsampling", {"size": (8,)}, r"upsampling: size: expected \(height, width\).*found \(8,\)"),
    ("fpn", {"size": (0, 8)}, r"fpn: size: expected \(height, width\).*found \(0, 8\)"),
])
def test_dense_heads_say_what_does_not_fit(name, fields, message):
  head = models.HEADS[name](**{"num_outputs": 2, "size": (8, 8), **fields})
  with pytest.raises(ValueError, match=message):
    shapes(head, maps_of(*RESNET_LIKE))


def test_normalized_gives_unit_embeddings_and_cosines():
  features = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
  head = models.Normalized(num_outputs=3, width=5)
  variables = initialised(head, features)
  outputs = jax.jit(head.apply)(variables, features)
  params = jax.tree.map(np.asarray, variables["params"])
  dense = features @ params["embedding"]["kernel"] + params["embedding"]["bias"]
  np.testing.assert_allclose(np.linalg.norm(outputs["embedding"], axis=1), 1, rtol=1e-6)
  for i in range(4):
    for j in range(3):
      w = params["directions"][:, j]
      np.testing.assert_allclose(
          outputs["cosines"][i, j],
          dense[i] @ w / np.linalg.norm(dense[i]) / np.linalg.norm(w), rtol=1e-4, atol=1e-6)


def test_normalized_has_a_finite_gradient_at_zero():
  head = models.Normalized(num_outputs=3, width=5)
  variables = jax.tree.map(jnp.zeros_like, initialised(head, jnp.zeros((2, 6))))
  grads = jax.jit(jax.grad(lambda v: head.apply(v, jnp.ones((2, 6)))["cosines"].sum()))(variables)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_resize_keeps_what_has_the_size_already():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 2, 2)), jnp.float32)
  for method in ("bilinear", "nearest"):
    np.testing.assert_array_equal(pyramid.resize(x, (3, 2), method), x)
