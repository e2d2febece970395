"""Golden values of every method on two Jacobians, with where they come from.

J2 is the matrix on which TorchJD publishes the values of its aggregators (unit tests of version
0.17, four digits); G2 = [[18, -22], [-22, 38]].

J3 is ours, with values derived by hand in the comments; its third row is orthogonal to the
others: G3 = [[10, -3, 0], [-3, 5, 0], [0, 0, 16]].
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import balancing
from mtl_jax.balancing.balancer import combine, gramian_of

J2 = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
J3 = jnp.array([[3.0, 0.0, 0.0, 1.0, 0.0],
                [-1.0, 2.0, 0.0, 0.0, 0.0],
                [0.0, 0.0, 4.0, 0.0, 0.0]])
R5, R10 = 5**0.5, 10**0.5

PUBLISHED = [
    # TorchJD: Sum, Constant(1, 2), MGDA, PCGrad.
    (balancing.equal(), J2, [1, 1], [2, 2, 2]),
    (balancing.fixed((1.0, 2.0)), J2, [1, 2], [8, 3, 3]),
    (balancing.mgda(), J2, [0.6, 0.4], [0, 1, 1]),
    (balancing.pcgrad(), J2, [2.2222, 1.5789], [0.5848, 3.8012, 3.8012]),
]


def decide(balancer, jacobian, losses=None, key=None):
  """Weights and direction of a fresh balancer."""
  num_tasks = jacobian.shape[0]

  @jax.jit
  def compiled(jacobian, losses, key):
    signals = balancing.Signals(losses, jnp.ones(num_tasks, bool), key, gramian_of(jacobian),
                                jacobian)
    decision, _ = balancer.update(signals, balancer.init(num_tasks))
    if decision.direction is not None:
      return decision.weights, decision.direction
    return decision.weights, combine(jacobian, decision.weights)

  return compiled(jacobian, jnp.ones(num_tasks) if losses is None else jnp.asarray(losses),
                  jax.random.key(0) if key is None else key)


@pytest.mark.parametrize("balancer, jacobian, weights, direction", PUBLISHED,
                         ids=[row[0].name for row in PUBLISHED])
def test_published(balancer, jacobian, weights, direction):
  found = decide(balancer, jacobian)
  np.testing.assert_allclose(found[0], weights, atol=1e-4)
  np.testing.assert_allclose(found[1], direction, atol=1e-4)


DERIVED = [
    # Sums of rows.
    ("equal", {}, [1, 1, 1], [2, 2, 4, 1, 0]),
    ("fixed", {"weights": (2.0, 0.5, 0.25)}, [2, 0.5, 0.25], [5.5, 1, 1, 2, 0]),
    # s = 0: weights e⁰/2.
    ("uncertainty", {}, [0.5, 0.5, 0.5], [1, 1, 2, 0.5, 0]),
    # Rows 1 and 2 conflict, in whatever order: g1 + 3/5 g2, g2 + 3/10 g1, g3.
    ("pcgrad", {}, [1.3, 1.6, 1], [2.3, 3.2, 4, 1.3, 0]),
    ("pcgrad", {"reduction": "mean"}, [1.3 / 3, 1.6 / 3, 1 / 3],
     [2.3 / 3, 3.2 / 3, 4 / 3, 1.3 / 3, 0]),
    # All three rows take part, so G w = λ 1: with 10a - 3b = -3a + 5b, a : b = 8 : 13, the common
    # value is 41, and c = 41/16. Divided by the sum 377/16: w = (128, 208, 41) / 377.
    ("mgda", {}, np.array([128, 208, 41]) / 377, np.array([176, 416, 164, 128, 0]) / 377),
]


@pytest.mark.parametrize("name, kwargs, weights, direction", DERIVED)
def test_derived(name, kwargs, weights, direction):
  found = decide(balancing.get(name, **kwargs), J3)
  np.testing.assert_allclose(found[0], weights, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(found[1], direction, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalization, scales", [
    ("none", [1, 1, 1]),
    ("l2", [R10, R5, 4]),
    ("loss", [1, 2, 4]),
    ("loss+", [R10, 2 * R5, 16]),
])
def test_mgda_normalizations(normalization, scales):
  """With losses (1, 2, 4): G w = λ n and n·w = 1, where n are the scales; G3 inverts by hand."""
  inverse = np.array([[5, 3, 0], [3, 10, 0], [0, 0, 41 / 16]]) / 41
  weights = inverse @ scales
  weights /= np.dot(scales, weights)
  found, _ = decide(balancing.mgda(normalization), J3, [1.0, 2.0, 4.0])
  np.testing.assert_allclose(found, weights, rtol=1e-5)


def test_mgda_by_loss():
  # The same by hand for "loss": w = (11, 23, 41/4) / 98.
  found, _ = decide(balancing.mgda("loss"), J3, [1.0, 2.0, 4.0])
  np.testing.assert_allclose(found, np.array([11, 23, 41 / 4]) / 98, rtol=1e-5)


@pytest.mark.parametrize("leak, outcomes", [
    # Only the first coordinate of J3 is in dispute: 3 against -1.
    (0.0, {(3, 2, 4, 1, 0): (1, 4 / 5, 1), (-1, 2, 4, 1, 0): (1 / 10, 1, 1)}),
    # Half of what is dropped passes: 3 - 1/2 or -1 + 3/2. The shares gain half of what was lost.
    (0.5, {(2.5, 2, 4, 1, 0): (1, 9 / 10, 1), (0.5, 2, 4, 1, 0): (11 / 20, 1, 1)}),
    # Nothing that task 1 drops passes; all that task 2 drops does.
    ((0.0, 1.0, 0.0), {(2, 2, 4, 1, 0): (1, 1, 1), (-1, 2, 4, 1, 0): (1 / 10, 1, 1)}),
])
def test_graddrop(leak, outcomes):
  balancer = balancing.graddrop(leak)
  found = jax.vmap(lambda key: decide(balancer, J3, key=key))(
      jax.random.split(jax.random.key(0), 20))
  seen = {tuple(d.tolist()): w for w, d in zip(*found)}
  assert seen.keys() == outcomes.keys()
  for direction, weights in outcomes.items():
    np.testing.assert_allclose(seen[direction], weights, rtol=1e-6)


def test_uncertainty_values():
  # s = -½, L = (1, 2): weights ½ e^½ = 0.824361 and objective 1.973082 (derived in float64).
  weights, _ = decide(balancing.uncertainty(init=-0.5), J2, [1.0, 2.0])
  np.testing.assert_allclose(weights, [0.824361, 0.824361], rtol=1e-6)
  np.testing.assert_allclose(jnp.dot(weights, jnp.array([1.0, 2.0])) - 0.5, 1.973082, rtol=1e-6)
  # s = 0, L = (1, 2, 4): objective 3.5 (TorchJD).
  weights, _ = decide(balancing.uncertainty(), J3, [1.0, 2.0, 4.0])
  np.testing.assert_allclose(jnp.dot(weights, jnp.array([1.0, 2.0, 4.0])), 3.5, rtol=1e-6)


def test_uncertainty_follows_adam():
  """Ten steps beside Adam written out in float64; the second task is away in steps 3 to 6."""
  balancer, rate = balancing.uncertainty(learning_rate=0.1), 0.1
  step = jax.jit(balancer.update)
  state = balancer.init(2)
  s, first, second, count = np.zeros(2), np.zeros(2), np.zeros(2), np.zeros(2)
  for i in range(10):
    losses, active = np.array([2.0 + i, 0.3]), np.array([True, not 3 <= i <= 6])
    signals = balancing.Signals(jnp.asarray(losses, jnp.float32), jnp.asarray(active),
                                jax.random.key(i))
    decision, state = step(signals, state)
    np.testing.assert_allclose(decision.weights, active * np.exp(-s) / 2, rtol=1e-5)
    gradient = (1 - losses * np.exp(-s)) / 2
    count = count + active
    first = np.where(active, 0.9 * first + 0.1 * gradient, first)
    second = np.where(active, 0.999 * second + 0.001 * gradient**2, second)
    move = (first / (1 - 0.9**count)) / (np.sqrt(second / (1 - 0.999**count)) + 1e-8)
    s = np.where(active, s - rate * move, s)
    np.testing.assert_allclose(state.values, s, rtol=1e-4)


def test_uncertainty_rests_at_half_the_inverse_loss():
  balancer, losses = balancing.uncertainty(), jnp.array([0.2, 3.0])
  signals = balancing.Signals(losses, jnp.ones(2, bool), jax.random.key(0))
  state = jax.lax.fori_loop(0, 1000, lambda _, s: balancer.update(signals, s)[1],
                            balancer.init(2))
  weights = balancer.update(signals, state)[0].weights
  np.testing.assert_allclose(weights, 1 / (2 * losses), rtol=1e-3)


def test_uncertainty_stays_finite_where_a_loss_stays_zero():
  balancer = balancing.uncertainty(learning_rate=1.0)
  signals = balancing.Signals(jnp.zeros(1), jnp.ones(1, bool), jax.random.key(0))
  state = jax.lax.fori_loop(0, 200, lambda _, s: balancer.update(signals, s)[1],
                            balancer.init(1))
  assert state.values[0] == -30
  assert np.isfinite(balancer.update(signals, state)[0].weights).all()
