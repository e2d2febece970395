"""Hard sharing with a branch point, between one trunk for all and one a task."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from mtl_jax import models
from mtl_jax.models.sharing import SHARINGS
from tests.models.sharing_cases import (IMAGES, ONE, TASKS, TRUNKS, TWO, assert_close,
                                        check_owners, filled, images_of, joined)


@pytest.mark.parametrize("name, branch_at", [
    ("cnn", "conv1"), ("cnn", "conv2"), ("resnet", "stem"), ("mlp", "hidden1")])
@pytest.mark.parametrize("streams", [ONE, TWO], ids=["one", "two"])
def test_each_task_goes_through_the_trunk_and_then_its_branch(name, branch_at, streams):
  sharing = SHARINGS["hard"](TRUNKS[name], TASKS, branch_at=branch_at)
  variables = filled(sharing, IMAGES, streams, False, name != "mlp")

  @jax.jit
  def run(variables):
    features = sharing.apply(variables, IMAGES, streams, False)
    maps = sharing.apply(variables, IMAGES, streams, False, maps=True)
    alone = {task: TRUNKS[name].apply(joined(variables, "trunk", f"branches_{task}"),
                                      IMAGES[stream], method="maps")
             for task, stream in streams.items()}
    return features, maps, alone

  features, maps, alone = run(variables)
  assert set(features) == set(TASKS)
  for task in TASKS:
    assert tuple(maps[task]) == TRUNKS[name].stages
    assert_close(dict(maps[task]), dict(alone[task]))
    assert_close(features[task], alone[task]["features"])


@pytest.mark.parametrize("trunk", TRUNKS.values(), ids=TRUNKS)
def test_a_branch_point_at_the_end_is_hard_sharing(trunk):
  plain = SHARINGS["hard"](trunk, TASKS)
  ended = SHARINGS["hard"](trunk, TASKS, branch_at="features")
  variables = filled(plain, IMAGES, TWO, False)
  shapes = jax.eval_shape(lambda: ended.init(jax.random.key(0), IMAGES, TWO, False))
  assert jax.tree.structure(shapes) == jax.tree.structure(variables)
  assert set(variables["params"]) == {"trunk"}  # as before there were branches
  run = jax.jit(lambda v: [x.apply(v, IMAGES, TWO, False) for x in (plain, ended)])
  assert_close(*run(variables))
  assert plain.one_representation and ended.one_representation


def test_branches_with_copies_of_one_trunk_are_independent_trunks():
  branched = SHARINGS["hard"](TRUNKS["cnn"], TASKS, branch_at="conv1")
  apart = SHARINGS["independent"](TRUNKS["cnn"], TASKS)
  variables = filled(branched, IMAGES, TWO, False)
  copies = {"params": {f"trunks_{task}": joined(variables, "trunk", f"branches_{task}")["params"]
                       for task in TASKS}}
  run = jax.jit(lambda v, w: [branched.apply(v, IMAGES, TWO, False),
                              apart.apply(w, IMAGES, TWO, False)])
  assert_close(*run(variables, copies))
  assert not branched.one_representation


def test_who_owns_what():
  sharing = SHARINGS["hard"](TRUNKS["cnn"], TASKS, branch_at="conv1")
  check_owners(sharing, IMAGES, TWO)


def test_branches_start_apart_and_take_images_of_several_sizes():
  trunk = models.ResNet(blocks=(1,), channels=3)
  sharing = SHARINGS["hard"](trunk, TASKS, branch_at="stem")
  images = images_of({"x": 2, "y": 2}, sides=(8, 6))
  features = jax.eval_shape(lambda: sharing.init_with_output(
      jax.random.key(0), images, TWO, True))[0]
  assert {task: x.shape for task, x in features.items()} == dict.fromkeys(TASKS, (2, 3))
  params = SHARINGS["hard"](TRUNKS["cnn"], TASKS, branch_at="conv2").init(
      jax.random.key(0), IMAGES, TWO, False)["params"]
  kernels = [params[f"branches_{task}"]["dense"]["kernel"] for task in TASKS]
  assert not np.allclose(kernels[0], kernels[1]) and not np.allclose(kernels[1], kernels[2])


class Whole(nn.Module):
  """A trunk that names no stages."""

  @nn.compact
  def __call__(self, images):
    return nn.Dense(4)(images.reshape(images.shape[0], -1))


@pytest.mark.parametrize("make, message", [
    (lambda: SHARINGS["hard"](TRUNKS["cnn"], TASKS, branch_at="layer9"),
     r"branch_at: expected one of \['conv1', 'conv2', 'features'\], found 'layer9'"),
    (lambda: SHARINGS["hard"](Whole(), TASKS, branch_at="conv1"),
     "Whole: expected a trunk that names its stages"),
    (lambda: models.Hard(TRUNKS["cnn"], branch_at="conv1").init(
        jax.random.key(0), IMAGES, TWO, False), "branch_at: expected the names of the tasks")])
def test_what_does_not_fit_is_said(make, message):
  with pytest.raises(ValueError, match=message):
    make()
