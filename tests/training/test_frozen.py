"""What stands still has no part in the balance, and gets no gradient from anything."""

from flax.traverse_util import flatten_dict
import jax
import numpy as np
import optax
import pytest

from mtl_jax import balancing
from mtl_jax.training import penalties
from mtl_jax.training.optimizer import by_part
from tests.training.test_step import make, plain_jacobian

FROZEN = ("trunk/a", "heads_t1/bias")


def is_frozen(path):
  return "a" in path or path == ("heads_t1", "bias")


@pytest.mark.slow
def test_the_gramian_and_the_norms_are_those_of_what_moves():
  state, batch, step, model, some_tasks = make(
      balancer=balancing.mgda(), frozen=FROZEN, opt=by_part(optax.sgd(1.0), freeze=FROZEN),
      penalties={"l2": penalties.l2(0.1)})
  after, logs = jax.jit(step)(state, batch)
  rows = [np.concatenate([np.ravel(g) for path, g in flatten_dict(grads).items()
                          if model.owner(path) is None and not is_frozen(path)])
          for grads in plain_jacobian(state, batch, model, some_tasks)]
  np.testing.assert_allclose(logs["gramian"], np.stack(rows) @ np.stack(rows).T, rtol=1e-4)
  before, after = flatten_dict(state.params), flatten_dict(after.params)
  for path, x in before.items():
    assert (np.asarray(x).tobytes() == np.asarray(after[path]).tobytes()) == is_frozen(path), path
  np.testing.assert_allclose(logs["gradient_norm"], logs["update_norm"], rtol=1e-5)


@pytest.mark.parametrize("method", [
    "mgda", pytest.param("cagrad", marks=pytest.mark.slow), "graddrop"])
def test_under_a_frozen_trunk_tasks_are_balanced_equally(method):
  state, batch, step, _, some_tasks = make(balancer=balancing.get(method), frozen=("trunk",))
  after, logs = jax.jit(step)(state, batch)
  np.testing.assert_allclose(logs["weights"], np.full(3, logs["weights"][0]), rtol=1e-5)
  for path, x in flatten_dict(after.params).items():
    assert np.isfinite(x).all()
    assert np.array_equal(x, flatten_dict(state.params)[path]) == (path[0] == "sharing")
  assert logs["finite"].all()
