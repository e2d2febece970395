"""MTAN: masks of every task on the maps of a shared trunk."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models
from mtl_jax.models.sharing import SHARINGS
from mtl_jax.models.sharing.mtan import Attention, Refinement
from tests.models.sharing_cases import (IMAGES, ONE, TASKS, TRUNKS, TWO, assert_close,
                                        check_owners, filled, images_of)


def opened(variables, task=None, bias=100.0):
  """The same with the masks of one task, or of all, wide open: a sigmoid of 100 is 1."""
  for name, stages in variables["params"].items():
    if name.startswith("attention_") and task in (None, name.removeprefix("attention_")):
      for attention in stages.values():
        norm = attention["norm2"]
        attention["norm2"] = {"scale": jnp.zeros_like(norm["scale"]),
                              "bias": jnp.full_like(norm["bias"], bias)}
  return variables


@pytest.mark.parametrize("trunk, streams, train", [
    pytest.param("cnn", TWO, False, marks=pytest.mark.slow), ("resnet", ONE, True),
    ("mlp", TWO, False)])
def test_open_masks_are_hard_sharing(trunk, streams, train):
  sharing, hard = (SHARINGS[name](TRUNKS[trunk], TASKS) for name in ("mtan", "hard"))
  images = {stream: IMAGES[stream] for stream in set(streams.values())}
  variables = opened(filled(sharing, images, streams, train))
  alone = {collection: {"trunk": tree["trunk"]} for collection, tree in variables.items()
           if "trunk" in tree}

  @jax.jit
  def run(variables, alone):
    apply = lambda module, v: module.apply(v, images, streams, train, maps=trunk != "mlp",
                                           mutable=["batch_stats"])[0]
    return apply(sharing, variables), apply(hard, alone)

  assert_close(*run(variables, alone))


def test_closed_masks_let_nothing_through_and_only_for_their_task():
  sharing, hard = (SHARINGS[name](TRUNKS["cnn"], TASKS) for name in ("mtan", "hard"))
  variables = opened(opened(filled(sharing, IMAGES, TWO, False)), "c", bias=-100.0)
  maps, shared = jax.jit(lambda v: (
      sharing.apply(v, IMAGES, TWO, False, maps=True),
      hard.apply({"params": {"trunk": v["params"]["trunk"]}}, IMAGES, TWO, False, maps=True))
                         )(variables)
  assert not np.any(maps["c"]["conv1"]) and not np.any(maps["c"]["conv2"])
  assert_close({t: dict(maps[t]) for t in ("b", "a_1")},
               {t: dict(shared[t]) for t in ("b", "a_1")})


def test_who_owns_what():
  sharing = SHARINGS["mtan"](TRUNKS["cnn"], TASKS)
  check_owners(sharing, IMAGES, TWO)
  assert not sharing.one_representation


def test_masks_see_the_stage_and_what_was_kept_before():
  """By hand, stage after stage, from the parts alone."""
  trunk = TRUNKS["cnn"]
  sharing = SHARINGS["mtan"](trunk, TASKS, reduction=2)
  variables = filled(sharing, IMAGES, TWO, False)

  @jax.jit
  def run(variables):
    part = lambda name: {collection: tree.get(name, {}) for collection, tree in variables.items()}
    inner = lambda name, stage: {c: tree[stage] for c, tree in part(name).items()}
    shared = trunk.apply(part("trunk"), IMAGES["y"], method="maps")
    first = shared["conv1"] * Attention(3, 1).apply(
        inner("attention_c", "conv1"), shared["conv1"], False)
    refined = Refinement().apply(part("refinement_conv2"), first, shared["conv2"], False)
    second = shared["conv2"] * Attention(4, 2).apply(
        inner("attention_c", "conv2"), jnp.concatenate([shared["conv2"], refined], -1), False)
    features = trunk.apply(part("trunk"), "features", second, method="stage")
    return sharing.apply(variables, IMAGES, TWO, False)["c"], features

  assert_close(*run(variables))


def test_a_mask_by_hand():
  """h(x) = σ(W₂ ReLU(W₁ x)) behind norms that have seen nothing: 1 / √(1 + 1e-5) each."""
  kernels = [np.array([[1.0], [-2.0]], np.float32), np.array([[0.5, -1.0]], np.float32)]
  variables = filled(Attention(2, 1), jnp.zeros((1, 2)), False)
  params = {"conv1": {"kernel": kernels[0]}, "conv2": {"kernel": kernels[1]},
            "norm1": {"scale": jnp.ones(1), "bias": jnp.zeros(1)},
            "norm2": {"scale": jnp.ones(2), "bias": jnp.zeros(2)}}
  stats = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
  stats["norm1"]["var"], stats["norm2"]["var"] = jnp.ones(1), jnp.ones(2)
  mask = Attention(2, 1).apply({"params": params, "batch_stats": stats},
                               jnp.array([[3.0, 1.0], [0.0, 1.0]]), False)
  expected = 1 / (1 + np.exp(-np.array([[0.5, -1.0], [0.0, 0.0]])))
  np.testing.assert_allclose(mask, expected, rtol=1e-4)


@pytest.mark.parametrize("side", [8, 7])
def test_streams_of_several_sizes_and_maps(side):
  """Refined maps take any size that the next stage has."""
  trunk = models.ResNet(blocks=(1, 1), channels=2)
  sharing = SHARINGS["mtan"](trunk, TASKS)
  images = images_of({"x": 2, "y": 4}, sides=(12, side))
  run = functools.partial(sharing.init_with_output, jax.random.key(0), images, TWO, True)
  maps = jax.eval_shape(functools.partial(run, maps=True))[0]
  assert tuple(maps["c"]) == trunk.stages
  assert [x.shape for x in maps["c"].values()] == [
      (4, side, 8, 2), (4, side, 8, 2), (4, 4, 4, 4), (4, 4)]


@pytest.mark.parametrize("trunk, kwargs, message", [
    (models.MLPTrunk(widths=(4,)), {}, "mtan: expected a trunk with a stage before 'features'"),
    (TRUNKS["cnn"], {"reduction": 0}, "reduction: expected a size of at least 1, found 0")])
def test_what_does_not_fit_is_said(trunk, kwargs, message):
  with pytest.raises(ValueError, match=message):
    SHARINGS["mtan"](trunk, TASKS, **kwargs)
