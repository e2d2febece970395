"""Wrappers: what each changes, what it keeps, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import balancing, testing
from mtl_jax.balancing import wrappers
from tests.balancing.rows import FIRST, ROWS

J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
OTHER = jnp.array([[1.0, 2.0, -1.0], [-2.0, 0.5, 3.0]])


def weights_over(balancer, jacobians, losses=None, active=None):
  """Weights and state of a method step by step."""
  update, state, found = jax.jit(balancer.update), balancer.init(2), []
  for i, jacobian in enumerate(jacobians):
    signals = balancing.Signals(
        losses=jnp.array([2.0, 0.5]) if losses is None else losses[i],
        active=jnp.ones(2, bool) if active is None else jnp.array(active[i]),
        key=jax.random.key(i), gramian=jacobian @ jacobian.T)
    decision, state = update(signals, state)
    found.append(np.asarray(decision.weights))
  return np.stack(found), state


def test_every_keeps_the_weights_of_the_last_look():
  plain, _ = weights_over(balancing.mgda(), [J, OTHER, J, OTHER, J])
  found, state = weights_over(balancing.get("mgda", every=2), [J, OTHER, OTHER, J, J])
  np.testing.assert_allclose(found, plain[[0, 0, 1, 1, 0]], rtol=1e-6)
  assert int(state.count) == 5


def test_every_gives_a_task_that_was_absent_the_mean_of_the_others():
  found, _ = weights_over(balancing.get("mgda", every=3), [J, J], active=[[True, False], [True] * 2])
  np.testing.assert_allclose(found, [[1, 0], [1, 1]])


def test_every_says_when_it_is_due():
  balancer = balancing.get("pcgrad", every=3)
  _, state = weights_over(balancer, [J])
  due = []
  for _ in range(4):
    due.append(bool(balancer.due(state)))
    state = state._replace(count=state.count + 1)
  assert due == [False, False, True, False]


def test_smoothed_is_the_exponential_average_from_the_first_weights():
  plain, _ = weights_over(balancing.mgda(), [J, OTHER, OTHER])
  found, _ = weights_over(balancing.get("mgda", smoothed=0.9), [J, OTHER, OTHER])
  second = 0.9 * plain[0] + 0.1 * plain[1]
  np.testing.assert_allclose(found, [plain[0], second, 0.9 * second + 0.1 * plain[2]], rtol=1e-6)


def test_smoothed_keeps_an_absent_task():
  balancer = balancing.get("mgda", smoothed=0.5)
  found, state = weights_over(balancer, [J, J], active=[[True, True], [True, False]])
  assert found[1][1] == 0 and state.weights[1] == found[0][1]


def test_log_losses_balance_gradients_divided_by_their_losses():
  losses = jnp.array([2.0, 0.5])
  d, _ = balancing.aggregate(balancing.get("mgda", log_losses=True), J, losses=losses)
  expected, _ = balancing.aggregate(balancing.mgda(), J / losses[:, None])
  np.testing.assert_allclose(d, expected, atol=1e-6)
  d, _ = balancing.aggregate(balancing.get("equal", log_losses=True), J, losses=losses)
  np.testing.assert_allclose(d, J[0] / 2 + J[1] / 0.5, rtol=1e-6)


def test_log_losses_of_stacked_gradients():
  losses = jnp.array([2.0, 0.5])
  with_log = balancing.get("graddrop", log_losses=True, leak=1.0)
  d, _ = balancing.aggregate(with_log, J, losses=losses)
  np.testing.assert_allclose(d, J[0] / 2 + J[1] / 0.5, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e15])
def test_max_norm_bounds_the_direction_and_keeps_it(scale):
  plain, _ = balancing.aggregate(balancing.pcgrad(), J * scale)
  for limit in (0.5 * scale, 100.0 * scale):
    d, _ = balancing.aggregate(balancing.get("pcgrad", max_norm=limit), J * scale)
    norm = float(jnp.linalg.norm(plain / scale)) * scale
    np.testing.assert_allclose(d, plain * min(1, limit / norm), rtol=1e-4)


def test_reduction_moves_between_sum_and_mean():
  plain, _ = balancing.aggregate(balancing.pcgrad(), J)
  half, _ = balancing.aggregate(balancing.get("pcgrad", reduction="mean"), J)
  np.testing.assert_allclose(half, plain / 2, rtol=1e-6)
  mean, _ = balancing.aggregate(balancing.mgda(), J)
  double, _ = balancing.aggregate(balancing.get("mgda", reduction="sum"), J)
  np.testing.assert_allclose(double, 2 * mean, atol=1e-6)
  dropped = balancing.get("graddrop", leak=1.0, reduction="mean")
  np.testing.assert_allclose(balancing.aggregate(dropped, J)[0], J.mean(0), rtol=1e-6)


@pytest.mark.parametrize("row", [
    pytest.param(row, id=f"{row.name}-{row.kwargs(4)}",
                 marks=() if row is FIRST[row.name] else pytest.mark.slow) for row in ROWS])
def test_equal_gradients_come_out_as_the_method_declares(row):
  """`scale` is true: the sum or the mean of T equal gradients."""
  testing.declared_scale(row.build(3), 3)


def test_heads_follow_the_weights_where_asked():
  assert balancing.get("mgda", scale_heads=True).scale_heads
  assert not balancing.get("equal", scale_heads=False).scale_heads
  assert not balancing.get("mgda").scale_heads


def test_wrappers_compose_and_keep_their_state_stable():
  balancer = balancing.get("mgda", smoothed=0.9, max_norm=1.0, every=2, log_losses=True)
  found, state = weights_over(balancer, [J, OTHER, J])
  kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert kinds(state) == kinds(balancer.init(2)) and np.isfinite(found).all()


@pytest.mark.parametrize("name, kwargs, sentence", [
    ("mgda", {"every": 0}, "mgda: every: expected a whole number of steps, 1 or more, found 0"),
    ("graddrop", {"every": 2}, "graddrop: every: expected a method that decides by weights"),
    ("graddrop", {"smoothed": 0.9}, "graddrop: smoothed: expected a method that decides by weights"),
    ("mgda", {"smoothed": 1.0}, r"mgda: smoothed: expected a number in \[0, 1\), found 1.0"),
    ("equal", {"max_norm": 1.0}, "equal: max_norm: expected a method that looks at the Gramian"),
    ("mgda", {"max_norm": 0.0}, "mgda: max_norm: expected a number above 0, or None, found 0.0"),
    ("pcgrad", {"reduction": "avg"}, "expected 'paper', 'sum' or 'mean', found 'avg'"),
    ("uncertainty", {"reduction": "sum"}, "uncertainty: reduction: expected 'paper'"),
])
def test_what_does_not_fit_is_refused(name, kwargs, sentence):
  with pytest.raises(ValueError, match=sentence):
    balancing.get(name, **kwargs)


def test_the_options_are_those_of_the_functions():
  for field in wrappers.Options.__dataclass_fields__:
    assert callable(getattr(wrappers, field))
