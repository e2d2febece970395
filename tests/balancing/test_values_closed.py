"""Golden values of the methods with closed forms, with where they come from.

J2 is the matrix on which TorchJD publishes the values of its aggregators (unit tests of version
0.17, four digits). "Float64" marks values that were derived from the rule on J2 in float64, for
variants of LibMTL and others that publish none.

J3 is ours, with values derived by hand in the comments; its third row is orthogonal to the
others: G3 = [[10, -3, 0], [-3, 5, 0], [0, 0, 16]].
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import balancing
from mtl_jax.balancing.balancer import combine, gramian_of, init_state
from mtl_jax.balancing.gradnorm import norm_gradient, paces
from mtl_jax.balancing.masked import project_to_simplex

J2 = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
J3 = jnp.array([[3.0, 0.0, 0.0, 1.0, 0.0],
                [-1.0, 2.0, 0.0, 0.0, 0.0],
                [0.0, 0.0, 4.0, 0.0, 0.0]])
N3 = np.sqrt([10, 5, 16])
U3 = np.asarray(J3, np.float64) / N3[:, None]


def run(balancer: balancing.Balancer, jacobians: list, losses: list | None = None,
        active: list | None = None) -> tuple[list, list, Any]:
  """Weights and directions of one step after the other, and the last state."""
  num_tasks = len(jacobians[0])
  losses = [np.ones(num_tasks)] * len(jacobians) if losses is None else losses
  active = [np.ones(num_tasks, bool)] * len(jacobians) if active is None else active

  @jax.jit
  def step(jacobian, state, losses, active):
    signals = balancing.Signals(losses, active, jax.random.key(0), gramian_of(jacobian), jacobian)
    decision, state = balancer.update(signals, state)
    direction = decision.direction
    if direction is None:
      direction = combine(jacobian, decision.weights)
    return decision.weights, direction, state

  state, weights, directions = init_state(balancer, num_tasks, jacobians[0]), [], []
  for jacobian, loss, mask in zip(jacobians, losses, active):
    w, d, state = step(jnp.asarray(jacobian), state, jnp.asarray(loss, jnp.float32),
                       jnp.asarray(mask))
    weights.append(w)
    directions.append(d)
  return weights, directions, state


FIVE = jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [75.0, -666.0, 23.0], [1.0, 2.0, 3.0],
                  [2.0, 0.0, 1.0]])
LINE = jnp.array([[0.0], [1.0], [3.0], [10.0]])

PUBLISHED = [
    # TorchJD: GradVac (first call), IMTLG, AlignedMTL, ConFIG, Krum, TrimmedMean.
    (balancing.gradvac(), J2, [2.2222, 1.5789], [0.5848, 3.8012, 3.8012]),
    (balancing.imtl_g(), J2, [0.5923, 0.4077], [0.0767, 1, 1]),
    (balancing.aligned_mtl(preference=(0.5, 0.5)), J2, [0.5591, 0.4083], [0.2133, 0.9673, 0.9673]),
    (balancing.conflict_free(), J2, None, [0.1588, 2.0706, 2.0706]),
    (balancing.krum(1, 4), FIVE, [0.25, 0.25, 0, 0.25, 0.25], [1.25, 0.75, 1.5]),
    (balancing.krum(1, 4, "plain"), FIVE, [0.25, 0.25, 0, 0.25, 0.25], [1.25, 0.75, 1.5]),
    (balancing.trimmed_mean(1), jnp.array([[1e11, 3], [1, -1e11], [-1e10, 1e10], [2, 2]]), None,
     [1.5, 2.5]),
]


def identify(rows: list) -> list[str]:
  return [f"{row[0].name}-{index}" for index, row in enumerate(rows)]


@pytest.mark.parametrize("balancer, jacobian, weights, direction", PUBLISHED,
                         ids=identify(PUBLISHED))
def test_published(balancer, jacobian, weights, direction):
  (w,), (d,), _ = run(balancer, [jacobian])
  if weights is not None:
    np.testing.assert_allclose(w, weights, atol=1e-4)
  np.testing.assert_allclose(d, direction, atol=1e-4)


# Of J3: det [[10, -3], [-3, 5]] = 41, trace 15, eigenvalues 7.5 ± √15.25. With s = √41 and
# t² = 15 + 2 s, that block to the power -½ is [[5 + s, 3], [3, 10 + s]] / (s t).
S, T = 41**0.5, (15 + 2 * 41**0.5)**0.5
INVERSE_ROOT = np.array([[5 + S, 3, 0], [3, 10 + S, 0], [0, 0, S * T / 4]]) / (S * T)
LOWEST, MIDDLE = 7.5 - 15.25**0.5, 7.5 + 15.25**0.5
# The cosine of its first two rows is -3/√50, so C y = 1 has y = (k, k, 1).
Y3 = np.array([1 / (1 - 3 / 50**0.5), 1 / (1 - 3 / 50**0.5), 1])

DERIVED = [
    # Float64: AlignedMTL of LibMTL (sum) and by "rmse", NTKMTL.
    (balancing.aligned_mtl(), J2, None, [0.426557, 1.934666, 1.934666]),
    (balancing.aligned_mtl("rmse", (0.5, 0.5)), J2, None, [0.576376, 2.614172, 2.614172]),
    (balancing.ntkmtl(), J2, [1.763834, 1.213954], [0.228387, 2.977788, 2.977788]),
    (balancing.ntkmtl(0.75), J2, [2.342538, 1.337529], None),
    # The lower median of two singular values is the smaller one.
    (balancing.aligned_mtl("median"), J2, None, [0.426557, 1.934666, 1.934666]),
    # As PCGrad: g1 + 3/5 g2, g2 + 3/10 g1, g3.
    (balancing.gradvac(), J3, [1.3, 1.6, 1], [2.3, 3.2, 4, 1.3, 0]),
    # w = y / norm over its sum; the scales of IMTL start at one.
    (balancing.imtl_g(), J3, Y3 / N3 / (Y3 / N3).sum(), None),
    (balancing.imtl(), J3, Y3 / N3 / (Y3 / N3).sum(), None),
    # ‖Uᵀ y‖² = 1ᵀ y, and every v·g_i = ‖g_i‖ / √(1ᵀ y).
    (balancing.conflict_free(), J3, Y3 / N3 * N3.sum() / Y3.sum(), None),
    (balancing.conflict_free("min"), J3, None, 5**0.5 * Y3 @ U3 / Y3.sum()**0.5),
    (balancing.conflict_free("max"), J3, None, 4 * Y3 @ U3 / Y3.sum()**0.5),
    (balancing.conflict_free("mean"), J3, None, N3.mean() * Y3 @ U3 / Y3.sum()**0.5),
    (balancing.conflict_free("harmonic"), J3, None,
     3 / (1 / N3).sum() * Y3 @ U3 / Y3.sum()**0.5),
    (balancing.conflict_free("geometric"), J3, None, 800**(1 / 6) * Y3 @ U3 / Y3.sum()**0.5),
    # Eigenvalues 3.59, 11.4, 16.
    (balancing.aligned_mtl(), J3, LOWEST**0.5 * INVERSE_ROOT.sum(1), None),
    (balancing.aligned_mtl("median"), J3, MIDDLE**0.5 * INVERSE_ROOT.sum(1), None),
    (balancing.aligned_mtl("rmse", (1, 2, 0)), J3, (31 / 3)**0.5 * INVERSE_ROOT @ [1, 2, 0], None),
    # The trace is 31.
    (balancing.ntkmtl(), J3, np.sqrt([3.1, 6.2, 31 / 16]), None),
    (balancing.ntkmtl(0.0), J3, [1, 1, 1], [2, 2, 4, 1, 0]),
    # Weights start at one.
    (balancing.gradnorm(), J3, [1, 1, 1], [2, 2, 4, 1, 0]),
    # One neighbour each: scores 1, 1, 4, 49, a tie. Two: 10, 5, 13, 130. With three places, the
    # tie of the first two is no tie.
    (balancing.krum(1), LINE, [0.5, 0.5, 0, 0], [0.5]),
    (balancing.krum(0), LINE, [0, 1, 0, 0], [1]),
    (balancing.krum(1, 3), LINE, [1 / 3, 1 / 3, 1 / 3, 0], [4 / 3]),
    # Too few tasks, or as many selected as there are: the mean.
    (balancing.krum(2), LINE, [0.25] * 4, [3.5]),
    (balancing.krum(0, 9), LINE, [0.25] * 4, [3.5]),
    # The median; 2² of row 2's squared norm 53 is kept, 1² of row 4's 17.
    (balancing.trimmed_mean(2), jnp.array([[1.0, 5], [2, -7], [9, 0], [4, 1], [-3, 2]]),
     [0, 4 / 53, 0, 1 / 17, 0], [2, 1]),
    # β = ½: Y = J3 / 2, and Y Yᵀ 1/3 = (1.75, 0.5, 4) / 3; a tenth of that leaves
    # (0.825, 0.95, 0.6) / 3, and each gains a third of the missing 0.625 / 3.
    (balancing.moco(), J3, (np.array([0.825, 0.95, 0.6]) + 0.625 / 3) / 3,
     (np.array([0.825, 0.95, 0.6]) + 0.625 / 3) / 6 @ np.asarray(J3)),
    # A tenth of the sum of the unit gradients times the longest.
    (balancing.db_mtl(), J3, 4 / N3, 0.4 * U3.sum(0)),
    # Excess risks at first: the sums of absolute values, 4, 3, 4.
    (balancing.excess_mtl(0.1), J3, [1, 1, 1], [2, 2, 4, 1, 0]),
    (balancing.excess_mtl(0.1, "update"), J3,
     3 * np.exp([0.4, 0.3, 0.4]) / np.exp([0.4, 0.3, 0.4]).sum(), None),
]


@pytest.mark.parametrize("balancer, jacobian, weights, direction", DERIVED, ids=identify(DERIVED))
def test_derived(balancer, jacobian, weights, direction):
  (w,), (d,), _ = run(balancer, [jacobian])
  if weights is not None:
    np.testing.assert_allclose(w, weights, rtol=1e-5, atol=1e-6)
  if direction is not None:
    np.testing.assert_allclose(d, direction, rtol=1e-5, atol=2e-6)


def test_gradvac_second_step():
  # Float64.
  weights, directions, state = run(balancing.gradvac(), [J2, J2])
  np.testing.assert_allclose(directions[1], [1.00654, 3.264403, 3.264403], rtol=1e-5)
  _, _, state = run(balancing.gradvac(), [J2])
  np.testing.assert_allclose(state.targets, [[0, -0.4205955], [-0.4205955, 0]], rtol=1e-6)
  # On J3 with decay 0.8 the target is a fifth of the cosine φ = -3/√50 of the only pair in
  # conflict; row i gains (φ̂ √(1 - φ²) / √(1 - φ̂²) - φ) of the length of row i.
  weights, _, state = run(balancing.gradvac(0.8), [J3, J3])
  cosine = -3 / 50**0.5
  target = cosine / 5
  gain = target * ((1 - cosine**2) / (1 - target**2))**0.5 - cosine
  np.testing.assert_allclose(weights[1], [1 + gain * 0.5**0.5, 1 + gain * 2**0.5, 1], rtol=1e-5)
  np.testing.assert_allclose(state.targets[0, 1], 0.8 * target + 0.2 * cosine, rtol=1e-5)


def test_imtl_learns_scales():
  """Along IMTL-G's direction, with length as by gradients of the scaled losses; s by Adam."""
  losses = np.array([2.0, 0.5, 1.0])
  _, directions, state = run(balancing.imtl(learning_rate=0.1), [J3] * 2, [losses] * 2)
  scaled = N3 * np.exp([-0.1, 0.1, 0])  # Adam's first step is its rate
  np.testing.assert_allclose(directions[1], Y3 @ U3 / (Y3 / scaled).sum(), rtol=1e-5, atol=1e-6)
  _, _, state = run(balancing.imtl(learning_rate=0.1), [J3] * 200, [losses] * 200)
  np.testing.assert_allclose(np.exp(state.values), 1 / losses, rtol=0.02)


def test_gradnorm_gradient():
  # Float64: on J2 with weights and paces of one, both targets are 5.203527.
  ones, both = jnp.ones(2), jnp.ones(2, bool)
  gradient = norm_gradient(ones, jnp.linalg.norm(J2, axis=1), ones, jnp.float32(1.5), both)
  np.testing.assert_allclose(gradient, [-4.242641, 6.164414], rtol=1e-6)
  # Shares of the first losses ½, 1 and 3/2, and the third task is away: paces 2/3 and 4/3.
  pace = paces(jnp.array([1.0, 3.0, 3.0]), jnp.array([2.0, 3.0, 2.0]),
               jnp.array([True, True, False]))
  np.testing.assert_allclose(pace[:2], [2 / 3, 4 / 3], rtol=1e-6)


def test_gradnorm_follows_adam():
  """Eight steps beside the rule written out in float64; the second task is away in some."""
  rate, rng = 0.1, np.random.default_rng(0)
  losses = rng.uniform(0.2, 2, size=(8, 3))
  active = np.array([[True, not 2 <= i <= 4, True] for i in range(8)])
  found, _, state = run(balancing.gradnorm(learning_rate=rate), [J3] * 8, list(losses),
                        list(active))
  w, begin, first, second, count = np.ones(3), losses[0], np.zeros(3), np.zeros(3), np.zeros(3)
  for i, on in enumerate(active):
    np.testing.assert_allclose(found[i], on * w, rtol=1e-4)
    share = losses[i] / begin
    target = (w * N3)[on].mean() * (share / share[on].mean())**1.5
    gradient = np.sign(w * N3 - target) * N3 / N3[on].mean()
    count = count + on
    first = np.where(on, 0.9 * first + 0.1 * gradient, first)
    second = np.where(on, 0.999 * second + 0.001 * gradient**2, second)
    correct = np.maximum(count, 1)
    move = first / (1 - 0.9**correct) / (np.sqrt(second / (1 - 0.999**correct)) + 1e-8)
    moved = w - rate * move
    w = np.where(on, moved * (3 - w[~on].sum()) / moved[on].sum(), w)
  np.testing.assert_allclose(state.weights, w, rtol=1e-4)
  np.testing.assert_allclose(state.weights.sum(), 3, rtol=1e-6)
  np.testing.assert_allclose(state.first_losses, begin, rtol=1e-6)


def test_krum_by_plain_and_squared_distances():
  # On a line, four neighbours each. Of 2 and 3 the plain distances are 1 + 1 + 2 + 5 and
  # 1 + 2 + 3 + 4, the squared ones 31 and 30; all others have more.
  points = jnp.array([[0.0], [1.0], [2.0], [3.0], [7.0], [8.0]])
  _, (plain,), _ = run(balancing.krum(0, distance="plain"), [points])
  _, (squared,), _ = run(balancing.krum(0), [points])
  assert plain.tolist() == [2.0] and squared.tolist() == [3.0]


def test_moco_of_libmtl():
  # Float64, with losses (1, 2).
  balancer = balancing.moco(normalization="loss", simplex="softmax")
  weights, directions, _ = run(balancer, [J2, J2], [np.array([1, 2])] * 2)
  np.testing.assert_allclose(weights[0], [0.509374, 0.490626], rtol=3e-6)
  np.testing.assert_allclose(directions[0], [0.237419, 0.13962, 0.13962], rtol=1e-5)
  np.testing.assert_allclose(weights[1], [0.516192, 0.483808], rtol=3e-6)
  np.testing.assert_allclose(directions[1], [0.308027, 0.188574, 0.188574], rtol=1e-5)


def test_simplex_projection():
  # TorchJD.
  project = lambda values: project_to_simplex(jnp.array(values), jnp.ones(3, bool))
  np.testing.assert_allclose(project([0.5, 0.1, 0.1]), [0.6, 0.2, 0.2], rtol=1e-6)
  np.testing.assert_allclose(project([1, 0, -0.5]), [1, 0, 0], atol=1e-7)


def test_db_mtl_of_libmtl():
  # Float64; losses of one, so that the gradients of the logarithms are J2.
  _, directions, _ = run(balancing.db_mtl(), [J2, J2])
  np.testing.assert_allclose(directions[0], [0.018813, 0.245297, 0.245297], rtol=3e-5)
  np.testing.assert_allclose(directions[1], [0.035746, 0.466064, 0.466064], rtol=3e-5)
  # With decay ½ / t the averages are 0.5 h, then ¼ 0.5 h + ¾ h = 0.875 h.
  _, directions, state = run(balancing.db_mtl(0.5, 1.0), [J3, J3], [np.array([1, 2, 4])] * 2)
  np.testing.assert_allclose(state.averages, 0.875 * np.asarray(J3) / [[1], [2], [4]], rtol=1e-6)
  np.testing.assert_allclose(directions[1], 0.875 * 10**0.5 * U3.sum(0), rtol=1e-5, atol=1e-6)


def test_excess_mtl_of_torchjd():
  # TorchJD, whose weights sum to one: e² and e, then times exp(1 / (2 √5)) and exp(4 / √5).
  jacobians = [jnp.array([[2.0, 0.0], [1.0, 0.0]]), jnp.array([[1.0, 0.0], [2.0, 0.0]])]
  weights, _, _ = run(balancing.excess_mtl(1.0, "update"), jacobians)
  np.testing.assert_allclose(weights[0] / 2, [0.7311, 0.2689], atol=1e-4)
  grown = np.exp([2 + 0.5 / 5**0.5, 1 + 4 / 5**0.5])
  np.testing.assert_allclose(weights[1] / 2, grown / grown.sum(), rtol=1e-5)
  # The first step of the official code only records.
  weights, _, _ = run(balancing.excess_mtl(1.0), jacobians)
  grown = np.exp([0.5 / 5**0.5, 4 / 5**0.5])
  np.testing.assert_allclose(weights[1] / 2, grown / grown.sum(), rtol=1e-5)
