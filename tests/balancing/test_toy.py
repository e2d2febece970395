"""Two objectives in the plane, on which averaging the gradients gets stuck.

The problem is that of Liu, Liu, Jin, Stone, Liu: Conflict-Averse Gradient Descent for Multi-task
Learning (NeurIPS 2021). Far up, two narrow valleys, of one objective each, cross; below lie two
bowls, whose centres (7, -8) and (-7, -8) the Pareto set joins.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import balancing
from mtl_jax.balancing.balancer import init_state
from tests.balancing.rows import FIRST

STARTS = ((-8.5, 7.5), (9.0, 9.0))
LOWEST = -25.0  # below both objectives everywhere


def objectives(theta: jax.Array) -> jax.Array:
  """Both objectives [2] at a point [2]."""
  x, y = theta
  upper, lower = jnp.maximum(jnp.tanh(0.5 * y), 0), jnp.maximum(jnp.tanh(-0.5 * y), 0)
  valley = lambda depth: jnp.log(jnp.maximum(jnp.abs(depth), 5e-6)) + 6
  bowl = lambda centre: ((x - centre) ** 2 + 0.1 * (y + 8) ** 2) / 10 - 20
  return jnp.stack([
      upper * valley(0.5 * (-x - 7) - jnp.tanh(-y)) + lower * bowl(7),
      upper * valley(0.5 * (-x + 3) + jnp.tanh(-y) + 2) + lower * bowl(-7),
  ])


def descend(balancer: balancing.Balancer, steps: int,
            learning_rate: float = 0.02) -> Callable:
  """From starts [S, 2] to the points after every step, [S, steps, 2], and the last state.

  Methods on losses assume that these are positive: they see how far the objectives are above
  `LOWEST`, whose gradients are the same.
  """
  optimizer, jacobian_of = optax.adam(learning_rate), jax.jacrev(objectives)
  active = jnp.ones(2, bool)

  def step(carry, index):
    theta, moments, state = carry
    jacobian = jacobian_of(theta)
    direction, state = balancing.aggregate(
        balancer, jacobian, losses=objectives(theta) - LOWEST, state=state,
        key=jax.random.fold_in(jax.random.key(0), index))
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
      updates, moments = optimizer.update(direction, moments, theta)
    theta = optax.apply_updates(theta, updates)
    if balancer.after_step:
      state = balancer.after_step(objectives(theta) - LOWEST, active, state)
    return (theta, moments, state), theta

  def run(theta):
    carry = theta, optimizer.init(theta), init_state(balancer, 2, jnp.zeros((2, 2)))
    carry, points = jax.lax.scan(step, carry, jnp.arange(steps, dtype=jnp.int32))
    return points, carry

  # Long paths hang on rounding: here it is that of programs as users compile them.
  return jax.jit(jax.vmap(run), compiler_options={
      "xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True})


def criticality(theta: jax.Array) -> jax.Array:
  """Length of the shortest convex combination of the gradients: zero on the Pareto set."""
  jacobian = jax.jacrev(objectives)(theta)
  direction, _ = balancing.aggregate(balancing.mgda(), jacobian)
  return jnp.linalg.norm(direction)


def near_pareto(points: np.ndarray) -> np.ndarray:
  """Whether points [S, 2] are between the bowls, and next to no direction serves both."""
  between = (np.abs(points[:, 0]) < 7.5) & (points[:, 1] < -6)
  return between & (np.asarray(jax.jit(jax.vmap(criticality))(jnp.asarray(points))) < 0.1)


def test_objectives():
  """Values of the formulas, written out by hand."""
  np.testing.assert_allclose(objectives(jnp.array([7.0, -8.0])),
                             np.tanh(4) * np.array([-20, 14**2 / 10 - 20]), rtol=1e-5)
  above = np.tanh(0.5) * np.array(
      [np.log(3.5 - np.tanh(1)) + 6, np.log(3.5 - np.tanh(1)) + 6])
  np.testing.assert_allclose(objectives(jnp.array([0.0, 1.0])), above, rtol=1e-5)
  assert near_pareto(np.array([[0.0, -8.4], [0.0, 8.0]], np.float32)).tolist() == [True, False]


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in ("equal", "mgda", "moco", "famo") else pytest.mark.slow)
    for name in balancing.METHODS])
def test_stays_finite(name):
  points, carry = descend(FIRST[name].build(2), 300)(jnp.asarray(STARTS))
  for leaf in jax.tree.leaves((points, carry)):
    assert np.isfinite(leaf).all()


# Methods whose direction hurts no objective, or next to none.
CONFLICT_AVERSE = ("mgda", "pcgrad", "imtl_g", "imtl", "cagrad", "upgrad", "dualproj", "pcd",
                   "nash_mtl", "fairgrad", "pivrg", "moco")


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFLICT_AVERSE)
def test_conflict_averse_methods_arrive(name):
  points, _ = descend(FIRST[name].build(2), 3000)(jnp.asarray(STARTS))
  assert near_pareto(np.asarray(points[:, -1])).all()


@pytest.mark.slow
def test_equal_weights_are_slow():
  """From the first start they are still on their way, from the second they arrive.

  So are some others, such as `random_weights`, `ntkmtl` and `excess_mtl`.
  """
  points, _ = descend(balancing.equal(), 3000)(jnp.asarray(STARTS))
  assert near_pareto(np.asarray(points[:, -1])).tolist() == [False, True]


@pytest.mark.slow
def test_equal_weights_get_stuck():
  """With steps too short to leap out of a valley, they stay in it from both starts."""
  start, steps, rate = jnp.asarray(STARTS), 30_000, 0.002
  points, _ = descend(balancing.equal(), steps, rate)(start)
  assert (np.asarray(points[:, -1, 1]) > 1).all()
  points, _ = descend(balancing.mgda(), steps, rate)(start)
  assert near_pareto(np.asarray(points[:, -1])).all()
