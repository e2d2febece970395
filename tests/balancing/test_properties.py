"""What the methods' papers promise, on random gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from mtl_jax import balancing
from mtl_jax.balancing import solvers
from mtl_jax.balancing.balancer import gramian_of

J2 = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])


def random_jacobians(num_tasks: int) -> list[np.ndarray]:
  """Float64 Jacobians with fewer and more parameters than tasks, norms alike and far apart."""
  jacobians = []
  for parameters, spread, common, seed in itertools.product(
      (max(1, num_tasks // 2), num_tasks + 3, 500), (0, 4), (0, 1), (0, 1)):
    rng = np.random.default_rng(seed)
    jacobian = rng.normal(size=(num_tasks, parameters)) + common * rng.normal(size=parameters)
    jacobians.append(jacobian * 10 ** rng.uniform(-spread, spread, size=(num_tasks, 1)))
  return jacobians


def shortest_norm(jacobian: np.ndarray, prices: np.ndarray) -> float:
  """The squared minimum norm with `prices·w = 1`, by SciPy's active-set NNLS on unit rows."""
  norms = np.linalg.norm(jacobian, axis=1)
  costs = prices / norms
  costs /= costs.max()
  stacked = np.vstack([(jacobian / norms[:, None]).T, costs])
  y, _ = scipy.optimize.nnls(stacked, np.append(np.zeros(jacobian.shape[1]), 1.0))
  weights = y / norms
  weights /= prices @ weights
  return np.sum((weights @ jacobian) ** 2)


@pytest.mark.parametrize("num_tasks, normalization", [
    (3, "none"), (40, "none"), (3, "l2"), *(pytest.param(*row, marks=pytest.mark.slow) for row in (
        (1, "none"), (2, "none"), (11, "none"), (40, "l2")))])
def test_mgda_reaches_the_minimum(num_tasks, normalization):
  """In float32: within 1e-5 of SciPy's float64 minimum, on the simplex, and KKT holds."""
  jacobians = random_jacobians(num_tasks)
  gramians = np.stack([J @ J.T for J in jacobians])
  balancer = balancing.mgda(normalization)

  @jax.jit
  @jax.vmap
  def decide(gramian):
    signals = balancing.Signals(jnp.ones(num_tasks), jnp.ones(num_tasks, bool),
                                jax.random.key(0), gramian)
    return balancer.update(signals, ())[0].weights

  for jacobian, weights in zip(jacobians, decide(jnp.asarray(gramians, jnp.float32))):
    weights = np.asarray(weights, np.float64)
    norms = np.linalg.norm(jacobian, axis=1)
    prices = norms if normalization == "l2" else np.ones(num_tasks)
    assert (weights >= 0).all()
    np.testing.assert_allclose(prices @ weights, 1, rtol=1e-6)

    d = weights @ jacobian
    value, best = d @ d, shortest_norm(jacobian, prices)
    # Rounding G to float32 moves the value by 1e-7 of the best single row; all else is relative.
    rounding = 1e-6 * np.min(norms / prices) ** 2
    assert value - best <= 1e-5 * best + rounding
    if best < rounding:  # zero is in the hull: the value has said it all
      continue
    # KKT: (G w)_i >= prices_i wᵀGw, each in units of its own row.
    slack = (jacobian @ d / prices - value) * np.min(norms / prices) / (norms / prices)
    assert slack.min() >= -(1e-5 * value + rounding)


@pytest.mark.slow
def test_mgda_agrees_with_slsqp_in_float64():
  rng = np.random.default_rng(3)
  with jax.enable_x64(True):
    for num_tasks in (3, 11):
      jacobian = rng.normal(size=(num_tasks, 30))
      gramian = jacobian @ jacobian.T
      weights = solvers.shortest_combination(jnp.asarray(gramian), jnp.ones(num_tasks, bool))
      reference = scipy.optimize.minimize(
          lambda w, G=gramian: w @ G @ w, np.full(num_tasks, 1 / num_tasks),
          jac=lambda w, G=gramian: 2 * G @ w, method="SLSQP", bounds=[(0, 1)] * num_tasks,
          constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, options={"ftol": 1e-14})
      assert weights.dtype == jnp.float64
      np.testing.assert_allclose(weights, reference.x, atol=1e-5)
      gap = weights @ gramian @ weights - np.min(gramian @ weights)
      assert gap <= 1e-10 * (weights @ gramian @ weights)


def test_mgda_takes_a_gramian_that_rounding_made_indefinite():
  """Twenty gradients in five dimensions: float32 products leave negative eigenvalues."""
  jacobian = np.random.default_rng(0).normal(size=(20, 5)) + np.array([0.5, 0, 0, 0, 0])
  gramian = (jacobian @ jacobian.T).astype(np.float32)
  assert np.linalg.eigvalsh(gramian.astype(np.float64)).min() < -1e-8
  with jax.enable_x64(True):
    weights = np.asarray(solvers.shortest_combination(jnp.asarray(gramian, jnp.float64),
                                                      jnp.ones(20, bool)))
  np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
  value = np.sum((weights @ jacobian) ** 2)
  assert value <= shortest_norm(jacobian, np.ones(20)) + 1e-5


@pytest.mark.parametrize("name", ["mgda", "pcgrad"])
def test_scale_of_all_gradients_does_not_matter(name):
  balancer = balancing.get(name)
  jacobian = jnp.asarray(np.random.default_rng(0).normal(size=(5, 9)), jnp.float32)

  @jax.jit
  def decide(jacobian):
    signals = balancing.Signals(jnp.ones(5), jnp.ones(5, bool), jax.random.key(0),
                                gramian_of(jacobian))
    return balancer.update(signals, ())[0].weights

  for scale in (1e-10, 1e-5, 1e5, 1e15):
    np.testing.assert_allclose(decide(scale * jacobian), decide(jacobian), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["equal", "mgda"])
def test_order_of_tasks_does_not_matter(name):
  balancer, rng = balancing.get(name), np.random.default_rng(1)
  decide = jax.jit(lambda jacobian: balancing.aggregate(balancer, jacobian)[0])
  for _ in range(5):
    jacobian = jnp.asarray(rng.normal(size=(5, 9)), jnp.float32)
    np.testing.assert_allclose(decide(jacobian[rng.permutation(5)]), decide(jacobian), rtol=1e-4,
                               atol=1e-5)


def test_mgda_serves_every_task():
  """No task conflicts with d; with equal gradients d is that gradient."""
  decide = jax.jit(lambda jacobian: balancing.aggregate(balancing.mgda(), jacobian)[0])
  rng = np.random.default_rng(2)
  for _ in range(5):
    jacobian = jnp.asarray(rng.normal(size=(4, 9)), jnp.float32)
    d = decide(jacobian)
    assert (jacobian @ d >= (1 - 1e-4) * jnp.dot(d, d)).all()
  alike = jnp.tile(jacobian[:1], (4, 1))
  np.testing.assert_allclose(decide(alike), alike[0], rtol=1e-5)


def test_mgda_of_a_zero_gradient_stands_still():
  jacobian = jnp.array([[1.0, 2.0], [0.0, 0.0], [3.0, -1.0]])
  for normalization in ("none", "loss+"):
    balancer = balancing.mgda(normalization)
    d, _ = jax.jit(lambda jacobian, b=balancer: balancing.aggregate(b, jacobian))(jacobian)
    np.testing.assert_allclose(d, 0, atol=1e-6)


def test_pcgrad_of_two_tasks():
  """The formula of the paper's first example; nobody is harmed, and no conflict means the sum."""
  decide = jax.jit(lambda jacobian: balancing.aggregate(balancing.pcgrad(), jacobian)[0])
  rng = np.random.default_rng(0)
  for _ in range(20):
    a, b = rng.normal(size=(2, 3))
    overlap = min(a @ b, 0)
    expected = a - overlap / (b @ b) * b + b - overlap / (a @ a) * a
    jacobian = jnp.asarray(np.stack([a, b]), jnp.float32)
    d = decide(jacobian)
    np.testing.assert_allclose(d, expected, rtol=1e-4, atol=1e-5)
    assert (jacobian @ d >= -1e-5).all()


def test_pcgrad_draws_every_order():
  """With three tasks in conflict, each of the 2³ orders occurs, and nothing else does."""
  jacobian = np.array([[2.0, -1.0, -0.5], [-1.0, 1.0, -0.7], [-0.5, -0.6, 1.5]])

  def project(i, others):
    g = jacobian[i]
    for j in others:
      g = g - min(g @ jacobian[j], 0) / (jacobian[j] @ jacobian[j]) * jacobian[j]
    return g

  results = [[project(i, order) for order in itertools.permutations({0, 1, 2} - {i})]
             for i in range(3)]
  expected = {tuple(np.round(sum(rows), 3)) for rows in itertools.product(*results)}
  assert len(expected) == 8
  draw = jax.jit(jax.vmap(lambda key: balancing.aggregate(
      balancing.pcgrad(), jnp.asarray(jacobian, jnp.float32), key=key)[0]))
  found = np.asarray(draw(jax.random.split(jax.random.key(0), 200)), np.float64)
  nearest = [min(expected, key=lambda e, d=d: np.abs(d - e).max()) for d in found]
  np.testing.assert_allclose(found, nearest, atol=1e-3)
  assert set(nearest) == expected


def test_graddrop_draws_by_agreement():
  """On J2 the first coordinate is 6 with probability 0.6, else -4; the others are certain."""
  draw = jax.jit(jax.vmap(lambda key: balancing.aggregate(balancing.graddrop(), J2, key=key)[0]))
  d = np.asarray(draw(jax.random.split(jax.random.key(0), 10_000)))
  assert set(d[:, 0]) == {-4.0, 6.0}
  assert abs(np.mean(d[:, 0] == 6) - 0.6) < 0.02  # four standard deviations
  assert (d[:, 1:] == 2).all()


def test_graddrop_keeps_one_sign():
  """Each coordinate is the sum of its positive or of its negative gradients, leaf by leaf."""
  rng = np.random.default_rng(0)
  tree = {"a": rng.normal(size=(3, 4, 5)), "b": rng.normal(size=(3, 20))}
  tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
  d, _ = balancing.aggregate(balancing.graddrop(), tree)
  for leaf, g in zip(jax.tree.leaves(d), jax.tree.leaves(tree)):
    positive, negative = jnp.maximum(g, 0).sum(0), jnp.minimum(g, 0).sum(0)
    assert (np.isclose(leaf, positive, atol=1e-6) | np.isclose(leaf, negative, atol=1e-6)).all()

  everything, _ = balancing.aggregate(balancing.graddrop(leak=1.0), tree)
  total, _ = balancing.aggregate(balancing.equal(), tree)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), everything,
               total)


def test_graddrop_leaves_draw_apart():
  """Two equal leaves do not make the same choices; the same key makes the same ones again."""
  rows = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64)), jnp.float32)
  tree = {"a": rows, "b": rows}
  d, _ = balancing.aggregate(balancing.graddrop(), tree)
  again, _ = balancing.aggregate(balancing.graddrop(), tree)
  assert (d["a"] != d["b"]).any()
  np.testing.assert_array_equal(d["a"], again["a"])
