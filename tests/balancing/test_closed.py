"""What the papers of the methods with closed forms promise, and mistakes in their hyperparameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import balancing, testing
from mtl_jax.balancing.balancer import init_state

NAMES = ["imtl_g", "imtl", "aligned_mtl", "conflict_free", "gradnorm", "ntkmtl", "krum",
         "trimmed_mean", "moco", "db_mtl", "excess_mtl"]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def direct(balancer: balancing.Balancer, jacobian: np.ndarray) -> np.ndarray:
  """The first step's direction, in float64."""
  d, _ = jax.jit(lambda jacobian: balancing.aggregate(balancer, jacobian))(jacobian)
  return np.asarray(d, np.float64)


@pytest.mark.parametrize("spread", [0, 3])
def test_imtl_g_has_equal_projections(spread):
  jacobian = normal(5, 20) * 10 ** np.linspace(-spread, spread, 5, dtype=np.float32)[:, None]
  unit = jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)
  for name in ("imtl_g", "imtl"):
    projections = unit @ direct(balancing.get(name), jacobian)
    np.testing.assert_allclose(projections, projections[0], rtol=1e-3)
    assert projections[0] > 0


def test_imtl_g_of_opposite_gradients_stands_still():
  for jacobian in ([[1, 2], [-3, -6]], [[1, 2], [-3, -6.001]]):
    np.testing.assert_allclose(direct(balancing.imtl_g(), np.array(jacobian, np.float32)), 0,
                               atol=1e-3)


def test_imtl_g_stays_bounded():
  """Norms for which the weights' sum vanishes before it is scaled to one."""
  unit = np.array([[1, 0, 0.1], [0, 1, 0.1], [0.5, 0.5, 0.05]])
  unit /= np.linalg.norm(unit, axis=1, keepdims=True)
  y = np.linalg.pinv(unit @ unit.T) @ np.ones(3)
  norms = np.where(y < 0, -y[y < 0].sum() / y[y > 0].sum(), 1)  # Σ y / norms = 0
  assert y.min() < 0 < y.max()
  d = direct(balancing.imtl_g(), (unit * norms[:, None]).astype(np.float32))
  assert np.isfinite(d).all() and 10 < np.abs(d).max() < 1e5


@pytest.mark.parametrize("length, expected", [
    ("min", np.min), ("max", np.max), ("mean", np.mean),
    ("harmonic", lambda norms: 1 / np.mean(1 / norms)),
    ("geometric", lambda norms: np.exp(np.mean(np.log(norms)))),
    ("projection", None),
])
def test_conflict_free_has_equal_positive_cosines(length, expected):
  jacobian = normal(4, 12) * np.array([[0.1], [1], [3], [50]], np.float32)
  d = direct(balancing.conflict_free(length), jacobian)
  norms = np.linalg.norm(jacobian, axis=1)
  cosines = jacobian @ d / norms / np.linalg.norm(d)
  np.testing.assert_allclose(cosines, cosines[0], rtol=1e-4)
  assert cosines[0] > 0.1
  wanted = (jacobian @ d).sum() / np.linalg.norm(d) if expected is None else expected(norms)
  np.testing.assert_allclose(np.linalg.norm(d), wanted, rtol=1e-4)


def test_conflict_free_of_opposite_gradients_stands_still():
  jacobian = np.array([[1, 2], [-3, -6]], np.float32)
  for length in ("projection", "max"):
    np.testing.assert_allclose(direct(balancing.conflict_free(length), jacobian), 0, atol=1e-5)


@pytest.mark.parametrize("scale, length", [
    ("min", lambda values: values[-1]), ("median", lambda values: values[2]),
    ("rmse", lambda values: np.sqrt(np.mean(values**2)))])
def test_aligned_gradients_have_one_length(scale, length):
  """One aligned gradient for each preference of one task: orthogonal and equally long."""
  jacobian = normal(4, 12) * np.array([[0.3], [1], [2], [5]], np.float32)
  aligned = jax.jit(jax.vmap(lambda preference: balancing.aggregate(
      balancing.aligned_mtl(scale, preference), jnp.asarray(jacobian))[0]))(jnp.eye(4))
  values = np.linalg.svd(jacobian, compute_uv=False)
  np.testing.assert_allclose(np.linalg.svd(aligned, compute_uv=False), length(values), rtol=1e-4)


def test_aligned_mtl_of_dependent_gradients():
  """Two equal gradients and another: the smaller of the two nonzero singular values is left."""
  rows = normal(2, 6)
  jacobian = rows[[0, 0, 1]]
  aligned = jax.jit(jax.vmap(lambda preference: balancing.aggregate(
      balancing.aligned_mtl("min", preference), jnp.asarray(jacobian))[0]))(jnp.eye(3))
  smallest = np.linalg.svd(jacobian, compute_uv=False)[1]
  np.testing.assert_allclose(np.linalg.svd(aligned, compute_uv=False), [smallest, smallest, 0],
                             atol=1e-4)


def test_ntkmtl_makes_norms_equal():
  jacobian = normal(5, 9) * np.array([[1e-3], [0.1], [1], [10], [1e3]], np.float32)
  total = np.linalg.norm(jacobian)
  unit = jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)
  np.testing.assert_allclose(direct(balancing.ntkmtl(), jacobian), total * unit.sum(0), rtol=1e-4)


def test_gradvac_reaches_its_target():
  """Two tasks whose target is 0.5: the cosine of each with the other's gradient becomes 0.5."""
  jacobian = np.array([[1, 0, 0], [-0.3, 2, 0]], np.float32)
  balancer = balancing.gradvac()
  state = init_state(balancer, 2, jacobian)._replace(targets=jnp.full((2, 2), 0.5))
  d, state = balancing.aggregate(balancer, jnp.asarray(jacobian), state=state)
  norms = np.linalg.norm(jacobian, axis=1)
  unit = jacobian / norms[:, None]
  cosine = unit[0] @ unit[1]
  gain = 0.5 * ((1 - cosine**2) / 0.75)**0.5 - cosine
  turned = np.stack([unit[0] + gain * unit[1], unit[1] + gain * unit[0]])
  cosines = np.sum(turned * unit[::-1], axis=1) / np.linalg.norm(turned, axis=1)
  np.testing.assert_allclose(cosines, 0.5, rtol=1e-6)
  np.testing.assert_allclose(d, norms @ turned, rtol=1e-5)
  assert np.diagonal(state.targets).tolist() == [0.5, 0.5]


def test_gradvac_survives_a_target_of_one():
  """Equal gradients for long, then orthogonal ones, of which each task asks for a multiple."""
  balancer, num_tasks = balancing.gradvac(), 12
  state = init_state(balancer, num_tasks, None)
  alike = jnp.asarray(np.repeat(normal(1, 20), num_tasks, axis=0))
  step = jax.jit(lambda jacobian, state: balancing.aggregate(balancer, jacobian, state=state))
  for _ in range(40):
    d, state = step(alike, state)
  np.testing.assert_allclose(d, num_tasks * alike[0], rtol=1e-4)
  d, state = step(jnp.eye(num_tasks, 20), state)
  assert np.isfinite(d).all() and np.isfinite(state.targets).all()


def test_gradvac_keeps_targets_of_the_absent():
  balancer = balancing.gradvac()
  state = init_state(balancer, 3, None)._replace(targets=jnp.asarray(normal(3, 3) / 10))
  active = jnp.array([True, False, True])
  _, new = balancing.aggregate(balancer, jnp.asarray(normal(3, 5)), active=active, state=state)
  same = np.asarray(new.targets == state.targets)
  np.testing.assert_array_equal(same, [[1, 1, 0], [1, 1, 1], [0, 1, 1]])


def test_gradnorm_brings_norms_together():
  jacobian = np.eye(3, dtype=np.float32) * np.array([[0.5], [1], [2]], np.float32)
  balancer = balancing.gradnorm(alpha=0.0, learning_rate=0.01)
  step = lambda _, state: balancing.aggregate(balancer, jnp.asarray(jacobian), state=state)[1]
  state = jax.lax.fori_loop(0, 500, step, init_state(balancer, 3, jacobian))
  np.testing.assert_allclose(state.weights * np.array([0.5, 1, 2]), 6 / 7, rtol=0.1)


def test_trimmed_mean_is_numpy_s():
  jacobian = normal(7, 30)
  for trim in (0, 1, 3):
    expected = np.sort(jacobian, axis=0)[trim:7 - trim].mean(0)
    np.testing.assert_allclose(direct(balancing.trimmed_mean(trim), jacobian), expected,
                               rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(direct(balancing.trimmed_mean(9), jacobian),
                             np.median(jacobian, axis=0), rtol=1e-6)
  even, _ = balancing.aggregate(balancing.trimmed_mean(9), jnp.asarray(jacobian),
                                active=jnp.arange(7) != 2)
  np.testing.assert_allclose(even, np.median(np.delete(jacobian, 2, axis=0), axis=0), rtol=1e-5)


def test_trimmed_mean_shares_what_is_kept_of_equal_values():
  """One of three fives is the median: each task counts a third of its own."""
  jacobian = jnp.array([[1.0, 0], [5, 2], [5, 0], [5, 8], [9, -1]])
  decision, _ = balancing.trimmed_mean(2).update(
      testing.signals_of(balancing.trimmed_mean(2), (), jacobian), ())
  np.testing.assert_allclose(decision.direction, [5, 0], rtol=1e-6)
  np.testing.assert_allclose(decision.weights, np.array([0, 25 / 29, 1, 25 / 89, 0]) / 3, rtol=1e-6)


def test_trimmed_mean_drops_what_is_not_a_number_where_it_may():
  jacobian = jnp.array([[np.nan, 1], [2, -np.inf], [4, 2], [8, 4], [16, 3]])
  decision, _ = balancing.trimmed_mean().update(
      testing.signals_of(balancing.trimmed_mean(), (), jacobian), ())
  np.testing.assert_allclose(decision.direction, [28 / 3, 2], rtol=1e-6)
  np.testing.assert_allclose(decision.weights, [0, 0, 1 / 3, 64 / 240, 1 / 3], rtol=1e-6)
  assert not np.isfinite(direct(balancing.trimmed_mean(), jacobian.at[3, 0].set(np.nan))[0])


def test_krum_leaves_out_what_is_far():
  jacobian = normal(8, 30)
  jacobian[[2, 5]] *= 1e6
  d = direct(balancing.krum(2, 6), jacobian)
  np.testing.assert_allclose(d, np.delete(jacobian, [2, 5], axis=0).mean(0), rtol=1e-4, atol=1e-6)


def test_moco_finds_the_shortest_combination():
  """With the same gradients at every step and a constant step size it ends at MGDA's weights."""
  jacobian = jnp.asarray(normal(3, 8))
  balancer = balancing.moco(weight_step=0.05, step_power=0.0, weight_step_power=0.0)
  step = lambda _, state: balancing.aggregate(balancer, jacobian, state=state)[1]
  state = jax.lax.fori_loop(0, 300, step, init_state(balancer, 3, jacobian))
  d, _ = balancing.aggregate(balancer, jacobian, state=state)
  np.testing.assert_allclose(d, direct(balancing.mgda(), jacobian), atol=1e-4)


def test_moco_shares_what_the_absent_leave():
  balancer, jacobian = balancing.moco(), jnp.asarray(normal(3, 8))
  state = init_state(balancer, 3, jacobian)._replace(weights=jnp.array([0.5, 0.2, 0.3]))
  _, state = balancing.aggregate(balancer, jacobian, state=state,
                                 active=jnp.array([True, False, True]))
  np.testing.assert_allclose(state.weights.sum(), 1, rtol=1e-6)
  assert state.weights[1] == jnp.float32(0.2) and state.count.tolist() == [1, 0, 1]


@pytest.mark.parametrize("name", ["moco", "db_mtl", "excess_mtl"])
def test_low_precision_gradients_are_averaged_in_float32(name):
  grads = {"w": jnp.asarray(normal(2, 3, 4)).astype(jnp.bfloat16),
           "b": jax.ShapeDtypeStruct((2,), jnp.float32)}
  state = init_state(balancing.get(name), 2, grads)
  held = state[0]
  assert held["w"].shape == (2, 3, 4) and held["b"].shape == (2,)
  assert held["w"].dtype == held["b"].dtype == jnp.float32


def test_db_mtl_does_not_see_the_scale_of_a_loss():
  jacobian, factors = normal(3, 8), np.array([1.0, 100.0, 0.01], np.float32)
  balancer = balancing.db_mtl(decay=0.0)
  plain, _ = balancing.aggregate(balancer, jnp.asarray(jacobian))
  scaled, _ = balancing.aggregate(balancer, jnp.asarray(jacobian * factors[:, None]),
                                  losses=jnp.asarray(factors))
  np.testing.assert_allclose(scaled, plain, rtol=1e-4, atol=1e-5)


def test_excess_mtl_helps_the_task_whose_gradient_lasts():
  """The first task converges, the second has constant gradients: it gains weight."""
  balancer, weights = balancing.excess_mtl(0.1), []
  state = init_state(balancer, 2, jnp.ones((2, 2)))
  step = jax.jit(lambda jacobian, state: balancing.aggregate(balancer, jacobian, state=state))
  for i in range(20):
    d, state = step(jnp.array([[0.5**i, 0.0], [0.0, 1.0]]), state)
    weights.append(d[1])
  assert weights[0] == 1 and (np.diff(weights[1:]) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_order_of_tasks_does_not_matter(name):
  jacobian = normal(5, 9, seed=1)
  order = np.array([3, 0, 4, 1, 2])
  balancer = balancing.get(name)
  np.testing.assert_allclose(direct(balancer, jacobian[order]), direct(balancer, jacobian),
                             rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES + ["gradvac"])
def test_equal_gradients_come_out_at_the_scale_that_is_told(name):
  balancer = balancing.get(name)
  d = direct(balancer, np.ones((4, 3), np.float32))
  if balancer.scale != "own":
    np.testing.assert_allclose(d, {"sum": 4, "mean": 1}[balancer.scale], rtol=1e-5)
  else:
    assert (d > 0).all()


@pytest.mark.parametrize("build, sentence", [
    (lambda: balancing.gradvac(1.5), "gradvac: decay: expected a number in [0, 1], found 1.5"),
    (lambda: balancing.imtl(0.0), "imtl: learning_rate: expected a number above 0, found 0.0"),
    (lambda: balancing.aligned_mtl("mean"),
     "aligned_mtl: scale: expected 'min', 'median' or 'rmse', found 'mean'"),
    (lambda: balancing.aligned_mtl(preference=(0, 0)),
     "aligned_mtl: preference: expected one number a task, none negative, not all zero, "
     "found (0, 0)"),
    (lambda: balancing.aligned_mtl(preference=(1, 1)).init(3),
     "aligned_mtl: preference: expected one number for each of the 3 tasks, found (1, 1)"),
    (lambda: balancing.conflict_free("sum"),
     "conflict_free: length: expected 'projection', 'min', 'max', 'mean', 'harmonic' or "
     "'geometric', found 'sum'"),
    (lambda: balancing.gradnorm(-1.0),
     "gradnorm: alpha: expected a number not below 0, found -1.0"),
    (lambda: balancing.gradnorm(learning_rate=0),
     "gradnorm: learning_rate: expected a number above 0, found 0"),
    (lambda: balancing.ntkmtl(2.0), "ntkmtl: power: expected a number in [0, 1], found 2.0"),
    (lambda: balancing.krum(-1), "krum: byzantine: expected an integer not below 0, found -1"),
    (lambda: balancing.krum(1, 0), "krum: selected: expected an integer not below 1, found 0"),
    (lambda: balancing.krum(1, 1.5), "krum: selected: expected an integer not below 1, found 1.5"),
    (lambda: balancing.krum(distance="cosine"),
     "krum: distance: expected 'squared' or 'plain', found 'cosine'"),
    (lambda: balancing.trimmed_mean(0.1),
     "trimmed_mean: trim: expected an integer not below 0, found 0.1"),
    (lambda: balancing.moco(2.0), "moco: step: expected a number in [0, 1], found 2.0"),
    (lambda: balancing.moco(ridge=-1.0), "moco: ridge: expected a number not below 0, found -1.0"),
    (lambda: balancing.moco(normalization="l2"),
     "moco: normalization: expected 'none' or 'loss', found 'l2'"),
    (lambda: balancing.moco(simplex="clip"),
     "moco: simplex: expected 'projection' or 'softmax', found 'clip'"),
    (lambda: balancing.db_mtl(1.0), "db_mtl: decay: expected a number in [0, 1), found 1.0"),
    (lambda: balancing.db_mtl(decay_power=-1),
     "db_mtl: decay_power: expected a number not below 0, found -1"),
    (lambda: balancing.excess_mtl(0.0),
     "excess_mtl: learning_rate: expected a number above 0, found 0.0"),
    (lambda: balancing.excess_mtl(start="skip"),
     "excess_mtl: start: expected 'record' or 'update', found 'skip'"),
])
def test_mistakes_are_named(build, sentence):
  with pytest.raises(ValueError) as caught:
    build()
  assert str(caught.value) == sentence
