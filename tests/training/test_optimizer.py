"""Optimizers by name: every one steps, decays kernels only, clips, follows its schedule."""

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.training.optimizer import OPTIMIZERS, by_part, cosine, optimizer, steps

PARAMS = {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0)}
GRADS = jax.tree.map(jnp.ones_like, PARAMS)
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_descends(name):
  tx = optimizer(name, 0.1)
  updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
  assert all((np.asarray(u) < 0).all() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lion", "lars", "adadelta"])
def test_weight_decay_leaves_biases_alone(name):
  decayed, plain = (optimizer(name, 0.1, weight_decay=w) for w in (0.5, 0.0))
  a, b = (tx.update(GRADS, tx.init(PARAMS), PARAMS)[0] for tx in (decayed, plain))
  np.testing.assert_array_equal(a["bias"], b["bias"])
  if name not in ("adam", "lars", "adadelta"):  # whose first step forgets the gradient's size
    assert not np.allclose(a["kernel"], b["kernel"])


def test_decay_is_coupled_for_sgd_and_decoupled_for_adamw():
  tx = optimizer("sgd", 0.1, weight_decay=0.5)
  updates, _ = tx.update(ZEROS, tx.init(PARAMS), PARAMS)
  np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * 2.0)
  tx = optimizer("adamw", 0.1, weight_decay=0.5)
  updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
  np.testing.assert_allclose(updates["kernel"], -0.1 * (1.0 + 0.5 * 2.0), rtol=1e-5)
  tx = optimizer("adamw", 0.1)  # optax's own default, 1e-4
  updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
  np.testing.assert_allclose(updates["kernel"], -0.1 * (1.0 + 1e-4 * 2.0), rtol=1e-5)


def test_clipping_bounds_the_norm():
  tx = optimizer("sgd", 1.0, clip_norm=0.25)
  updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
  np.testing.assert_allclose(optax.tree.norm(updates), 0.25, rtol=1e-6)


def test_cosine_with_warmup():
  schedule = cosine(0.8, 100, warmup=20, final=0.1)
  with jax.numpy_dtype_promotion("standard"):
    found = [float(schedule(step)) for step in (0, 10, 20, 60, 100)]
  np.testing.assert_allclose(found, [0.0, 0.4, 0.8, 0.8 * (0.1 + 0.9 * 0.5), 0.08], rtol=1e-5)


def test_steps_with_warmup_count_from_the_start_of_the_run():
  schedule = steps(1.0, 100, warmup=10, at=(0.5,))
  with jax.numpy_dtype_promotion("standard"):
    found = [float(schedule(step)) for step in (5, 10, 49, 51)]
  np.testing.assert_allclose(found, [0.5, 1.0, 1.0, 0.1], rtol=1e-5)


@pytest.mark.parametrize("kwargs", [{"weight_decay": -1.0}, {"clip_norm": 0.0}])
def test_negative_numbers_are_refused(kwargs):
  with pytest.raises(ValueError, match="optimizer: "):
    optimizer("sgd", 0.1, **kwargs)


PARTS = {"sharing": {"trunk": {"dense1": PARAMS, "dense2": PARAMS}}, "heads_a": {"dense": PARAMS}}


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lion", "adafactor", "lars"])
def test_what_is_frozen_does_not_move_in_a_single_bit(name):
  params = jax.tree.map(lambda x: x.at[0].set(-0.0), PARTS)
  tx = by_part(optimizer(name, 0.1, weight_decay=0.5, clip_norm=1.0), freeze=("dense1", "bias"))
  state, moved = tx.init(params), params
  for _ in range(2):
    updates, state = tx.update(jax.tree.map(jnp.ones_like, moved), state, moved)
    moved = optax.apply_updates(moved, updates)
  for path, x in flatten_dict(moved).items():
    frozen = "dense1" in path or "bias" in path
    assert (np.asarray(x).tobytes() == np.asarray(flatten_dict(params)[path]).tobytes()) == frozen


def test_a_factor_is_that_of_the_learning_rate():
  def step(tx):
    return tx.update(jax.tree.map(jnp.ones_like, PARTS), tx.init(PARTS), PARTS)[0]
  scaled = step(by_part(optimizer("adamw", 0.1, weight_decay=0.5),
                        learning_rate_scale={"trunk": 0.5, "dense2": 0.25}))
  for factor, names in ((0.5, ("sharing", "trunk", "dense1")),
                          (0.125, ("sharing", "trunk", "dense2")), (1.0, ("heads_a", "dense"))):
    plain = step(optimizer("adamw", 0.1 * factor, weight_decay=0.5))
    for leaf in ("kernel", "bias"):
      np.testing.assert_allclose(flatten_dict(scaled)[*names, leaf],
                                 flatten_dict(plain)[*names, leaf], rtol=1e-6)


def test_clipping_does_not_see_what_is_frozen():
  grads = jax.tree.map(jnp.ones_like, PARTS)
  grads["sharing"]["trunk"] = jax.tree.map(lambda x: 1e6 * x, grads["sharing"]["trunk"])
  tx = by_part(optimizer("sgd", 1.0, clip_norm=0.25), freeze=("trunk",))
  updates, _ = tx.update(grads, tx.init(PARTS), PARTS)
  np.testing.assert_allclose(optax.tree.norm(updates), 0.25, rtol=1e-6)


@pytest.mark.parametrize("fields, message", [
    ({"freeze": ("dense9",)}, "freeze: expected trunk, heads or names on the path of a parameter, "
                              "such as sharing/trunk, heads_a/dense; found 'dense9'"),
    ({"freeze": ("trunk", "heads")}, "freeze: .* found that trunk, heads say them all"),
    ({"learning_rate_scale": {"trunk": -1.0}}, "learning_rate_scale.trunk: expected a number > 0"),
    ({"learning_rate_scale": {"dense2/trunk": 1.0}}, "found 'dense2/trunk', which says none"),
])
def test_patterns_that_cannot_be_meant_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    by_part(optax.sgd(0.1), **fields).init(PARTS)
