"""What the methods that solve a program each step promise, beside slower solvers in float64."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from mtl_jax import balancing
from mtl_jax.balancing import quadratic, solvers
from mtl_jax.balancing.balancer import gramian_of

slow = lambda value: pytest.param(value, marks=pytest.mark.slow)
TASKS = (*map(slow, (1, 2)), 3, *map(slow, (11, 40)))
METHODS = {
    "cagrad": {}, "upgrad": {}, "dualproj": {}, "pcd": {}, "nash_mtl": {}, "fairgrad": {},
    "pivrg": {"scores": (3.0, 1.0, -20.0, 0.0, 7.0)},
}


def random_jacobians(num_tasks: int, few: bool = True) -> np.ndarray:
  """Float64 Jacobians [N, T, P], norms alike and up to eight decades apart.

  Their rows span P dimensions: fewer than T, if `few` asks for those too, more, and many more.
  """
  wide = num_tasks + 3, 200
  jacobians = []
  for parameters, spread, common, seed in itertools.product(
      (max(1, num_tasks // 2),) * few + wide, (0, 4), (0, 1), (0, 1)):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num_tasks, parameters)) + common * rng.normal(size=parameters)
    rows *= 10 ** rng.uniform(-spread, spread, size=(num_tasks, 1))
    jacobians.append(np.pad(rows, ((0, 0), (0, 200 - parameters)))[:, :max(wide)])
  return np.stack(jacobians)


def all_weights(name: str, jacobians: np.ndarray, dtype: type = np.float32, **kwargs) -> np.ndarray:
  """Weights [N, T] of one fresh balancer for all Jacobians, from their Gramians in float64."""
  balancer, num_tasks = balancing.get(name, **kwargs), jacobians.shape[1]

  def decide(gramian):
    signals = balancing.Signals(jnp.ones(num_tasks), jnp.ones(num_tasks, bool),
                                jax.random.key(0), gramian)
    return balancer.update(signals, balancer.init(num_tasks))[0].weights

  gramians = np.einsum("ntp,nsp->nts", jacobians, jacobians).astype(dtype)
  return np.asarray(jax.jit(jax.vmap(decide))(gramians), np.float64)


def projection(units: np.ndarray, direction: np.ndarray) -> np.ndarray:
  """`direction` projected onto `units @ d >= 0`, by SciPy's active-set NNLS."""
  x, _ = scipy.optimize.nnls(units.T, -direction, maxiter=100 * len(units))
  return direction + units.T @ x


@pytest.mark.parametrize("num_tasks", TASKS)
def test_projections_are_the_nearest(num_tasks):
  """UPGrad and DualProj in float32 beside NNLS in float64, with few parameters too."""
  jacobians = random_jacobians(num_tasks)[:: 1 if num_tasks < 40 else 3]
  each, together = (all_weights(name, jacobians) for name in ("upgrad", "dualproj"))
  for jacobian, up, dual in zip(jacobians, each, together):
    norms = np.linalg.norm(jacobian, axis=1)
    units = jacobian / norms[:, None]
    expected = np.mean([n * projection(units, u) for n, u in zip(norms, units)], axis=0)
    np.testing.assert_allclose(up @ jacobian, expected, atol=3e-5 * norms.mean())
    expected = projection(units, jacobian.mean(0))
    np.testing.assert_allclose(dual @ jacobian, expected, atol=3e-5 * norms.mean())


@pytest.mark.parametrize("num_tasks", (*map(slow, (1, 2)), 3, slow(11), 40))
def test_pivots_find_what_the_interior_point_finds(num_tasks):
  """Most programs are solved by pivots, to rounding; the interior point has the same minimum."""
  jacobians = random_jacobians(num_tasks, few=False)
  rows = jacobians / np.linalg.norm(jacobians, axis=2, keepdims=True)
  matrices = np.einsum("ntp,nsp->nts", rows, rows)
  rng = np.random.default_rng(1)
  linear = rng.uniform(-1, 1, size=(len(rows), num_tasks))
  mask = rng.uniform(size=linear.shape) < 0.9
  inputs = matrices.astype(np.float32), linear.astype(np.float32), mask
  inside = [np.where(mask[:, :, None] & mask[:, None], inputs[0], 0),
            np.where(mask, inputs[1], 0), mask]
  found, solved = jax.jit(jax.vmap(quadratic._by_pivots))(*inside)
  whole = jax.jit(jax.vmap(quadratic.nonnegative_minimum))(*inputs)
  other = jax.jit(jax.vmap(quadratic._interior_point))(*inside)
  assert np.mean(solved) >= 0.7
  assert not np.any(np.where(mask, 0, whole))
  np.testing.assert_allclose(whole, np.where(solved[:, None], found, other), atol=1e-5)
  for matrix, b, part, y, z in zip(matrices, linear, mask, np.float64(whole), np.float64(other)):
    slope = (matrix @ y - b)[part]
    size = 1 + np.abs(y).max()
    assert slope.min(initial=0) >= -1e-6 * size
    assert np.abs(y[part] * slope).max(initial=0) <= 2e-6 * size**2
    np.testing.assert_allclose(matrix @ y, matrix @ z, atol=2e-5 * size)
  # A slightly wrong sign counts, and not a number is never a solution.
  y = quadratic.nonnegative_minimum(jnp.array([[1.0, 0.5], [0.5, 1.0]]), jnp.array([1.0, 0.4999]),
                                  jnp.ones(2, bool))
  np.testing.assert_allclose(y, [1, 0], atol=1e-6)
  _, solved = quadratic._by_pivots(jnp.eye(2), jnp.array([jnp.nan, -1.0]), jnp.ones(2, bool))
  assert not solved


@pytest.mark.parametrize("num_tasks", TASKS)
@pytest.mark.parametrize("c", [slow(0.1), 0.4, slow(1.0), slow(5.0)])
def test_cagrad_reaches_the_optimum(num_tasks, c):
  """Strong duality: `min_i g_i·d` is what the simplex problem attains, row by row in its units."""
  jacobians = random_jacobians(num_tasks, few=False)
  for jacobian, weights in zip(jacobians, all_weights("cagrad", jacobians, c=c, rescale=0)):
    norms, mean = np.linalg.norm(jacobian, axis=1), jacobian.mean(0)
    radius = c * np.linalg.norm(mean)
    d = weights @ jacobian
    np.testing.assert_allclose(np.linalg.norm(d - mean), radius, rtol=2e-4)
    w = weights - 1 / num_tasks
    assert (w >= -1e-6 * (1 + radius / norms)).all()
    w = np.maximum(w, 0) / np.maximum(w, 0).sum()
    value = w @ jacobian @ mean + radius * np.linalg.norm(w @ jacobian)
    assert ((jacobian @ d - value) / norms).min() >= -2e-5 * (1 + c) * np.linalg.norm(mean)


def test_cagrad_agrees_with_slsqp_in_float64():
  jacobians = np.random.default_rng(0).normal(size=(3, 5, 9))
  with jax.enable_x64(True):
    found = all_weights("cagrad", jacobians, np.float64, c=0.7, rescale=0)
  for jacobian, weights in zip(jacobians, found):
    gramian = jacobian @ jacobian.T
    mean, radius = gramian.mean(1), 0.7 * np.sqrt(gramian.mean())
    best = scipy.optimize.minimize(
        lambda w, G=gramian, b=mean, r=radius: w @ b + r * np.sqrt(w @ G @ w), np.full(5, 0.2),
        method="SLSQP", bounds=[(0, 1)] * 5, options={"ftol": 1e-14, "maxiter": 300},
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1}).x
    push = radius * best / np.sqrt(best @ gramian @ best)
    np.testing.assert_allclose(weights, 0.2 + push, atol=2e-5)


@pytest.mark.slow
def test_cagrad_between_mean_and_mgda():
  """c = 0 is the mean; a large c has the direction of the shortest combination."""
  jacobian = jnp.asarray(np.random.default_rng(2).normal(size=(4, 9)), jnp.float32)
  decide = jax.jit(lambda c: balancing.aggregate(balancing.cagrad(c), jacobian)[0])
  np.testing.assert_allclose(decide(0.0), jacobian.mean(0), rtol=1e-5)
  far, shortest = decide(1e4), balancing.aggregate(balancing.mgda(), jacobian)[0]
  np.testing.assert_allclose(far / jnp.linalg.norm(far), shortest / jnp.linalg.norm(shortest),
                             atol=1e-3)


@pytest.mark.parametrize("num_tasks", TASKS)
@pytest.mark.parametrize("alpha", [slow(0.5), 1.0, slow(2.0)])
def test_fair_weights_solve_their_equations(num_tasks, alpha):
  """In float64 to rounding, for norms eight decades apart; in float32 the same weights."""
  jacobians = random_jacobians(num_tasks, few=False)
  with jax.enable_x64(True):
    exact = all_weights("fairgrad", jacobians, np.float64, alpha=alpha)
  gains = np.einsum("ntp,np->nt", jacobians, np.einsum("nt,ntp->np", exact, jacobians))
  np.testing.assert_allclose(gains, exact ** (-1 / alpha), rtol=1e-5)
  found = all_weights("fairgrad", jacobians, alpha=alpha)
  lengths = np.linalg.norm(jacobians, axis=2)
  shares = (found - exact) * lengths / np.max(exact * lengths, axis=1, keepdims=True)
  np.testing.assert_allclose(shares, 0, atol=1e-4)


def test_fair_weights_at_a_large_alpha():
  """α = 4 with norms two decades apart."""
  rng = np.random.default_rng(0)
  jacobians = rng.normal(size=(4, 11, 200)) * 10 ** rng.uniform(-1, 1, size=(4, 11, 1))
  weights = all_weights("fairgrad", jacobians, alpha=4.0)
  gains = np.einsum("ntp,np->nt", jacobians, np.einsum("nt,ntp->np", weights, jacobians))
  np.testing.assert_allclose(gains, weights**-0.25, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("num_tasks", [2, 11, 40])
def test_nobody_is_harmed(num_tasks):
  """`J d >= 0` up to the rounding of what is added up, from fewer parameters than tasks too."""
  jacobians = random_jacobians(num_tasks)
  norms = np.linalg.norm(jacobians, axis=2)
  for name, kwargs in [("upgrad", {}), ("dualproj", {}), ("cagrad", {"c": 1.0}),
                       ("cagrad", {"c": 5.0}), ("nash_mtl", {}), ("fairgrad", {})]:
    weights = all_weights(name, jacobians, **kwargs)
    d = np.einsum("nt,ntp->np", weights, jacobians)
    parts = np.sum(np.abs(weights) * norms, axis=1)
    gains = np.einsum("ntp,np->nt", jacobians, d) / norms / parts[:, None]
    # 40 tasks in 20 dimensions, norms eight decades apart: α = 2 takes more steps than it is given.
    assert gains.min() >= (-1e-3 if name == "fairgrad" else -3e-5), (name, kwargs)


def test_nash_has_the_norm_that_it_promises():
  jacobians = random_jacobians(11, few=False)
  for max_norm, expected in [(None, 11**0.5), (0.3, 0.3), (100.0, 11**0.5)]:
    weights = all_weights("nash_mtl", jacobians, max_norm=max_norm)
    d = np.einsum("nt,ntp->np", weights, jacobians)
    np.testing.assert_allclose(np.linalg.norm(d, axis=1), expected, rtol=1e-3)


@pytest.mark.parametrize("num_tasks", [2, *map(slow, (3, 11, 40))])
def test_pcd_meets_its_constraints(num_tasks):
  """In its first step: a cosine of τ with all others, the nearest to the leader that has it."""
  jacobians = random_jacobians(num_tasks, few=False)
  for jacobian, weights in zip(jacobians, all_weights("pcd", jacobians, threshold=0.1)):
    norms = np.linalg.norm(jacobian, axis=1)
    units, d = jacobian / norms[:, None], weights @ jacobian
    np.testing.assert_allclose(np.linalg.norm(d), norms[0], rtol=1e-4)
    mixed = weights * norms / (weights[0] * norms[0])  # the leader's share is 1
    slack = units[1:] @ (mixed @ units) - 0.1
    if norms.min() > 1e-2:  # else epsilon has a say
      assert slack.min() >= -1e-4 and mixed.min() >= -1e-6
      np.testing.assert_allclose(mixed[1:] * slack, 0, atol=1e-4)


def test_pcgrad_of_two_tasks_is_twice_upgrad():
  jacobians = random_jacobians(2, few=False)
  np.testing.assert_allclose(all_weights("pcgrad", jacobians),
                             2 * all_weights("upgrad", jacobians), rtol=1e-4)


def test_upgrad_is_linear_in_each_gradient():
  """Scaling the rows by a, by b and by a + b gives directions of which the last is the sum."""
  rng = np.random.default_rng(0)
  jacobian, a, b = rng.normal(size=(5, 9)), *10 ** rng.uniform(-2, 2, size=(2, 5, 1))
  scaled = np.stack([a * jacobian, b * jacobian, (a + b) * jacobian])
  one, other, both = np.einsum("nt,ntp->np", all_weights("upgrad", scaled), scaled)
  np.testing.assert_allclose(one + other, both, atol=1e-5 * np.abs(both).max())


@functools.cache
def decider(name: str) -> Callable:
  balancer = balancing.get(name, **METHODS[name])
  return jax.jit(lambda jacobian: balancing.aggregate(balancer, jacobian))


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"pcd", "pivrg"}))
def test_order_of_tasks_does_not_matter(name):
  decide, rng = decider(name), np.random.default_rng(1)
  for _ in range(5):
    jacobian = jnp.asarray(rng.normal(size=(5, 9)), jnp.float32)
    np.testing.assert_allclose(decide(jacobian[rng.permutation(5)])[0], decide(jacobian)[0],
                               rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name, degree", [
    ("cagrad", 1), ("upgrad", 1), ("dualproj", 1), ("nash_mtl", 0), ("fairgrad", -1 / 3),
    ("pivrg", -1 / 3)])
def test_scale_of_all_gradients(name, degree):
  """`d` is homogeneous in the gradients, of the degree that the docstring implies."""
  decide = decider(name)
  jacobian = jnp.asarray(np.random.default_rng(0).normal(size=(5, 9)), jnp.float32)
  d = decide(jacobian)[0]
  for scale in (1e-10, 1e-5, 1e5, 1e15):
    np.testing.assert_allclose(decide(scale * jacobian)[0] / scale**degree, d, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_zero_gradients():
  """They weigh their share or nothing, and the others decide as without them."""
  rng = np.random.default_rng(0)
  jacobian = np.asarray(rng.normal(size=(5, 9)), np.float32)
  jacobian[2] = 0
  for name, kwargs in METHODS.items():
    balancer = balancing.get(name, **kwargs)
    signals = balancing.Signals(jnp.ones(5), jnp.ones(5, bool), jax.random.key(0),
                                gramian_of(jnp.asarray(jacobian)))
    weights, _ = jax.jit(balancer.update)(signals, balancer.init(5))
    own = {"cagrad": 0.2 / 1.25, "upgrad": 0.2, "dualproj": 0.2}.get(name, 0)
    np.testing.assert_allclose(weights.weights[2], own, rtol=1e-5)
    without = jax.jit(balancer.update)(
        signals._replace(active=jnp.arange(5) != 2), balancer.init(5))[0].weights
    if own == 0 and name != "pivrg":
      np.testing.assert_allclose(weights.weights, without, rtol=1e-4)


@pytest.mark.slow
def test_opposite_gradients_leave_small_directions():
  """No direction serves both: what comes out is finite, and shorter than the gradients."""
  row = np.random.default_rng(0).normal(size=9)
  jacobian = np.stack([row, -2 * row])[None]
  for name, kwargs in [("upgrad", {}), ("dualproj", {}), ("cagrad", {"c": 1.0}), ("nash_mtl", {})]:
    d = all_weights(name, jacobian, **kwargs) @ jacobian[0]
    assert np.linalg.norm(d) <= 1e-2, name


SHARES = "expected one share a task, none negative, found"


@pytest.mark.parametrize("build, sentence", [
    (lambda: balancing.cagrad(-0.1), "cagrad: c: expected a number not below 0, found -0.1"),
    (lambda: balancing.cagrad(rescale=3), "cagrad: rescale: expected 0, 1 or 2, found 3"),
    (lambda: balancing.upgrad((1, -1)), f"upgrad: preference: {SHARES} (1, -1)"),
    (lambda: balancing.upgrad((1, 2)).init(3),
     "upgrad: preference: expected one number for each of the 3 tasks, found (1, 2)"),
    (lambda: balancing.upgrad(regularization=-1),
     "upgrad: regularization: expected a number not below 0, found -1"),
    (lambda: balancing.dualproj(1.0), f"dualproj: preference: {SHARES} 1.0"),
    (lambda: balancing.dualproj(regularization="a"),
     "dualproj: regularization: expected a number not below 0, found 'a'"),
    (lambda: balancing.pcd(-1), "pcd: threshold: expected a number not below 0, or one a task, "
     "found -1"),
    (lambda: balancing.pcd((0.1, 0.2)).init(3),
     "pcd: threshold: expected one number for each of the 3 tasks, found (0.1, 0.2)"),
    (lambda: balancing.pcd(decay=1.0), "pcd: decay: expected a number in [0, 1), found 1.0"),
    (lambda: balancing.pcd(epsilon=0), "pcd: epsilon: expected a number above 0, found 0"),
    (lambda: balancing.nash_mtl(0.0),
     "nash_mtl: max_norm: expected a number above 0 or None, found 0.0"),
    (lambda: balancing.fairgrad(0), "fairgrad: alpha: expected a number above 0, found 0"),
    (lambda: balancing.pivrg(3.0), "pivrg: scores: expected one finite score a task, found 3.0"),
    (lambda: balancing.pivrg((1, 2), bound=1),
     "pivrg: bound: expected a number above 1, found 1"),
    (lambda: balancing.pivrg((1, 2), min_temperature=0),
     "pivrg: min_temperature: expected a number above 0, found 0"),
])
def test_mistakes_are_named(build, sentence):
  with pytest.raises(ValueError) as caught:
    build()
  assert str(caught.value) == sentence


@pytest.mark.slow
def test_equal_gradients():
  """The scale that each method declares: with equal gradients g, "mean" gives g."""
  rows = jnp.tile(jnp.array([[1.0, -2.0, 0.5]]), (5, 1))
  norm = jnp.linalg.norm(rows[0])
  factors = {"cagrad": 1.2, "nash_mtl": 1 / norm, "fairgrad": 5 ** (1 / 3) * norm ** (-4 / 3)}
  for name in METHODS.keys() - {"pivrg"}:
    np.testing.assert_allclose(decider(name)(rows)[0], factors.get(name, 1.0) * rows[0], rtol=1e-4)


def test_regularized_leaves_zero_rows():
  gramian = jnp.diag(jnp.array([2.0, 0.0, jnp.nan]))
  found = solvers.regularized(gramian, jnp.array([True, True, False]), 0.5)
  assert found[0, 0] == 3 and found[1, 1] == 0
