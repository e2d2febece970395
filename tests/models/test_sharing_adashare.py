"""AdaShare: one trunk, of which tasks skip blocks by choices drawn in training."""

import flax.linen as nn
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models
from mtl_jax.models.sharing import SHARINGS
from mtl_jax.models.sharing.adashare import Policy
from tests.models.sharing_cases import (IMAGES, ONE, TASKS, TWO, assert_close,
                                        check_drawn_owners, filled, images_of)

RESNET = models.ResNet(blocks=(2, 2), channels=3)
TRUNKS = {"resnet": models.ResNet(blocks=(2,), channels=3),
          "vit": models.ViT(width=4, depth=2, num_heads=2),
          "mlp": models.MLPTrunk(widths=(5, 5, 5))}
KEY = {"dropout": jax.random.key(0)}


def choosing(variables, odds):
  """The same trunk, with log odds by task, or of all tasks, in the order of the blocks' names."""
  for task in TASKS:
    policy = variables["params"][f"policies_{task}"]
    for block, value in zip(sorted(policy), np.broadcast_to(
        odds[task] if isinstance(odds, dict) else odds, len(policy))):
      policy[block] = jnp.asarray(value, jnp.float32)
  return variables


def trunk_of(variables):
  return {collection: tree["trunk"] for collection, tree in variables.items()}


@pytest.mark.parametrize("trunk, streams, train", [
    ("resnet", ONE, True), ("mlp", TWO, True),
    pytest.param("resnet", TWO, False, marks=pytest.mark.slow),
    pytest.param("vit", TWO, True, marks=pytest.mark.slow)])
def test_where_all_is_kept_it_is_hard_sharing(trunk, streams, train):
  """Draws, too, where the odds are e^50 to one; and with them BatchNorm's running statistics."""
  images = {stream: IMAGES[stream] for stream in set(streams.values())}
  sharing, hard = (SHARINGS[name](TRUNKS[trunk], TASKS) for name in ("adashare", "hard"))
  variables = choosing(filled(sharing, images, streams, False), 50.0)
  as_hard = {name: {"trunk": tree["trunk"]} for name, tree in variables.items()}
  apply = lambda module, v: module.apply(v, images, streams, train, maps=trunk != "mlp", rngs=KEY,
                                         mutable=["batch_stats"])
  (found, state), (expected, expected_state) = jax.jit(
      lambda v, w: (apply(sharing, v), apply(hard, w)))(variables, as_hard)
  assert_close(found, expected)
  assert_close(state, expected_state)


@pytest.mark.parametrize("train", [False, True])
def test_a_block_that_all_skip_is_not_there_and_gets_no_gradient(train):
  sharing = SHARINGS["adashare"](TRUNKS["mlp"], TASKS)
  variables = choosing(filled(sharing, IMAGES, TWO, False), [50.0, -50.0])  # features, hidden2
  trunk = variables["params"]["trunk"]

  def total(params):
    found = sharing.apply({"params": params}, IMAGES, TWO, train, rngs=KEY)
    return sum((x ** 2).sum() for x in found.values()), found

  (_, found), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(variables["params"])
  for task, stream in TWO.items():
    x = IMAGES[stream].reshape(len(IMAGES[stream]), -1)
    for name in ("dense1", "dense3"):
      x = np.maximum(x @ trunk[name]["kernel"] + np.asarray(trunk[name]["bias"])[None], 0)
    np.testing.assert_allclose(found[task], x, rtol=1e-4, atol=1e-5)
  for name, grad in grads["trunk"].items():
    zero = [not np.any(x) for x in jax.tree.leaves(grad)]
    assert all(zero) if name == "dense2" else not any(zero), name


def test_at_evaluation_each_task_runs_what_it_most_likely_keeps():
  """Without a draw; the blocks that halve the resolution are in everyone's way."""
  sharing = SHARINGS["adashare"](RESNET, TASKS)
  variables = filled(sharing, IMAGES, TWO, False)
  assert sorted(variables["params"]["policies_b"]) == ["layer1_0", "layer1_1", "layer2_1"]
  variables = choosing(variables, {"b": [0.1, -0.1, 2.0], "a_1": [-3.0, -0.2, -9.0],
                                   "c": [-0.5, 0.0, -0.01]})
  ways = {"b": ["stem", "layer1_0", "layer2_0", "layer2_1", "features"],
          "a_1": ["stem", "layer2_0", "features"],
          "c": ["stem", "layer1_1", "layer2_0", "features"]}

  @jax.jit
  def run(variables):
    expected = {}
    for task, way in ways.items():
      x = IMAGES[TWO[task]]
      for block in way:
        x = RESNET.apply(trunk_of(variables), block, x, method="stage")
      expected[task] = x
    maps = sharing.apply(variables, IMAGES, TWO, False, maps=True)
    return sharing.apply(variables, IMAGES, TWO, False), expected, maps

  found, expected, maps = run(variables)
  assert_close(found, expected)
  assert list(maps["b"]) == ["stem", "layer1", "layer2", "features"]
  assert_close({task: stages["features"] for task, stages in maps.items()}, expected)
  assert_close(maps["a_1"]["stem"], maps["a_1"]["layer1"])


def test_who_owns_what_over_many_draws():
  sharing = SHARINGS["adashare"](TRUNKS["mlp"], TASKS)
  variables = choosing(filled(sharing, IMAGES, TWO, False), 0.0)
  check_drawn_owners(sharing, variables["params"], draws=12)


def test_blocks_are_kept_as_often_as_their_odds_say():
  params = {"often": jnp.log(0.9 / 0.1), "rarely": jnp.log(0.3 / 0.7)}

  def draw(key):
    return jnp.stack([Policy().apply({"params": params}, block, jnp.zeros(1), jnp.ones(1), True,
                                     rngs={"dropout": key})[0] for block in params])

  drawn = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4000)))
  assert set(np.unique(drawn)) == {0.0, 1.0}  # one way or the other, exactly
  np.testing.assert_allclose(drawn.mean(axis=0), [0.9, 0.3], atol=0.03)  # 4 deviations
  shares = np.prod(drawn, axis=1).mean()
  np.testing.assert_allclose(shares, 0.27, atol=0.03)  # draws of several blocks are independent


def test_the_gradient_is_that_of_the_sigmoid_of_the_draw():
  skipped, kept, odds, temperature = jnp.array([1.0, 2.0]), jnp.array([4.0, 8.0]), 0.3, 0.5
  key, policy = {"dropout": jax.random.key(3)}, Policy(temperature=temperature)
  noise = []
  class Seen(nn.Module):
    @nn.compact
    def __call__(self):
      noise.append(jax.random.logistic(self.make_rng("dropout"), ()))
  Seen().apply({}, rngs=key)
  total = lambda odds: policy.apply({"params": {"x": odds}}, "x", skipped, kept, True,
                                    rngs=key).sum()
  p = 1 / (1 + np.exp(-(odds + float(noise[0])) / temperature))
  np.testing.assert_allclose(jax.grad(total)(jnp.asarray(odds)),
                             (12 - 3) * p * (1 - p) / temperature, rtol=1e-5)


def test_penalties_by_hand():
  """Keep b's blocks with 1/2, 1/4, 3/4, a_1's with 1/2 each, c's with 3/4, 1/2, 1/4."""
  sharing = SHARINGS["adashare"](RESNET, TASKS, sparsity=0.5, sharing=2.0)
  odds = lambda *keep: np.log(np.array(keep) / (1 - np.array(keep)))
  policies = {"b": odds(1 / 2, 1 / 4, 3 / 4), "a_1": odds(1 / 2, 1 / 2, 1 / 2),
              "c": odds(3 / 4, 1 / 2, 1 / 4)}
  blocks = ("layer2_1", "layer1_1", "layer1_0")  # as they may come, not in the trunk's order
  params = {"trunk": {"x": jnp.ones(1)}, **{
      f"policies_{task}": {block: jnp.float32(x) for block, x in zip(blocks, values[::-1])}
      for task, values in policies.items()}}
  found = sharing.penalties(params)
  assert set(found) == {"sparsity", "sharing"}
  product = (1 / 2 * 1 / 4 * 3 / 4) * (1 / 2) ** 3 * (3 / 4 * 1 / 2 * 1 / 4)
  np.testing.assert_allclose(found["sparsity"], 0.5 * np.log(product), rtol=1e-5)
  # Gaps of the pairs (b, a_1), (b, c), (a_1, c), in quarters, of blocks that weigh 1, 2/3, 1/3.
  gaps = (0 + 1 + 1) / 4 + 2 / 3 * (1 + 1 + 0) / 4 + 1 / 3 * (1 + 2 + 1) / 4
  np.testing.assert_allclose(found["sharing"], 2 * gaps, rtol=1e-5)
  grads = jax.grad(lambda p: sharing.penalties(p)["sparsity"])(params)
  np.testing.assert_allclose(grads["policies_b"]["layer1_1"], 0.5 * 3 / 4, rtol=1e-5)  # λ (1 − α)
  assert not any(np.any(x) for x in jax.tree.leaves(grads["trunk"]))
  off = SHARINGS["adashare"](RESNET, TASKS, sparsity=0.0, sharing=0.0)
  assert off.penalties(params) == {}


def test_streams_of_several_sizes_and_names_alike():
  images = images_of({"x": 2, "y": 3}, sides=(8, 12))
  sharing = SHARINGS["adashare"](RESNET, TASKS)
  features, variables = jax.eval_shape(lambda: sharing.init_with_output(
      jax.random.key(0), images, TWO, False))
  assert {task: x.shape for task, x in features.items()} == {"b": (2, 6), "a_1": (3, 6),
                                                             "c": (3, 6)}
  owners = {sharing.owner(path) for path in flatten_dict(variables["params"])}
  assert owners == {None, *TASKS}
  started = Policy(keep=0.75).init(jax.random.key(0), "x", jnp.ones(1), jnp.ones(1), False)
  np.testing.assert_allclose(started["params"]["x"], np.log(3), rtol=1e-6)


class Plain(nn.Module):
  """A trunk without stages."""


@pytest.mark.parametrize("trunk, kwargs, message", [
    (RESNET, {"keep": 1.0}, r"adashare: keep: expected a number in \(0, 1\), found 1.0"),
    (RESNET, {"temperature": 0.0}, "adashare: temperature: expected a number > 0, found 0.0"),
    (RESNET, {"sparsity": -1.0}, "adashare: sparsity: expected a number >= 0, found -1.0"),
    (RESNET, {"sharing": float("nan")}, "adashare: sharing: expected a number >= 0, found nan"),
    (Plain(), {}, "adashare: expected a trunk that names its stages, found Plain"),
    (models.CNN(channels=(3, 3)), {}, "after the first, that keeps the shape and so can be skipped,"
     r" found CNN with stages \['conv1', 'conv2', 'features'\]"),
    (models.MLPTrunk(widths=(5, 4)), {}, "can be skipped, found MLPTrunk")])
def test_what_does_not_fit_is_said(trunk, kwargs, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: SHARINGS["adashare"](trunk, TASKS, **kwargs).init(
        jax.random.key(0), IMAGES, TWO, False))
