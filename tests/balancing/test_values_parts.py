"""Values of the methods that look at several parts of a batch or ahead, by hand and by scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from mtl_jax import balancing, testing
from mtl_jax.balancing import quadratic
from mtl_jax.balancing.balancer import Ahead


def signals(losses=(1.0, 1.0, 1.0), cross=None, ahead=None):
  losses = jnp.array(losses)
  return balancing.Signals(losses, jnp.ones(len(losses), bool), jax.random.key(0),
                           cross_gramian=cross, ahead=ahead)


def three_parts(matrix):
  """Parts 1 and 2 have this matrix, everything else is nobody's business."""
  no = jnp.full((len(matrix), len(matrix)), jnp.nan)
  return ((no, no, no), (no, no, jnp.asarray(matrix, jnp.float32)), (no, no, no))


def test_modo_is_that_of_libmtl():
  """LibMTL's defaults on its first step and the second: γ 1e-3, ρ 0.1, J = [[-4,1,1],[6,1,1]]."""
  balancer, state = balancing.modo(), balancing.modo().init(2)
  cross = three_parts([[18.0, -22.0], [-22.0, 38.0]])
  found = []
  for _ in range(2):
    decision, state = balancer.update(signals((1.0, 1.0), cross), state)
    found.append(decision.weights)
  np.testing.assert_allclose(found, [[0.505, 0.495], [0.509749, 0.490251]], atol=2e-6)


def test_modo_steps_along_an_unsymmetric_product():
  """J₁ J₂ᵀ = [[0, 1], [0, 0]]: slope [½, 0] at [½, ½], so λ = [½, ½] - γ/2 [½, -½]."""
  balancer = balancing.modo(weight_step=0.4, ridge=0.0)
  decision, _ = balancer.update(signals((1.0, 1.0), three_parts([[0.0, 1.0], [0.0, 0.0]])),
                                balancer.init(2))
  np.testing.assert_allclose(decision.weights, [0.4, 0.6], atol=1e-6)


@pytest.mark.parametrize("preference, expected", [
    (None, [[1 / 13, 1 / 13, 11 / 13], [6 / 13, 6 / 13, 1 / 13]]),
    ((0.0, 0.0, 1.0), [[0.0, 0.0, 1.0]]),
])
def test_sdmgrad_is_that_of_torchjd(preference, expected):
  """One inner step, η 10, λ 0.3: first with J₁ J₂ᵀ = diag(1, ¼, 0), then with the identity."""
  balancer = balancing.sdmgrad(iterations=1, preference=preference)
  state, products = balancer.init(3), (np.diag([1.0, 0.25, 0.0]), np.eye(3))
  for product, weights in zip(products, expected):
    decision, state = balancer.update(signals(cross=three_parts(product)), state)
    np.testing.assert_allclose(decision.weights, weights, atol=1e-5)


def test_sdmgrad_with_short_steps_finds_the_minimum():
  """At λ = 0 it is MGDA, and at a large λ the preference."""
  jacobian = testing.normal(3)
  cross = three_parts(jacobian @ jacobian.T)
  for argument, expected in (
      (0.0, np.asarray(balancing.aggregate(balancing.mgda(), jnp.asarray(jacobian))[0])),
      (1e4, jacobian.mean(axis=0))):
    balancer = balancing.sdmgrad(argument, iterations=400, weight_step=0.1 / max(argument, 1))
    decision, _ = balancer.update(signals(cross=cross), balancer.init(3))
    np.testing.assert_allclose(decision.weights @ jacobian, expected, atol=2e-3)


def test_auto_lambda_follows_the_held_out_gradient():
  """Adam's first step is the sign of -α ∇L_i·∇F, against which the weights go, and only it."""
  ahead = Ahead(jnp.zeros(3), jnp.array([[2.0, -5.0, 0.0]]))
  balancer = balancing.auto_lambda(learning_rate=0.01)
  decision, _ = balancer.update(signals(ahead=ahead), balancer.init(3))
  np.testing.assert_allclose(decision.weights, [0.11, 0.09, 0.1], atol=1e-6)


def test_auto_lambda_softmax_is_the_chain_rule():
  """One step of Adam from known moments equals that on the gradient that jax derives."""
  slopes, rate, inner = jnp.array([[0.3, -0.2, 0.7]]), 0.05, 0.2
  balancer = balancing.auto_lambda("softmax", init=0.0, learning_rate=rate,
                                   inner_learning_rate=inner)
  state = balancer.init(3)
  for _ in range(3):
    decision, state = balancer.update(signals(ahead=Ahead(jnp.zeros(3), slopes)), state)
  logits, first, second = np.zeros(3), np.zeros(3), np.zeros(3)
  for step in range(1, 4):
    gradient = np.asarray(jax.grad(
        lambda a: -inner * jnp.sum(jax.nn.softmax(a) * slopes[0]))(
            jnp.asarray(logits, jnp.float32)))
    first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient ** 2
    logits = logits - rate * (first / (1 - 0.9 ** step)) / (
        np.sqrt(second / (1 - 0.999 ** step)) + 1e-8)
  np.testing.assert_allclose(decision.weights, jax.nn.softmax(jnp.asarray(logits)), rtol=1e-4)


@pytest.mark.parametrize("balancer", [
    balancing.auto_lambda(primary=(1.0, 0.0)),
    balancing.auto_lambda(primary=(0.0, 2.0)),
], ids=["first", "second"])
def test_auto_lambda_serves_the_primary_tasks(balancer):
  """The objective is the weighted sum that `primary` names: here, of opposite tasks."""
  jacobian, state = jnp.array([[1.0, 0.0], [-1.0, 0.0]]), balancer.init(2)
  for _ in range(5):
    _, state = balancing.aggregate(balancer, jacobian, state=state)
  favoured = int(np.argmax(balancer.lookahead.objectives(2)[0]))
  assert int(np.argmax(state.values)) == favoured


def test_moml_moves_along_the_shortest_combination_of_its_objectives():
  """Three objectives whose gradients in the logits share a descent direction."""
  slopes = np.array([[3.0, 1.0, 0.0], [2.0, 2.5, 0.0], [1.0, 0.0, 0.5]], np.float32)
  rows = -0.1 / 3 * (slopes - slopes.mean(axis=1, keepdims=True))
  unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
  combined = scipy.optimize.minimize(
      lambda w: np.sum((w @ unit) ** 2), np.full(3, 1 / 3), bounds=[(0, 1)] * 3,
      constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, tol=1e-12).x @ unit
  balancer = balancing.moml(learning_rate=0.01)
  _, state = balancer.update(signals(ahead=Ahead(jnp.zeros(3), jnp.asarray(slopes))),
                             balancer.init(3))
  np.testing.assert_allclose(state.adam.mu, 0.1 * combined, atol=2e-4)


def program(seed, num_tasks=4, parameters=6):
  """Random gradients of the held-out and the training losses."""
  rng = np.random.default_rng(seed)
  return rng.normal(size=(2, num_tasks, parameters))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("slack", [0.1, 2.0])
@pytest.mark.slow
def test_forum_solves_its_program(seed, slack):
  """λ and ν of the first step against scipy's general solver; and q falls as asked."""
  train, held_out = program(seed)
  losses, after = np.array([1.0, 2.0, 0.5, 1.5]), np.array([0.7, 1.0, 0.6, 1.4])
  falls = losses - after
  slope = (falls - falls.mean()) / 4
  rows = np.hstack([held_out, np.zeros((4, 4))])
  down = np.concatenate([train.mean(axis=0), slope])

  def dual(x):
    step = x[:4] @ rows + x[4] * down
    return 0.5 * step @ step - x[4] * slack * down @ down
  best = scipy.optimize.minimize(
      dual, np.full(5, 0.25), bounds=[(0, None)] * 5, tol=1e-14,
      constraints={"type": "eq", "fun": lambda x: x[:4].sum() - 1}, options={"maxiter": 1000}).x

  cross = [[jnp.asarray(a @ b.T, jnp.float32) for b in (train, held_out)]
           for a in (train, held_out)]
  balancer = balancing.forum(slack=slack)
  decision, _ = balancer.update(signals(losses, cross, Ahead(jnp.asarray(after))),
                                balancer.init(4))
  np.testing.assert_allclose(decision.part_weights[1], best[:4], atol=2e-3)
  np.testing.assert_allclose(decision.part_weights[0], np.full(4, best[4] / 4), atol=2e-3)
  np.testing.assert_allclose(decision.weights, decision.part_weights.sum(axis=0), rtol=1e-6)
  step = decision.part_weights[1] @ rows + decision.part_weights[0].sum() * down
  assert step @ down > slack * down @ down - 1e-3


def test_forum_averages_its_shares():
  """The second program's solution counts 2^(-3/4)."""
  (train, first), (_, second) = program(0), program(1)
  balancer, state = balancing.forum(), balancing.forum().init(4)
  alone = []
  for held_out in (first, second):
    cross = [[jnp.asarray(a @ b.T, jnp.float32) for b in (train, held_out)]
             for a in (train, held_out)]
    seen = signals((1.0,) * 4, cross, Ahead(jnp.ones(4)))
    decision, state = balancer.update(seen, state)
    alone.append(np.asarray(balancer.update(seen, balancer.init(4))[1].shares))
  rate = 2 ** -0.75
  np.testing.assert_allclose(state.shares, (1 - rate) * alone[0] + rate * alone[1], atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_the_solver_keeps_a_budget(seed):
  """KKT of min ½yᵀMy - bᵀy, y ≥ 0, pricesᵀy = 1: one multiplier for what is spent on."""
  rng = np.random.default_rng(seed)
  rows = rng.normal(size=(6, 4)).astype(np.float32)
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  matrix, linear = rows @ rows.T, rng.normal(size=6).astype(np.float32)
  prices = rng.uniform(0.2, 1, 6).astype(np.float32)
  y = np.asarray(quadratic.nonnegative_minimum(
      jnp.asarray(matrix), jnp.asarray(linear), jnp.ones(6, bool), jnp.asarray(prices)))
  slope = (matrix @ y - linear) / prices
  assert abs(prices @ y - 1) < 1e-5 and y.min() > -1e-6
  spent = y > 1e-4
  assert np.ptp(slope[spent]) < 2e-3 and (slope[~spent] > slope[spent].mean() - 2e-3).all()


@pytest.mark.parametrize("build, sentence", [
    (lambda: balancing.modo(ridge=-1.0), "modo: ridge: expected a number not below 0, found -1.0"),
    (lambda: balancing.sdmgrad(iterations=0),
     "sdmgrad: iterations: expected a whole number, 1 or more, found 0"),
    (lambda: balancing.sdmgrad(momentum=1.0),
     "sdmgrad: momentum: expected a number in [0, 1), found 1.0"),
    (lambda: balancing.auto_lambda("exp"),
     "auto_lambda: form: expected 'raw' or 'softmax', found 'exp'"),
    (lambda: balancing.auto_lambda(primary=(0.0, 0.0)),
     "auto_lambda: primary: expected one weight a task, none negative, not all zero, "
     "found (0.0, 0.0)"),
    (lambda: balancing.forum(inner_steps=0),
     "forum: inner_steps: expected a whole number, 1 or more, found 0"),
    (lambda: balancing.get("forum", every=2),
     "forum: every: expected a method that decides by weights, found one that weighs every part "
     "of the batch"),
    (lambda: balancing.get("modo", log_losses=True),
     "modo: log_losses: expected a method that looks at the losses of one batch, before the step"),
])
def test_mistakes_are_named(build, sentence):
  with pytest.raises(ValueError) as caught:
    build()
  assert str(caught.value) == sentence
