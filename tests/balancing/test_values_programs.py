"""Golden values of the methods that solve a program each step, with where they come from.

J2 and G2 are as in `test_values`, with TorchJD's published values (unit tests of version 0.17,
four digits) and others derived in float64 from the formulas. J3 is ours, its third row orthogonal
to the others: G3 = [[10, -3, 0], [-3, 5, 0], [0, 0, 16]]; what no comment derives by hand was
solved in float64 with SciPy: `minimize(method="SLSQP")` for CAGrad, `root` for the fair weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import balancing
from mtl_jax.balancing.balancer import gramian_of
from tests.balancing.test_values import J2, J3, decide

THIRD, HALF = 1 / 3, 0.5**0.5

PUBLISHED = [
    ("cagrad", {"rescale": 0}, [0.7041, 0.5], [0.1835, 1.2041, 1.2041]),
    ("upgrad", {"regularization": 1e-4}, [1.1109, 0.7894], [0.2929, 1.9004, 1.9004]),
    ("dualproj", {"regularization": 1e-4}, [0.6109, 0.5], [0.5563, 1.1109, 1.1109]),
    ("fairgrad", {"alpha": 1.0}, [0.5915, 0.4071], [0.0766, 0.9985, 0.9985]),
    ("nash_mtl", {}, None, [0.0542, 0.7061, 0.7061]),
]

DERIVED = [
    ("cagrad", {"c": 0.4, "rescale": 0}, None, [0.346803, 1.163299, 1.163299]),
    ("cagrad", {"c": 0.4}, None, [0.298968, 1.002844, 1.002844]),
    ("cagrad", {"c": 0.4, "rescale": 2}, None, [0.247716, 0.830928, 0.830928]),
    ("cagrad", {}, None, [0.146803, 0.963299, 0.963299]),
    ("cagrad", {"rescale": 2}, None, [0.122336, 0.802749, 0.802749]),
    ("cagrad", {"c": 0.0}, [0.5, 0.5], [1, 1, 1]),
    ("upgrad", {}, None, [0.292398, 1.900585, 1.900585]),
    # G2 (1/2, 1/2) = (-2, 8): the first task lacks 2/18 of its own gradient.
    ("dualproj", {}, [11 / 18, 1 / 2], [5 / 9, 10 / 9, 10 / 9]),
    ("nash_mtl", {"max_norm": None}, [0.591461, 0.407071], [0.076584, 0.998533, 0.998533]),
    ("nash_mtl", {}, [HALF * 0.591461, HALF * 0.407071], [0.054153, 0.706069, 0.706069]),
    ("fairgrad", {"alpha": 2.0}, [0.471363, 0.319454], [0.031274, 0.790817, 0.790817]),
    ("fairgrad", {"alpha": 0.5}, [0.742828, 0.525393], [0.181043, 1.268221, 1.268221]),
    ("pivrg", {"scores": (10.0, -5.0)}, [0.477558, 0.314778], [-0.021562, 0.792336, 0.792336]),
    ("pivrg", {"scores": (3.0, 3.0)}, [0.471363, 0.319454], [0.031274, 0.790817, 0.790817]),
    ("pcd", {}, [1.848061, 1.095368], [-0.820033, 2.943429, 2.943429]),
    ("pcd", {"threshold": 0.5}, [1.357817, 1.253361], [2.0889, 2.611178, 2.611178]),
]

J3_WEIGHTS = [
    # Only the first two conflict: g1 + 3/5 g2, g2 + 3/10 g1 and g3, a third of each.
    ("upgrad", {}, [1.3 / 3, 1.6 / 3, 1 / 3]),
    ("upgrad", {"preference": (1.0, 2.0, 0.5)}, [1.6, 2.6, 0.5]),
    # G3 (1, 1, 1) = (7, 2, 16): the mean conflicts with nobody.
    ("dualproj", {}, [THIRD, THIRD, THIRD]),
    # G3 (1, 1/2, 0) = (8.5, -1/2, 0): the second lacks a tenth.
    ("dualproj", {"preference": (1.0, 0.5, 0.0)}, [1, 0.6, 0]),
    # 10a² - 3ab = 5b² - 3ab = 1: b = √2 a and a² = 1 / (10 - 3√2). The third alone: 16c² = 1.
    ("nash_mtl", {"max_norm": None},
     [(10 - 3 * 2**0.5)**-0.5, (5 - 3 * HALF)**-0.5, 0.25]),
    ("nash_mtl", {}, [THIRD**0.5 * w for w in (0.41676221, 0.58939077, 0.25)]),  # ‖d‖ was √3
    ("fairgrad", {}, [0.32081993, 0.48089757, 16 ** (-2 / 3)]),
    ("fairgrad", {"alpha": 0.5}, [0.5481017, 0.7174312, 16 ** (-1 / 3)]),
    ("fairgrad", {"alpha": 4.0}, [0.2620297, 0.40753406, 16 ** (-4 / 5)]),
    # The temperature is 15 / log 2, so that the shares of the extremes are 2 : 1.
    ("pivrg", {"scores": (5.0, 0.0, -10.0)}, [0.34376415, 0.49568985, 0.13670095]),
    ("cagrad", {"c": 0.4, "rescale": 0}, [0.4062976, 0.6602336, THIRD]),
    ("cagrad", {"c": 1.0, "rescale": 2}, [0.34870805, 0.56665055, THIRD / 2]),
    ("cagrad", {"c": 2.0, "rescale": 0}, [1.1564343, 1.8792057, 0.3704203]),
]


def named(rows):
  return [f"{name}-{kwargs}" for name, kwargs, *_ in rows]


@pytest.mark.parametrize("name, kwargs, weights, direction", PUBLISHED, ids=named(PUBLISHED))
def test_published(name, kwargs, weights, direction):
  found = decide(balancing.get(name, **kwargs), J2)
  np.testing.assert_allclose(found[1], direction, atol=1e-4)
  if weights is not None:
    np.testing.assert_allclose(found[0], weights, atol=1e-4)


@pytest.mark.parametrize("name, kwargs, weights, direction", DERIVED, ids=named(DERIVED))
def test_derived(name, kwargs, weights, direction):
  found = decide(balancing.get(name, **kwargs), J2)
  np.testing.assert_allclose(found[1], direction, rtol=1e-5, atol=1e-5)
  if weights is not None:
    np.testing.assert_allclose(found[0], weights, rtol=1e-5)


@pytest.mark.parametrize("name, kwargs, weights", J3_WEIGHTS, ids=named(J3_WEIGHTS))
def test_on_three_tasks(name, kwargs, weights):
  found, direction = decide(balancing.get(name, **kwargs), J3)
  np.testing.assert_allclose(found, weights, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(direction, np.asarray(weights) @ J3, rtol=1e-5, atol=1e-5)


def test_pcd_takes_two_steps():
  """On J3 with decay ½; in the second step the second gradient is twice as long, the third away."""
  cosine, threshold = 3 / 50**0.5, 0.02
  balancer = balancing.pcd(threshold, decay=0.5)
  step = jax.jit(balancer.update)

  def signals(jacobian, active):
    return balancing.Signals(jnp.ones(3), jnp.array(active), jax.random.key(0),
                             gramian_of(jacobian))

  # First step, in unit rows: the second task lacks τ + 3/√50, the third τ.
  decision, state = step(signals(J3, [True] * 3), balancer.init(3))
  mixed = np.array([1, threshold + cosine, threshold])
  length = np.sqrt(1 + mixed[1]**2 - 2 * cosine * mixed[1] + mixed[2]**2)
  np.testing.assert_allclose(
      decision.weights, 10**0.5 * mixed / length / np.sqrt([10, 5, 16]), rtol=1e-5)
  np.testing.assert_allclose(state.mean_square, [10, 5, 16], rtol=1e-6)

  # The mean square of the second moves by ½ / (1 - ¼) = ⅔ of 20 - 5, to 15; 20 / 15 = 4/3.
  decision, state = step(signals(J3 * jnp.array([[1.0], [2.0], [jnp.nan]]), [True, True, False]),
                         state)
  np.testing.assert_allclose(state.mean_square, [10, 15, 16], rtol=1e-6)
  assert state.steps.tolist() == [2, 2, 1]
  mixed = np.array([1, threshold * (4 / 3)**0.5 + cosine, 0])
  length = np.sqrt(1 + mixed[1]**2 - 2 * cosine * mixed[1])
  np.testing.assert_allclose(
      decision.weights, 10**0.5 * mixed / length / np.sqrt([10, 20, 16]), rtol=1e-5)


def test_pcd_gives_up_where_nothing_serves_all():
  """Two opposite constraints: the leader's own gradient; without the leader, the next one leads."""
  jacobian = jnp.array([[2.0, 1.0], [0.0, 1.0], [0.0, -3.0]])
  found, _ = decide(balancing.pcd(), jacobian)
  np.testing.assert_allclose(found, [1, 0, 0], atol=1e-6)
  d, _ = jax.jit(lambda jacobian: balancing.aggregate(
      balancing.pcd(), jacobian, active=jnp.array([False, True, False])))(jacobian)
  np.testing.assert_allclose(d, jacobian[1], rtol=1e-5)
