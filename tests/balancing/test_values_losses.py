"""Golden values of the methods that look at losses only, with where they come from.

"TorchJD" are values that the unit tests of version 0.17 publish for an objective; a weight is the
objective's gradient with respect to a loss. All else is derived by hand in the comments.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import balancing
from mtl_jax.balancing.go4align import group_means
from tests.balancing.rows import LOSSES

E = np.e


def walk(balancer, *steps, active=None, key=None):
  """Weights of a fresh balancer in each of some steps, and its last state."""
  num_tasks = len(steps[0])
  state, update, weights = balancer.init(num_tasks), jax.jit(balancer.update), []
  active = [[True] * num_tasks] * len(steps) if active is None else active
  for losses, present in zip(steps, active, strict=True):
    signals = balancing.Signals(jnp.asarray(losses, jnp.float32), jnp.asarray(present),
                                jax.random.key(0) if key is None else key)
    decision, state = update(signals, state)
    weights.append(np.asarray(decision.weights))
  return weights, state


def weigh(balancer, *steps, **kwargs):
  """Weights of a fresh balancer in the last of some steps."""
  return walk(balancer, *steps, **kwargs)[0][-1]


PUBLISHED = [
    # TorchJD: the geometric mean of (1, 2, 4) is 2; over T L it is the gradient.
    ("geometric", {}, [[1, 2, 4]], [2 / 3, 1 / 3, 1 / 6]),
    # TorchJD: at s = 0 the sum, 7.
    ("imtl_l", {}, [[1, 2, 4]], [1, 1, 1]),
    # TorchJD: of two zeros log 2, a smooth maximum of equals; of (1, 1) 1 + log 2.
    ("stch", {"weights": (1.0, 1.0)}, [[0, 0]], [0.5, 0.5]),
    ("stch", {"weights": (1.0, 1.0)}, [[1, 1]], [0.5, 0.5]),
    # TorchJD: with μ = 1e-10 the maximum of (1, 2, 3) 1e30 / 3, which is 1e30.
    ("stch", {"mu": 1e-10}, [[1e30, 2e30, 3e30]], [0, 0, 1 / 3]),
    # LibMTL: with nadir 1 and μ = 1, 2 log(1 + 2) = 2.197225; both gradients 2/3.
    ("stch", {"warmup": 0, "nadir_steps": 1}, [[1, 1], [1, 2]], [2 / 3, 2 / 3]),
    # TorchJD: with λ = (1, 1) at (2, 0), 2√2 at θ = 1 and √2 at θ = 0.
    ("pbi", {"theta": 1.0, "weights": (1.0, 1.0)}, [[2, 0]], [2**0.5, 0]),
    ("pbi", {"theta": 0.0, "weights": (1.0, 1.0)}, [[2, 0]], [0.5**0.5, 0.5**0.5]),
    # TorchJD: λ = 1 and r = (½, ½) at (1, 1): 1 - 1; λ = 0: r·L = 10 for (2, 1)·(3, 4).
    ("cosmos", {"weights": (0.5, 0.5)}, [[1, 1]], [0.5, 0.5]),
    ("cosmos", {"penalty": 0.0, "weights": (2.0, 1.0)}, [[3, 4]], [2, 1]),
    # TorchJD: τ = 2, means (1, 1) and then (1, 4): r = (1, 4); at (3, 5) the objective 9.270298.
    ("dwa", {"window": 1}, [[1, 1], [1, 4], [3, 5]], [0.364851, 1.635149]),
    # FAMO's first step on (1, 2): the objective 0.4620981, its gradient (2, 1) / 3.
    ("famo", {}, [[1, 2]], [2 / 3, 1 / 3]),
]


@pytest.mark.parametrize("name, kwargs, steps, weights", PUBLISHED)
def test_published(name, kwargs, steps, weights):
  np.testing.assert_allclose(weigh(balancing.get(name, **kwargs), *steps), weights, rtol=1e-5,
                             atol=1e-6)


DERIVED = [
    ("scale_invariant", {}, [[1, 2, 4]], [1, 1 / 2, 1 / 4]),
    ("scale_invariant", {}, [[0, 1e-30, -1]], [1e20, 1e20, 1e20]),
    # 1 / (2 c²) with c² = 1, and with c² = 4.
    ("revised_uncertainty", {}, [[1, 2]], [1 / 2, 1 / 2]),
    ("revised_uncertainty", {"init": np.log(4.0)}, [[1, 2]], [1 / 8, 1 / 8]),
    ("imtl_l", {"init": np.log(3.0)}, [[1, 2]], [3, 3]),
    # Windows of two: means (2, 4), then (1, 4), so r = (½, 1); τ = ½ makes exponents (1, 2).
    ("dwa", {"window": 2, "temperature": 0.5}, [[1, 3], [3, 5], [1, 7], [1, 1], [9, 9]],
     [2 / (1 + E), 2 * E / (1 + E)]),
    # Softmax of (1, 2), halved by λ.
    ("stch", {}, [[2, 4]], [0.5 / (1 + E), 0.5 * E / (1 + E)]),
    # Equal losses share, however small μ is: a difference that is rounding counts as none.
    ("stch", {"mu": 1e-10}, [[0.3, 0.3, 0.1]], [1 / 6, 1 / 6, 0]),
    # λ (L - z) = (2, 1), over μ (4, 2): softmax (E², 1) / (1 + E²), times λ.
    ("stch", {"mu": 0.5, "weights": (1.0, 0.5), "ideal": (1.0, 2.0)}, [[3, 4]],
     [E**2 / (1 + E**2), 0.5 / (1 + E**2)]),
    # λ (L - z) = (½, ¾, ½).
    ("tchebycheff", {"weights": (0.5, 0.25, 0.25), "ideal": (0.0, 1.0, 0.0)}, [[1, 4, 2]],
     [0, 1 / 4, 0]),
    # The first and the last share the maximum 1; each half of its λ.
    ("tchebycheff", {"weights": (1.0, 1.0, 0.5)}, [[1, 0, 2]], [1 / 2, 0, 1 / 4]),
    # L - z = (3, 0): d1 u = (1.5, 1.5), r = (1.5, -1.5); u + 5 r/‖r‖ = (6, -4) / √2.
    ("pbi", {"ideal": (1.0, 2.0)}, [[4, 2]], [6 / 2**0.5, -4 / 2**0.5]),
    # On the ray: u = (3, 4) / 5.
    ("pbi", {"weights": (3.0, 4.0)}, [[6, 8]], [3 / 5, 4 / 5]),
    # cos = 3/5, ‖L‖ = 5: 1 - (1 - 9/25) / 5 and (12/25) / 5.
    ("cosmos", {"weights": (1.0, 0.0)}, [[3, 4]], [0.872, 0.096]),
    # ℓ: (1, 3), (1, 2) and (1, 1): deviations (1, ½, 0) over means (2, 3/2, 1), c = (½, ⅓, 0).
    ("cov_weighting", {}, [[1, 2, 1], [3, 4, 1], [1, 1, 1]], [0.6, 0.4, 0]),
    # Half of the past kept: means (2, 3/2), variances (1, ¼) likewise.
    ("cov_weighting", {"decay": 0.5}, [[1, 2], [3, 4], [1, 1]], [0.6, 0.4]),
    # Before two losses are known all weigh the same.
    ("cov_weighting", {}, [[1, 2], [5, 1]], [0.5, 0.5]),
    # L - b = (1, 3).
    ("famo", {"min_losses": (0.0, 1.0)}, [[1, 4]], [3 / 4, 1 / 4]),
    # Exponents (0, 1); then both have 1.
    ("group_dro", {"step_size": 1.0}, [[0, 1]], [1 / (1 + E), E / (1 + E)]),
    ("group_dro", {"step_size": 1.0}, [[0, 1], [1, 0]], [1 / 2, 1 / 2]),
    # p ∝ exp(-η L) = (1, 1/E, 1/E) with ηL = (0+1, 1+1, 1+1); ΣL = 5, u = 5 p / L with
    # p = (E, 1, 1) / (E + 2): (5 E, 5/2, 5/2) / (E + 2), already in two groups.
    ("go4align", {"step_size": 1.0}, [[1, 2, 2]],
     [5 * E / (E + 2), 2.5 / (E + 2), 2.5 / (E + 2)]),
    # The same in one group: their mean, (5 E + 5) / (3 E + 6).
    ("go4align", {"groups": 1, "step_size": 1.0}, [[1, 2, 2]], [5 * (E + 1) / (3 * E + 6)] * 3),
    # s = ½ each, s M = (½, 1, ½): q = (-1, 2, -1); w = ½ (2/3 + q/10).
    ("ldc_mtl", {"penalty": 0.1, "normalization": "none", "init": 0.0}, [[1, 2, 1]],
     [1 / 3 - 0.05, 1 / 3 + 0.1, 1 / 3 - 0.05]),
    # No sign between equals.
    ("ldc_mtl", {"penalty": 1.0, "normalization": "none"}, [[0.3, 0.3]], [1 / 2, 1 / 2]),
    # The first losses make M = 1 and slopes 1/L: w = 1 / (2 L).
    ("ldc_mtl", {}, [[2, 4]], [1 / 4, 1 / 8]),
    ("ldc_mtl", {"normalization": "log"}, [[2, 4]], [1 / 4, 1 / 8]),
]


@pytest.mark.parametrize("name, kwargs, steps, weights", DERIVED)
def test_derived(name, kwargs, steps, weights):
  atol = 2e-4 if name == "cov_weighting" else 1e-6  # the 1e-8 in its variance
  np.testing.assert_allclose(weigh(balancing.get(name, **kwargs), *steps), weights, rtol=1e-5,
                             atol=atol)


def stch_objective(losses, weights, mu=0.7, ideal=0.1):
  return mu * jax.nn.logsumexp(weights * (losses - ideal) / mu)


def pbi_objective(losses, weights, theta=5.0, ideal=0.1):
  ray = weights / jnp.linalg.norm(weights)
  along = jnp.dot(ray, losses - ideal)
  return along + theta * jnp.linalg.norm(losses - ideal - along * ray)


def cosmos_objective(losses, weights, penalty=1.5):
  cosine = jnp.dot(weights, losses) / jnp.linalg.norm(weights) / jnp.linalg.norm(losses)
  return jnp.dot(weights, losses) - penalty * cosine


def ldc_objective(losses, weights, penalty=0.3):
  scaled = weights * losses
  return (jnp.dot(weights, losses) / weights.sum()
          + penalty * jnp.abs(scaled[:-1] - scaled[1:]).sum())


@pytest.mark.parametrize("build, objective", [
    (lambda weights: balancing.geometric(), lambda L, _: jnp.exp(jnp.log(L).mean())),
    (lambda weights: balancing.scale_invariant(), lambda L, _: jnp.log(L).sum()),
    (lambda weights: balancing.stch(0.7, weights, 0.1), stch_objective),
    (lambda weights: balancing.tchebycheff(weights, 0.1), lambda L, w: jnp.max(w * (L - 0.1))),
    (lambda weights: balancing.pbi(5.0, weights, 0.1), pbi_objective),
    (lambda weights: balancing.cosmos(1.5, weights), cosmos_objective),
    (lambda weights: balancing.ldc_mtl(0.3, "none"),
     lambda L, w: ldc_objective(L, jnp.full_like(w, 1 / (1 + 1 / E)))),
], ids=["geometric", "scale_invariant", "stch", "tchebycheff", "pbi", "cosmos", "ldc_mtl"])
def test_weights_are_the_gradient_of_the_objective(build, objective):
  rng = np.random.default_rng(0)
  losses, weights = rng.uniform(0.2, 3, (5, 4)), tuple(rng.uniform(0.2, 1, 4))
  gradient = jax.jit(jax.grad(lambda losses: objective(losses, jnp.array(weights))))
  for row in losses:
    np.testing.assert_allclose(weigh(build(weights), row),
                               gradient(jnp.asarray(row, jnp.float32)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", [
    pytest.param(row, id=f"{row.name}-{'-'.join(map(str, row.kwargs(1).values()))}".rstrip("-"),
                 marks=pytest.mark.slow if row.name in {r.name for r in LOSSES[:index]} else ())
    for index, row in enumerate(LOSSES)])
def test_finite_on_losses_of_every_size(row):
  """Zero, tiny, negative and huge losses in every mixture, and in runs of several steps."""
  balancer = row.build(3)
  sizes = np.array([0.0, 1e-40, 1e-20, 1.0, 1e30, 3e38, -1.0, -1e30], np.float32)
  mixtures = np.array(list(itertools.product(sizes, repeat=3)), np.float32)

  @jax.jit
  def run(key):
    def step(state, inputs):
      losses, key = inputs
      signals = balancing.Signals(losses, jnp.ones(3, bool), key)
      decision, state = balancer.update(signals, state)
      if balancer.after_step is not None:
        state = balancer.after_step(losses[::-1], signals.active, state)
      return state, (decision.weights, state)
    keys = jax.random.split(key, len(mixtures))
    order = jax.random.permutation(key, jnp.asarray(mixtures))
    return jax.lax.scan(step, balancer.init(3), (order, keys))[1]

  for leaf in jax.tree.leaves(jax.vmap(run)(jax.random.split(jax.random.key(0), 3))):
    assert np.isfinite(leaf).all()


def draws(distribution, active, number=3000):
  balancer = balancing.random_weights(distribution)
  signals = balancing.Signals(jnp.ones(len(active)), jnp.array(active), jax.random.key(0))
  draw = jax.jit(jax.vmap(lambda key: balancer.update(signals._replace(key=key), ())[0].weights))
  return np.asarray(draw(jax.random.split(jax.random.key(1), number)))


def test_random_weights_are_the_softmax_of_the_draw():
  normal = np.asarray(jax.random.normal(jax.random.key(7), (4,)), np.float64)
  found = weigh(balancing.random_weights(), np.ones(4), key=jax.random.key(7))
  np.testing.assert_allclose(found, np.exp(normal) / np.exp(normal).sum(), rtol=1e-5)


@pytest.mark.parametrize("distribution", ["normal", "uniform", "dirichlet", "bernoulli",
                                          "one_hot"])
def test_random_weights_of_active_tasks(distribution):
  """They sum to one, are none negative, and are the same on average."""
  weights = draws(distribution, [True, False, True, True])
  assert (weights >= 0).all() and not weights[:, 1].any()
  np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
  np.testing.assert_allclose(weights.mean(axis=0), [1 / 3, 0, 1 / 3, 1 / 3], atol=0.04)
  assert not draws(distribution, [False, False], 2).any()


@pytest.mark.slow
def test_random_weights_follow_their_law():
  # All seven subsets of three tasks alike: four standard deviations are 0.026.
  subsets, counts = np.unique(draws("bernoulli", [True] * 3) > 0, axis=0, return_counts=True)
  assert len(subsets) == 7
  np.testing.assert_allclose(counts / 3000, 1 / 7, atol=0.026)
  # One of three has it all: four standard deviations are 0.035.
  weights = draws("one_hot", [True] * 3)
  assert set(np.unique(weights)) == {0, 1}
  np.testing.assert_allclose(weights.mean(axis=0), 1 / 3, atol=0.035)
  # Uniform on the simplex: each weight below x with probability 1 - (1 - x)².
  weights = draws("dirichlet", [True] * 3)
  for x in (0.1, 0.3, 0.7):
    np.testing.assert_allclose((weights < x).mean(axis=0), 1 - (1 - x) ** 2, atol=0.04)
  # Softmax of numbers in [0, 1): no weight is e times another.
  weights = draws("uniform", [True] * 3)
  assert (weights.max(axis=1) < E * weights.min(axis=1)).all()


@pytest.mark.parametrize("balancer, rest", [
    # σ(s) = L / (2 c²), so 2 c⁴ = L (1 + c²); w = 1 / (2 c²).
    (balancing.revised_uncertainty(),
     lambda L: 2 / (L + np.sqrt(L**2 + 8 * L))),
    # exp(s) L = 1.
    (balancing.imtl_l(), lambda L: 1 / L),
], ids=["revised_uncertainty", "imtl_l"])
def test_trained_weights_come_to_rest(balancer, rest):
  losses = np.array([0.2, 1.0, 3.0])
  signals = balancing.Signals(jnp.asarray(losses, jnp.float32), jnp.ones(3, bool),
                              jax.random.key(0))
  state = jax.lax.fori_loop(0, 1500, lambda _, s: balancer.update(signals, s)[1],
                            balancer.init(3))
  np.testing.assert_allclose(balancer.update(signals, state)[0].weights, rest(losses), rtol=1e-3)


class Adam:
  """Adam written out in float64, with a step count for each task."""

  def __init__(self, values, rate):
    self.values, self.rate = np.array(values, float), rate
    self.first, self.second, self.count = np.zeros((3, len(values)))

  def step(self, gradient, active):
    self.count = self.count + active
    self.first = np.where(active, 0.9 * self.first + 0.1 * gradient, self.first)
    self.second = np.where(active, 0.999 * self.second + 0.001 * gradient**2, self.second)
    count = np.maximum(self.count, 1)
    move = self.first / (1 - 0.9**count) / (np.sqrt(self.second / (1 - 0.999**count)) + 1e-8)
    self.values = np.where(active, self.values - self.rate * move, self.values)


STEPS = [(np.array([2.0 + i, 0.3, 1.0 + i % 3]), np.array([True, not 3 <= i <= 6, i != 1]))
         for i in range(10)]


@pytest.mark.parametrize("balancer, weights_of, gradient_of", [
    (balancing.revised_uncertainty(learning_rate=0.1), lambda s: np.exp(-s) / 2,
     lambda s, L: 1 / (1 + np.exp(-s)) - L * np.exp(-s) / 2),
    (balancing.imtl_l(learning_rate=0.1), np.exp, lambda s, L: np.exp(s) * L - 1),
], ids=["revised_uncertainty", "imtl_l"])
def test_trained_weights_follow_adam(balancer, weights_of, gradient_of):
  adam = Adam(np.zeros(3), 0.1)
  found, state = walk(balancer, *[s[0] for s in STEPS], active=[s[1] for s in STEPS])
  for (losses, active), weights in zip(STEPS, found):
    np.testing.assert_allclose(weights, active * weights_of(adam.values), rtol=1e-4)
    adam.step(gradient_of(adam.values, losses), active)
  np.testing.assert_allclose(state[0], adam.values, rtol=1e-4)


def test_famo_after_its_first_step():
  # FAMO: from (1, 2) to (0.5, 1.5) the first task fell more; Adam's first step is the rate.
  state = walk(balancing.famo(), [1, 2])[1]
  state = balancing.famo().after_step(jnp.array([0.5, 1.5]), jnp.ones(2, bool), state)
  np.testing.assert_allclose(state.logits, [-0.025, 0.025], rtol=1e-5)


def test_famo_follows_the_paper():
  """Ten steps beside the rule in float64; absent tasks hold NaN and keep what they learned."""
  balancer, decay, rng = balancing.famo(0.1, 0.05), 0.05, np.random.default_rng(0)
  update, after_step = jax.jit(balancer.update), jax.jit(balancer.after_step)
  state, adam = balancer.init(3), Adam(np.zeros(3), 0.1)
  for losses, active in STEPS:
    after = losses * rng.uniform(0.7, 1.1, 3)
    seen = [jnp.asarray(np.where(active, x, np.nan), jnp.float32) for x in (losses, after)]
    active_now = jnp.asarray(active)
    decision, state = update(balancing.Signals(seen[0], active_now, jax.random.key(0)), state)
    z = active * np.exp(adam.values) / np.sum(active * np.exp(adam.values))
    np.testing.assert_allclose(decision.weights, z / losses / np.sum(z / losses), rtol=1e-4)

    old, state = state, after_step(seen[1], active_now, state)
    falls = np.log(losses / after)
    adam.step(z * (falls - np.sum(z * falls)) + decay * adam.values, active)
    np.testing.assert_allclose(state.logits, adam.values, rtol=1e-3, atol=1e-5)
    jax.tree.map(lambda n, o, a=active: np.testing.assert_array_equal(n[~a], o[~a]), state, old)


def test_cov_weighting_follows_welford():
  """The official recursion in float64, whose first two steps have equal weights."""
  rng = np.random.default_rng(0)
  losses = rng.uniform(0.5, 2, (8, 3))
  mean_loss, mean, squares = losses[0], np.ones(3), np.zeros(3)
  found, _ = walk(balancing.cov_weighting(), *losses)
  np.testing.assert_allclose(found[:2], 1 / 3, rtol=1e-5)
  for step in range(1, len(losses)):
    ratio, old = losses[step] / mean_loss, mean
    mean = old + (ratio - old) / (step + 1)
    squares = squares + (ratio - old) * (ratio - mean)
    mean_loss = mean_loss + (losses[step] - mean_loss) / (step + 1)
    if step + 1 < len(losses):
      variation = np.sqrt(squares / (step + 1) + 1e-8) / mean
      np.testing.assert_allclose(found[step + 1], variation / variation.sum(), rtol=1e-4)


def test_cov_weighting_gives_a_newcomer_the_mean():
  # c = (½, ⅓) as in the table; the third, never seen, gets their mean 5/12: of 5/4 in all.
  found = weigh(balancing.cov_weighting(), [1, 2, 0], [3, 4, 0], [1, 1, 1],
                active=[[True, True, False]] * 2 + [[True] * 3])
  np.testing.assert_allclose(found, [0.4, 4 / 15, 1 / 3], atol=2e-4)


def test_dwa_counts_the_steps_of_each_task():
  """A task away in half of the steps has weight one's ratio until its own two windows are full."""
  steps = [[1, 8], [1, 0], [4, 4], [4, 0], [9, 9]]
  active = [[True, i % 2 == 0] for i in range(5)]
  # Windows of two: the first task has means (1, 4), r = 4; the second one window, r = 1.
  found = weigh(balancing.dwa(window=2), *steps, active=active)
  np.testing.assert_allclose(found, 2 * np.array([E**2, E**0.5]) / (E**2 + E**0.5), rtol=1e-5)
  np.testing.assert_allclose(weigh(balancing.dwa(window=3), *steps), 1, rtol=1e-6)


def test_stch_warms_up_and_settles():
  # One step of warm-up, two for the nadir: (2 + 4)/2 = 3 and (1 + 3)/2 = 2. Then, with μ = ½,
  # T softmax(2 log(L / N)) / L at L = (3, 4): squares (1, 4), shares (1, 4) / 5.
  steps = [[9, 9], [2, 1], [4, 3], [3, 4], [3, 4]]
  found, state = walk(balancing.stch(0.5, warmup=1, nadir_steps=2), *steps)
  for losses, weights in zip(steps[:3], found[:3]):
    np.testing.assert_allclose(weights, 1 / np.array(losses), rtol=1e-6)
  np.testing.assert_allclose(found[3:], [[2 / 5 / 3, 2 * 4 / 5 / 4]] * 2, rtol=1e-5)
  np.testing.assert_allclose(state.nadir, [3, 2], rtol=1e-6)
  # A task that comes late is still in its warm-up, and the other alone is its own maximum.
  found = weigh(balancing.stch(0.5, warmup=1, nadir_steps=2), *steps,
                active=[[True, i > 2] for i in range(5)])
  np.testing.assert_allclose(found, [1 / 3, 1 / 4], rtol=1e-5)


def test_group_dro_keeps_the_shares_of_absent_tasks():
  # The first two share 2/3 in the ratio 1 : E; then all three weigh as they stand, plus zero.
  found, state = walk(balancing.group_dro(1.0), [0, 1, np.nan], [0, 0, 0],
                      active=[[True, True, False], [True] * 3])
  np.testing.assert_allclose(found[0], [1 / (1 + E), E / (1 + E), 0], rtol=1e-5)
  shares = np.array([2 / 3 / (1 + E), 2 / 3 * E / (1 + E), 1 / 3])
  np.testing.assert_allclose(found[1], shares, rtol=1e-5)
  np.testing.assert_allclose(np.exp(state.log_shares), shares, rtol=1e-5)


def test_group_dro_lets_a_task_come_back():
  balancer = balancing.group_dro(1.0)
  found, _ = walk(balancer, [1e6, 0], [0, 0], [0, 81])
  assert found[1][1] < 1e-30
  assert found[2][1] > 0.7


@pytest.mark.parametrize("groups", [
    2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_groups_are_the_best_split(groups):
  """Of values in as many clumps as groups, k-means finds the split of least squares."""
  rng = np.random.default_rng(groups)
  for _ in range(5):
    clumps = rng.choice(np.arange(0, 100, 20), groups, replace=False)
    values = np.concatenate([clump + rng.uniform(0, 3, 3) for clump in clumps])
    rng.shuffle(values)
    best = min(itertools.combinations(range(1, len(values)), groups - 1), key=lambda cuts: sum(
        np.var(part) * len(part) for part in np.split(np.sort(values), cuts)))
    expected = np.empty_like(values)
    for part in np.split(np.argsort(values), best):
      expected[part] = values[part].mean()
    padded = np.append(values, np.inf)
    found = group_means(jnp.asarray(padded, jnp.float32), jnp.asarray(padded < np.inf), groups)
    np.testing.assert_allclose(found[:-1], expected, rtol=1e-5)


def test_ldc_mtl_trains_its_weights():
  # s = ½ each, s M = (½, 1): k = (1 - λ, 1 + λ) is above zero, and Adam's first step is the rate.
  balancer = balancing.ldc_mtl(0.1, "none", init=0.0, learning_rate=0.5)
  found, state = walk(balancer, [1, 2], [1, 2])
  np.testing.assert_allclose(found[0], [0.45, 0.55], rtol=1e-5)
  s = 1 / (1 + np.exp(0.5))
  np.testing.assert_allclose(found[1], [s * (1 / (2 * s) - 0.1), s * (1 / (2 * s) + 0.1)],
                             rtol=1e-5)
  # With a high price the gradient of the first, (1 - 3) s (1 - s), turns round.
  state = walk(balancing.ldc_mtl(3.0, "none", init=0.0, learning_rate=0.5), [1, 2])[1]
  np.testing.assert_allclose(state.logits, [0.5, -0.5], rtol=1e-5)


def test_ldc_mtl_remembers_the_first_losses():
  # M = (3, 1) with s alike: q = (1, -1), 1/Σ s = 1/(2 s); w = (½ ± λ s) / L0.
  s = 1 / (1 + 1 / E)
  found = weigh(balancing.ldc_mtl(0.1, learning_rate=1e-9), [2, 4], [6, 4])
  np.testing.assert_allclose(found, [(0.5 + 0.1 * s) / 2, (0.5 - 0.1 * s) / 4], rtol=1e-5)
  # M = (log 3, 0): the same signs, and slopes 1 / L.
  found = weigh(balancing.ldc_mtl(0.1, "log", learning_rate=1e-9), [2, 4], [6, 4])
  np.testing.assert_allclose(found, [(0.5 + 0.1 * s) / 6, (0.5 - 0.1 * s) / 4], rtol=1e-5)


PREFERENCE = "weights: expected one weight a task, none negative, not all zero"


@pytest.mark.parametrize("build, sentence", [
    (lambda: balancing.random_weights("gauss"),
     "random_weights: distribution: expected 'normal', 'uniform', 'dirichlet', 'bernoulli' or "
     "'one_hot', found 'gauss'"),
    (lambda: balancing.revised_uncertainty(init=31),
     "revised_uncertainty: init: expected a number in [-30, 30], found 31"),
    (lambda: balancing.imtl_l(learning_rate=-1.0),
     "imtl_l: learning_rate: expected a number above 0, found -1.0"),
    (lambda: balancing.dwa(temperature=0.0),
     "dwa: temperature: expected a number above 0, found 0.0"),
    (lambda: balancing.dwa(window=2.5),
     "dwa: window: expected a whole number of steps from 1 on, found 2.5"),
    (lambda: balancing.stch(mu=0), "stch: mu: expected a number above 0, found 0"),
    (lambda: balancing.stch(weights=(0.0, 0.0)), f"stch: {PREFERENCE}, found (0.0, 0.0)"),
    (lambda: balancing.stch(weights=(1.0, 2.0)).init(3),
     "stch: weights: expected one number for each of the 3 tasks, found (1.0, 2.0)"),
    (lambda: balancing.stch(warmup=-1),
     "stch: warmup: expected None or a whole number of steps from 0 on, found -1"),
    (lambda: balancing.stch(warmup=1, nadir_steps=0),
     "stch: nadir_steps: expected a whole number of steps from 1 on, found 0"),
    (lambda: balancing.stch(weights=(1.0, 1.0), warmup=1),
     "stch: weights: expected None where warmup is given, found (1.0, 1.0)"),
    (lambda: balancing.stch(ideal=0.5, warmup=1),
     "stch: ideal: expected 0.0 where warmup is given, found 0.5"),
    (lambda: balancing.tchebycheff((1.0, -1.0)), f"tchebycheff: {PREFERENCE}, found (1.0, -1.0)"),
    (lambda: balancing.tchebycheff(ideal="low"),
     "tchebycheff: ideal: expected a finite number, or one a task, found 'low'"),
    (lambda: balancing.tchebycheff(ideal=(0.0, 1.0)).init(3),
     "tchebycheff: ideal: expected one number for each of the 3 tasks, found (0.0, 1.0)"),
    (lambda: balancing.pbi(theta=-1.0), "pbi: theta: expected a number from 0 on, found -1.0"),
    (lambda: balancing.pbi(weights=1.0), f"pbi: {PREFERENCE}, found 1.0"),
    (lambda: balancing.cosmos(penalty=float("inf")),
     "cosmos: penalty: expected a number from 0 on, found inf"),
    (lambda: balancing.cosmos(weights=()), f"cosmos: {PREFERENCE}, found ()"),
    (lambda: balancing.cov_weighting(decay=1.0),
     "cov_weighting: decay: expected None or a number in [0, 1), found 1.0"),
    (lambda: balancing.famo(learning_rate=0.0),
     "famo: learning_rate: expected a number above 0, found 0.0"),
    (lambda: balancing.famo(weight_decay=-0.1),
     "famo: weight_decay: expected a number from 0 on, found -0.1"),
    (lambda: balancing.famo(min_losses=(0.0, 0.0)).init(3),
     "famo: min_losses: expected one number for each of the 3 tasks, found (0.0, 0.0)"),
    (lambda: balancing.group_dro(0.0),
     "group_dro: step_size: expected a number above 0, found 0.0"),
    (lambda: balancing.go4align(0), "go4align: groups: expected a whole number from 1 on, found 0"),
    (lambda: balancing.go4align(3).init(2),
     "go4align: groups: expected at most the number of tasks, 2, found 3"),
    (lambda: balancing.go4align(step_size=-1.0),
     "go4align: step_size: expected a number above 0, found -1.0"),
    (lambda: balancing.ldc_mtl(penalty=-1.0),
     "ldc_mtl: penalty: expected a number from 0 on, found -1.0"),
    (lambda: balancing.ldc_mtl(normalization="first"),
     "ldc_mtl: normalization: expected 'none', 'initial' or 'log', found 'first'"),
    (lambda: balancing.ldc_mtl(init=-40.0),
     "ldc_mtl: init: expected a number in [-30, 30], found -40.0"),
])
def test_mistakes_are_named(build, sentence):
  with pytest.raises(ValueError) as caught:
    build()
  assert str(caught.value) == sentence
