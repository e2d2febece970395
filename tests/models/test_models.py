"""Shapes, sizes and names of trunks, heads and sharing architectures."""

import functools

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models


def count(tree):
  return sum(np.prod(x.shape, dtype=int) for x in jax.tree.leaves(tree))


def shapes(module, *args, **kwargs):
  return jax.eval_shape(functools.partial(module.init, **kwargs), jax.random.key(0), *args)


def test_reference_cnn_has_the_sizes_of_its_layers():
  params = shapes(models.CNN(), jnp.zeros((1, 32, 32, 3)))["params"]
  assert count(params) == (27 * 32 + 32) + (288 * 64 + 64) + (4096 * 128 + 128)


@pytest.mark.parametrize("stem, params", [("imagenet", 11_176_512), ("cifar", 11_168_832)])
def test_resnet18_has_torchvisions_parameters(stem, params):
  """torchvision's resnet18 has 11,689,512 with its 513,000 of `fc`; a 3x3 stem has 7,680 fewer."""
  variables = shapes(models.resnet18(stem=stem), jnp.zeros((1, 64, 64, 3)))
  assert count(variables["params"]) == params
  assert count(variables["batch_stats"]) == 9600
  paths = {"/".join(path) for path in flatten_dict(variables["params"])}
  assert {"conv1/kernel", "bn1/scale", "layer1_0/conv2/kernel", "layer2_0/downsample_0/kernel",
          "layer4_1/bn2/bias"} <= paths
  assert "layer1_0/downsample_0/kernel" not in paths


def test_resnet_pads_both_sides_under_stride():
  """A block of ones through a stride-2 3x3 convolution of ones: corners see 2x2, not 3x3."""
  block = models.trunks.resnet._conv(1, 3, 2, None)
  variables = {"params": {"kernel": jnp.ones((3, 3, 1, 1))}}
  out = block.apply(variables, jnp.ones((1, 4, 4, 1)))[0, :, :, 0]
  np.testing.assert_array_equal(out, [[4, 6], [6, 9]])


def test_too_small_images_are_refused():
  with pytest.raises(ValueError, match="at least 4 pixels a side, found 3x3"):
    shapes(models.CNN(), jnp.zeros((1, 3, 3, 3)))
  with pytest.raises(ValueError, match="stem: expected 'cifar' or 'imagenet', found 'big'"):
    shapes(models.resnet18(stem="big"), jnp.zeros((1, 32, 32, 3)))


@pytest.mark.parametrize("name, kwargs", [("linear", {}), ("mlp", {"hidden": (7, 6)})])
def test_heads_give_their_outputs(name, kwargs):
  head = models.HEADS[name](num_outputs=5, **kwargs)
  out, _ = jax.eval_shape(head.init_with_output, jax.random.key(0), jnp.zeros((3, 4)))
  assert out.shape == (3, 5)


def model_of(sharing, streams):
  trunk = models.CNN(channels=(4,), width=8)
  return models.MultiTaskModel(sharing=models.SHARINGS[sharing](trunk, tuple(streams)),
                               heads={task: models.Linear(2) for task in streams},
                               streams=streams)


BATCH = {"x": {"image": jax.random.normal(jax.random.key(1), (4, 6, 6, 3))},
         "y": {"image": jax.random.normal(jax.random.key(2), (3, 6, 6, 3))}}


@pytest.mark.parametrize("sharing", [
    "hard", pytest.param("independent", marks=pytest.mark.slow)])  # the others have tests of their own
def test_owner_tells_whose_loss_a_parameter_moves(sharing):
  """The declared owner against the truth: which outputs depend on the parameter."""
  model = model_of(sharing, {"a": "x", "b": "x", "c": "y"})
  variables = dict(model.init(jax.random.key(0), BATCH))
  params = variables.pop("params")
  moved = jax.jacrev(lambda p: jnp.stack([out.sum() for out in model.apply(
      {"params": p, **variables}, BATCH).values()]))(params)
  tasks = list(model.heads)
  for path, rows in flatten_dict(moved).items():
    reached = {tasks[i] for i in range(3) if np.abs(rows[i]).sum() > 0}
    owner = model.owner(path)
    assert reached <= ({owner} if owner else set(tasks)), path
    if path[-1] == "kernel":
      assert reached == ({owner} if owner else set(tasks)), path


def test_hard_sharing_is_one_pass_equal_to_one_a_stream():
  model = model_of("hard", {"a": "x", "b": "y"})
  variables = model.init(jax.random.key(0), BATCH)
  outputs = model.apply(variables, BATCH)
  trunk = models.CNN(channels=(4,), width=8)
  for task, stream in (("a", "x"), ("b", "y")):
    features = trunk.apply({"params": variables["params"]["sharing"]["trunk"]},
                           BATCH[stream]["image"])
    expected = models.Linear(2).apply({"params": variables["params"][f"heads_{task}"]}, features)
    np.testing.assert_allclose(outputs[task], expected, rtol=1e-5, atol=1e-6)


def test_streams_of_different_image_sizes_go_through_one_trunk():
  model = models.MultiTaskModel(sharing=models.Hard(models.ResNet(blocks=(1,), channels=4)),
                                heads={"a": models.Linear(2), "b": models.Linear(2)})
  batch = {"a": {"image": jnp.zeros((2, 8, 8, 3))}, "b": {"image": jnp.zeros((3, 12, 12, 3))}}
  outputs, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), batch)
  assert {task: out.shape for task, out in outputs.items()} == {"a": (2, 2), "b": (3, 2)}


def test_independent_trunks_start_apart():
  model = model_of("independent", {"a": "x", "b": "x"})
  params = model.init(jax.random.key(0), BATCH)["params"]["sharing"]
  assert set(params) == {"trunks_a", "trunks_b"}
  assert not np.allclose(params["trunks_a"]["dense"]["kernel"], params["trunks_b"]["dense"]["kernel"])
