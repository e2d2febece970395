"""Optimizers by name: every one steps, decays kernels only, clips, follows its schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.training.optimizer import OPTIMIZERS, cosine, optimizer, steps

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
