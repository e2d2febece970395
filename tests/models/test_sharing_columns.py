"""Cross-stitch and NDDR: trunks side by side that mix on the way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models
from mtl_jax.models.sharing import SHARINGS
from mtl_jax.models.sharing.cross_stitch import CrossStitchUnit
from mtl_jax.models.sharing.nddr import NDDRUnit
from tests.models.sharing_cases import (IMAGES, ONE, TASKS, TRUNKS, TWO, apart, assert_close,
                                        check_owners, filled, images_of)


def at_identity(name, sharing, variables):
  """The same trunks, with units as they start where a task's own share is one."""
  count = len(TASKS)
  for unit, params in variables["params"].items():
    if not unit.startswith("units_"):
      continue
    if name == "cross_stitch":
      square = jnp.eye(count).reshape(count, count, *(1,) * (params["alpha"].ndim - 2))
      params["alpha"] = jnp.broadcast_to(square, params["alpha"].shape)
      continue
    stats = variables["batch_stats"][unit]
    for i, task in enumerate(TASKS):
      channels = params[f"reduce_{task}"]["kernel"].shape[1]
      params[f"reduce_{task}"]["kernel"] = jnp.concatenate(
          [jnp.eye(channels) * float(j == i) for j in range(count)])
      params[f"norm_{task}"] = {"scale": jnp.ones(channels), "bias": jnp.zeros(channels)}
      stats[f"norm_{task}"] = {"mean": jnp.zeros(channels), "var": jnp.full(channels, 1 - 1e-3)}
  return variables


@pytest.mark.parametrize("name, kwargs, trunk, streams, train", [
    ("cross_stitch", {}, "cnn", TWO, False),
    ("cross_stitch", {"per_channel": True, "units_at": ("conv2",)}, "cnn", ONE, False),
    ("cross_stitch", {}, "resnet", ONE, True),
    ("cross_stitch", {"units_at": ("hidden1", "features")}, "mlp", TWO, False),
    ("nddr", {}, "cnn", TWO, False),
    ("nddr", {"units_at": ("layer1",)}, "resnet", TWO, False)])
def test_columns_that_do_not_mix_are_independent(name, kwargs, trunk, streams, train):
  sharing = SHARINGS[name](TRUNKS[trunk], TASKS, **kwargs)
  independent = SHARINGS["independent"](TRUNKS[trunk], TASKS)
  images = {stream: IMAGES[stream] for stream in set(streams.values())}
  variables = at_identity(name, sharing, filled(sharing, images, streams, train))

  @jax.jit
  def run(variables):
    apply = lambda module, v: module.apply(v, images, streams, train, maps=trunk != "mlp",
                                           mutable=["batch_stats"])[0]
    return apply(sharing, variables), apply(independent, apart(variables))

  assert_close(*run(variables))


@pytest.mark.parametrize("name, scale", [("cross_stitch", 1.0), ("nddr", 1.0005 ** -1)])
def test_an_own_share_of_one_starts_as_independent(name, scale):
  """NDDR but for the epsilon of its norm, 1 / √1.001 a unit, by which the last map is scaled."""
  trunk = models.CNN(channels=(3,), width=5, pool="mean")
  sharing = SHARINGS[name](trunk, TASKS, own_share=1.0)
  independent = SHARINGS["independent"](trunk, TASKS)
  variables = jax.jit(lambda: sharing.init(jax.random.key(0), IMAGES, TWO, False))()
  found = sharing.apply(variables, IMAGES, TWO, False)
  expected = independent.apply(apart({"params": variables["params"]}), IMAGES, TWO, False)
  for task in TASKS:
    np.testing.assert_allclose(found[task], scale * expected[task], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name, kwargs", [
    ("cross_stitch", {}), ("cross_stitch", {"units_at": ("conv1",), "per_channel": True}),
    ("nddr", {}), ("nddr", {"units_at": ("conv1",)})])
def test_who_owns_what(name, kwargs):
  sharing = SHARINGS[name](TRUNKS["cnn"], TASKS, **kwargs)
  check_owners(sharing, IMAGES, TWO, maps="units_at" in kwargs)
  assert not sharing.one_representation


def test_every_task_mixes_in_its_own_image_only():
  """Tasks of one stream leave the features of another stream's images alone."""
  sharing = SHARINGS["cross_stitch"](TRUNKS["cnn"], TASKS)
  variables = filled(sharing, IMAGES, TWO, False)
  run = jax.jit(lambda images: sharing.apply(variables, images, TWO, False))
  before, after = run(IMAGES), run({**IMAGES, "y": IMAGES["y"] + 1})
  np.testing.assert_allclose(before["b"], after["b"], rtol=1e-6)
  assert not np.allclose(before["c"], after["c"])


@pytest.mark.parametrize("name", ["cross_stitch", "nddr"])
def test_streams_of_several_sizes_and_maps(name):
  trunk = models.ResNet(blocks=(1,), channels=3)
  sharing = SHARINGS[name](trunk, TASKS)
  images = images_of({"x": 2, "y": 4}, sides=(8, 6))
  run = functools.partial(sharing.init_with_output, jax.random.key(0), images, TWO, True)
  maps = jax.eval_shape(functools.partial(run, maps=True))[0]
  assert tuple(maps["c"]) == trunk.stages
  assert [x.shape for x in maps["c"].values()] == [(4, 6, 8, 3), (4, 6, 8, 3), (4, 3)]
  assert maps["b"]["stem"].shape == (2, 8, 8, 3)


def test_a_cross_stitch_unit_by_hand():
  """x̃_i = Σ_j α_ij x_j, for every channel by itself: α_11 = (2, 3), α_12 = (1, 0), …"""
  alpha = jnp.array([[[2., 3.], [1., 0.]], [[0., 1.], [5., 1.]]])
  columns = [jnp.array([[10., 20.]]), jnp.array([[1., 2.]])]
  mixed = CrossStitchUnit(per_channel=True).apply({"params": {"alpha": alpha}}, columns, False)
  assert [x.tolist() for x in mixed] == [[[21, 60]], [[5, 22]]]


@pytest.mark.parametrize("count, own, other", [(1, 1.0, None), (2, 0.9, 0.1), (5, 0.8, 0.05)])
def test_a_cross_stitch_unit_starts_near_the_identity(count, own, other):
  """0.8 and 0.05 for five tasks are those of public code for PASCAL-Context."""
  share = 0.9 if count == 1 else own
  unit = CrossStitchUnit(own_share=share)
  alpha = unit.init(jax.random.key(0), [jnp.zeros((1, 2))] * count, False)["params"]["alpha"]
  expected = np.full((count, count), other or 0.0)
  np.fill_diagonal(expected, own)
  np.testing.assert_allclose(alpha, expected, rtol=1e-6)


def test_an_nddr_unit_by_hand():
  """In training: the 1x1 convolution over all channels, normalised over the batch, and ReLU."""
  rng = np.random.default_rng(2)
  columns = [rng.normal(size=(2, 3, 3, 2)).astype(np.float32) for _ in TASKS]
  unit = NDDRUnit(TASKS)
  variables = filled(unit, columns, True)
  found, state = jax.jit(lambda v: unit.apply(v, columns, True, mutable=["batch_stats"]))(variables)
  params = jax.tree.map(np.asarray, variables["params"])
  for task, x in zip(TASKS, found):
    y = np.concatenate(columns, -1) @ params[f"reduce_{task}"]["kernel"]
    mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
    norm = params[f"norm_{task}"]
    expected = np.maximum((y - mean) / np.sqrt(var + 1e-3) * norm["scale"] + norm["bias"], 0)
    np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state["batch_stats"][f"norm_{task}"]["mean"],
                               0.95 * np.ones(2) + 0.05 * mean, rtol=1e-4)


@pytest.mark.parametrize("name", ["cross_stitch", "nddr"])
@pytest.mark.parametrize("trunk, kwargs, message", [
    (TRUNKS["cnn"], {"units_at": ("conv9",)}, r"units_at: expected one of \['conv1'.*'conv9'"),
    (TRUNKS["cnn"], {"units_at": ()}, "units_at: expected at least one"),
    (models.MLPTrunk(widths=(4,)), {}, r"at least one of the trunk's stages \['features'\]"),
    (TRUNKS["cnn"], {"own_share": 0.0}, r"own_share: expected a number in \(0, 1\], found 0.0")])
def test_what_does_not_fit_is_said(name, trunk, kwargs, message):
  with pytest.raises(ValueError, match=message):
    SHARINGS[name](trunk, TASKS, **kwargs)
