"""One table of all balancing methods, and what each of them must keep."""

from collections.abc import Callable
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import balancing
from mtl_jax.balancing.balancer import LEVELS, combine, gramian_of, init_state
from tests.balancing.rows import ROWS, Row

NO_METHODS = {
    "__init__", "balancer", "hyperparameters", "masked", "preference", "solvers", "trained",
    "wrappers",
}
IDS = [f"{row.name}-{'-'.join(map(str, row.kwargs(1).values()))}".rstrip("-") for row in ROWS]
WHOLE_LOSSES = {"gradnorm", "excess_mtl"}  # look at gradients, and weigh the heads all the same
PARAMETERS = 7  # more than some task counts, fewer than others

every_row = pytest.mark.parametrize("row", ROWS, ids=IDS)
FIRST = {row.name: row for row in reversed(ROWS)}  # the first row of each method
every_method = pytest.mark.parametrize("row", FIRST.values(), ids=FIRST.keys())


def signals_of(jacobian: Any, *, active=None, losses=None, key=None) -> balancing.Signals:
  """All that any method may ask for."""
  num_tasks = jax.tree.leaves(jacobian)[0].shape[0]
  return balancing.Signals(
      losses=jnp.linspace(0.5, 2, num_tasks, dtype=jnp.float32) if losses is None else losses,
      active=jnp.ones(num_tasks, bool) if active is None else active,
      key=jax.random.key(0) if key is None else key,
      gramian=gramian_of(jacobian),
      task_grads=jacobian,
  )


@functools.cache
def decider(row: Row, num_tasks: int) -> Callable:
  """The update of a row's method, compiled once for all tests: weights, direction, state."""
  balancer, traces = row.build(num_tasks), []

  @jax.jit
  def decide(jacobian, state, active, losses, key):
    traces.append(None)
    decision, state = balancer.update(
        signals_of(jacobian, active=active, losses=losses, key=key), state)
    direction = decision.direction
    if direction is None:
      direction = combine(jnp.where(active[:, None], jacobian, 0), decision.weights)
    return decision.weights, direction, state

  def with_defaults(jacobian, state=None, active=None, losses=None, key=None):
    return decide(np.asarray(jacobian, np.float32),
                  init_state(balancer, num_tasks, jacobian) if state is None else state,
                  np.ones(num_tasks, bool) if active is None else np.asarray(active),
                  np.ones(num_tasks, np.float32) if losses is None else losses,
                  jax.random.key(0) if key is None else key)

  with_defaults.traces = traces
  return with_defaults


def normal(num_tasks: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(num_tasks, PARAMETERS)).astype(np.float32)


def hard_cases(num_tasks: int) -> dict[str, np.ndarray]:
  """Jacobians [T, P] on which arithmetic goes wrong first; "zero" comes first."""
  plain = normal(num_tasks)
  hole = plain.copy()
  hole[0] = 0
  signs = np.where(np.arange(num_tasks) % 2, -1, 1)[:, None]
  spread = 10.0 ** np.linspace(-4, 4, num_tasks)[:, None]
  cases = {
      "zero": 0 * plain,
      "zero row": hole,
      "normal": plain,
      "equal": np.repeat(plain[:1], num_tasks, axis=0),
      "opposite": plain[:1] * signs,
      "spread": plain * spread,
      "spread opposite": plain[:1] * signs * spread,
      **{f"scale {scale:g}": plain * scale for scale in (1e-10, 1e-5, 1e5, 1e10, 1e15)},
  }
  return {name: np.asarray(case, np.float32) for name, case in cases.items()}


def same(tree: Any, other: Any, **tolerance) -> None:
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), tree, other)


def test_every_method_is_in_the_table():
  folder = pathlib.Path(balancing.__file__).parent
  files = {path.stem for path in folder.glob("*.py")} - NO_METHODS
  assert files == set(balancing.METHODS) == {row.name for row in ROWS}
  for name in balancing.METHODS:
    assert f"| `{name}` |" in balancing.__doc__
    assert name in balancing.__all__


@every_row
def test_says_who_it_is_and_what_it_needs(row):
  balancer = row.build(2)
  assert balancer.name == row.name
  assert len(balancer.needs & set(LEVELS)) == 1
  assert balancer.scale_heads == ("losses" in balancer.needs or row.name in WHOLE_LOSSES)


@every_row
def test_init_is_abstract(row):
  init = functools.partial(init_state, row.build(3), 3, normal(3))
  shapes = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
  assert shapes(jax.eval_shape(init)) == shapes(init())


@every_row
def test_state_keeps_shape_and_dtype(row):
  balancer, signals = row.build(3), signals_of(normal(3))
  keep_or_step = lambda go, state: jax.lax.cond(
      go, lambda s: balancer.update(signals, s)[1], lambda s: s, state)
  jax.eval_shape(keep_or_step, True, init_state(balancer, 3, normal(3)))


@every_row
def test_batches_over_keys(row):
  balancer = row.build(3)
  keys = jax.random.split(jax.random.key(1), 4)
  # All three pairs conflict, so that the order of projections matters.
  jacobian = np.zeros((3, PARAMETERS), np.float32)
  jacobian[:, :3] = [[2.0, -1.0, -0.5], [-1.0, 1.0, -0.7], [-0.5, -0.6, 1.5]]
  draw = jax.jit(jax.vmap(lambda key: balancing.aggregate(balancer, jnp.asarray(jacobian),
                                                          key=key)[0]))
  together = draw(keys)
  same(together, np.stack([decider(row, 3)(jacobian, key=key)[1] for key in keys]), rtol=1e-5,
       atol=1e-6)
  assert row.draws == bool(np.ptp(together, axis=0).max() > 1e-3)


@pytest.mark.parametrize("num_tasks, row", [
    pytest.param(num_tasks, row, id=f"{name}-{num_tasks}")
    for name, row in zip(IDS, ROWS)
    for num_tasks in ((1, 2, 3, 11, 40) if row is FIRST[row.name] else (3, 11))])
def test_finite_on_hard_cases(num_tasks, row):
  decide = decider(row, num_tasks)
  for name, jacobian in hard_cases(num_tasks).items():
    weights, direction, state = decide(jacobian)
    for leaf in jax.tree.leaves((weights, direction, state)):
      assert np.isfinite(leaf).all(), name
    assert weights.dtype == direction.dtype == jnp.float32
    assert row.signed or (weights >= 0).all(), name
    if name == "zero":
      same(weights, np.full(num_tasks, row.at_zero(num_tasks)), rtol=1e-6)


@every_row
def test_inactive_tasks_do_not_matter(row):
  """Whatever an absent task holds, the others decide as if it held nothing."""
  decide, active = decider(row, 3), [True, False, True]
  jacobian, losses = normal(3), np.array([0.5, 0.0, 2.0], np.float32)
  state = init_state(row.build(3), 3, jacobian)
  jacobian[1] = 0
  expected = decide(jacobian, state, active, losses)
  for garbage in (np.nan, np.inf, -3e38, 1.0):
    jacobian[1], losses[1] = garbage, garbage
    found = decide(jacobian, state, active, losses)
    same(found, expected, rtol=1e-6)
    assert found[0][1] == 0
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new[1], old[1]), found[2], state)
  if row.settled and not row.draws:  # as good as not there
    rest = np.array([0, 2])
    alone = decider(row, 2)(jacobian[rest], losses=losses[rest])
    same(expected[0][rest], alone[0], rtol=1e-4, atol=1e-6)
  weights, direction, kept = decide(jacobian, state, np.zeros(3, bool), losses)
  assert not weights.any() and not direction.any()
  same(kept, state)


@every_row
def test_compiles_once(row):
  """Other values, another key, a later state and absent tasks need no new program."""
  decide, state = decider(row, 3), None
  for seed in range(3):
    *_, state = decide(normal(3, seed), state, [True, seed != 1, True], key=jax.random.key(seed))
  assert len(decide.traces) == 1


@every_method
def test_aggregate_ignores_what_inactive_tasks_hold(row):
  jacobian = normal(3)
  jacobian[2] = np.nan
  d, _ = jax.jit(lambda jacobian: balancing.aggregate(
      row.build(3), jacobian, active=jnp.array([True, True, False])))(jacobian)
  assert np.isfinite(d).all()


@every_row
def test_dtypes(row):
  """bfloat16 gradients are decided upon in float32; float64 ones in float64."""
  def decide(tree, losses):
    balancer = row.build(3)
    decision, _ = balancer.update(signals_of(tree, losses=losses), init_state(balancer, 3, tree))
    return decision.weights, balancing.aggregate(balancer, tree, losses=losses)[0]

  def dtypes(dtype, loss_dtype):
    tree = {"a": jax.ShapeDtypeStruct((3, 2, 2), dtype), "b": jax.ShapeDtypeStruct((3,), dtype)}
    weights, d = jax.eval_shape(decide, tree, jax.ShapeDtypeStruct((3,), loss_dtype))
    assert d["a"].shape == (2, 2) and d["b"].shape == ()
    return weights.dtype, d["a"].dtype, d["b"].dtype

  assert dtypes(jnp.bfloat16, jnp.float32) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
  assert dtypes(jnp.float16, jnp.float32) == (jnp.float32, jnp.float16, jnp.float16)
  with jax.enable_x64(True):
    assert dtypes(jnp.float64, jnp.float64) == 3 * (jnp.float64,)
    assert dtypes(jnp.float64, jnp.float32)[1:] == 2 * (jnp.float64,)


@pytest.mark.parametrize("name", ["equal", "mgda", "pcgrad"])
def test_pytree_equals_flat_matrix(name):
  flat = jnp.asarray(normal(3))
  decide = jax.jit(lambda jacobian: balancing.aggregate(balancing.get(name), jacobian)[0])
  d = decide({"a": flat[:, :4].reshape(3, 2, 2), "b": (flat[:, 4], flat[:, 5:])})
  found = np.concatenate([d["a"].reshape(-1), d["b"][0].reshape(1), d["b"][1]])
  same(found, decide(flat), rtol=1e-5, atol=1e-6)


@every_method
def test_sharded_gradients_decide_the_same(row):
  """With the parameters split over eight devices, decision and state do not change."""
  balancer = row.build(2)
  jacobian = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32)), jnp.float32)
  mesh = jax.make_mesh((8,), ("parts",), axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.device_put(jacobian, jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(None, "parts")))
  decide = jax.jit(lambda jacobian: balancing.aggregate(balancer, jacobian))
  same(decide(split), decide(jacobian), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build, sentence", [
    (lambda: balancing.get("kurm"),
     f"balancing: name: expected one of {', '.join(sorted(balancing.METHODS))}, "
     "found 'kurm'; nearest: krum"),
    (lambda: balancing.mgda("l1"),
     "mgda: normalization: expected 'none', 'l2', 'loss' or 'loss+', found 'l1'"),
    (lambda: balancing.fixed(()),
     "fixed: weights: expected one weight a task, none negative, not all zero, found ()"),
    (lambda: balancing.fixed((1, -1)),
     "fixed: weights: expected one weight a task, none negative, not all zero, found (1, -1)"),
    (lambda: balancing.fixed((0, 0)),
     "fixed: weights: expected one weight a task, none negative, not all zero, found (0, 0)"),
    (lambda: balancing.fixed((1, float("nan"))),
     "fixed: weights: expected one weight a task, none negative, not all zero, found (1, nan)"),
    (lambda: balancing.fixed("ab"),
     "fixed: weights: expected one weight a task, none negative, not all zero, found 'ab'"),
    (lambda: balancing.fixed(((1, 2), 3)),
     "fixed: weights: expected one weight a task, none negative, not all zero, "
     "found ((1, 2), 3)"),
    (lambda: balancing.fixed((1, 2)).init(3),
     "fixed: weights: expected one number for each of the 3 tasks, found (1, 2)"),
    (lambda: balancing.uncertainty(init=40.0),
     "uncertainty: init: expected a number in [-30, 30], found 40.0"),
    (lambda: balancing.uncertainty(learning_rate=0.0),
     "uncertainty: learning_rate: expected a number above 0, found 0.0"),
    (lambda: balancing.uncertainty(learning_rate="0.1"),
     "uncertainty: learning_rate: expected a number above 0, found '0.1'"),
    (lambda: balancing.graddrop(leak=1.5),
     "graddrop: leak: expected a number in [0, 1], or one a task, found 1.5"),
    (lambda: balancing.graddrop(leak=(0.1, 0.2)).init(3),
     "graddrop: leak: expected one number for each of the 3 tasks, found (0.1, 0.2)"),
])
def test_mistakes_are_named(build, sentence):
  with pytest.raises(ValueError) as caught:
    build()
  assert str(caught.value) == sentence


@pytest.mark.parametrize("factory, values", [
    (balancing.fixed, [[1.0, 2.0, 3.0], [0.0, 1.0, 0.5]]),
    (lambda init: balancing.uncertainty(init=init), [0.0, -0.5]),
    (lambda rate: balancing.uncertainty(learning_rate=rate), [0.1, 0.01]),
    (lambda leak: balancing.graddrop(leak=leak), [0.0, 0.5]),
    (lambda leak: balancing.graddrop(leak=leak), [[0.0, 0.5, 1.0], [1.0, 0.0, 0.0]]),
], ids=["fixed", "uncertainty-init", "uncertainty-rate", "graddrop", "graddrop-each"])
def test_hyperparameters_batch(factory, values):
  """A search over hyperparameters is one vmap, equal to the loop."""
  jacobian = jnp.asarray(normal(3))

  def outcome(value):
    balancer = factory(value)
    state = balancer.init(3)
    for _ in range(2):
      d, state = balancing.aggregate(balancer, jacobian, losses=jnp.array([3.0, 1.0, 0.2]),
                                     state=state)
    return d, state

  together = jax.vmap(outcome)(jnp.asarray(values))
  for index, value in enumerate(values):
    same(jax.tree.map(lambda x, i=index: x[i], together), outcome(value), rtol=1e-5, atol=1e-6)
