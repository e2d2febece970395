"""One table of all balancing methods, and what each of them must keep."""

import dataclasses
import functools
import inspect
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mtl_jax import balancing, testing
from mtl_jax.balancing.balancer import gramian_of, init_state
from tests.balancing.rows import FIRST, LOSSES, ROWS

NO_METHODS = {
    "__init__", "balancer", "dual_cone", "hyperparameters", "masked", "preference", "quadratic",
    "search", "solvers", "trained", "wrappers",
}
SLOW = pytest.mark.slow
IDS = [f"{row.name}-{'-'.join(map(str, row.kwargs(1).values()))}".rstrip("-") for row in ROWS]
# Arguments that no search varies: words, and numbers that fix shapes or choose a program.
STRUCTURAL = {"distance", "distribution", "form", "groups", "inner_steps", "iterations", "length",
              "normalization", "rescale", "scale", "simplex", "start"}
# They look at gradients, and weigh the heads all the same.
WHOLE_LOSSES = {"gradnorm", "excess_mtl", "forum"}

every_row = pytest.mark.parametrize("row", [
    pytest.param(row, id=name, marks=() if row is FIRST[row.name] else SLOW)
    for name, row in zip(IDS, ROWS)])


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
  balancer = row.build(3)
  testing.check_declaration(balancer)
  assert balancer.name == row.name
  assert balancer.scale_heads == ("losses" in balancer.needs or row.name in WHOLE_LOSSES)


@every_row
def test_state_keeps_shape_and_dtype(row):
  testing.check_state(row.build(3))


@pytest.mark.parametrize("row", [
    pytest.param(row, id=name, marks=() if row is FIRST[row.name] and (
        row.draws or row.name == "mgda") else SLOW)
    for name, row in zip(IDS, ROWS)])
def test_draws_as_it_says(row):
  decide, keys = testing.decider(row.build(3), 3), jax.random.split(jax.random.key(1), 4)
  directions = [np.asarray(decide(testing.conflicting(), key=key)[1]) for key in keys]
  assert row.draws == bool(np.ptp(directions, axis=0).max() > 1e-3)


@pytest.mark.parametrize("row", [
    pytest.param(row, id=name, marks=() if row.draws or row.name == "mgda" else SLOW)
    for name, row in zip(IDS, ROWS)])
def test_batches_over_keys(row):
  testing.check_batches(row.build(3))


@pytest.mark.parametrize("num_tasks, row", [
    pytest.param(num_tasks, row, id=f"{name}-{num_tasks}", marks=() if num_tasks in (
        (3, 40) if row.name in ("cagrad", "mgda") else (3,) * (row is FIRST[row.name])) else SLOW)
    for name, row in zip(IDS, ROWS) for num_tasks in testing.TASK_COUNTS])
def test_hard_cases(num_tasks, row):
  testing.check_hard_cases(row.build(num_tasks), num_tasks)
  decide = testing.decider(row.build(num_tasks), num_tasks)
  for name, jacobian in testing.hard_cases(num_tasks).items():
    weights = np.asarray(decide(jacobian)[0])
    assert row.signed or (weights >= 0).all(), name
    if name == "zero":
      same(weights, np.full(num_tasks, row.at_zero(num_tasks)), rtol=1e-6)


@every_row
def test_inactive_tasks_do_not_matter(row):
  testing.check_inactive(row.build(3))


@pytest.mark.parametrize("row", [
    pytest.param(row, id=name, marks=() if row.name in ("mgda", "uncertainty", "moco") else SLOW)
    for name, row in zip(IDS, ROWS) if row.settled and not row.draws])
def test_an_absent_task_is_as_good_as_not_there(row):
  jacobian, losses, rest = testing.normal(3), np.array([0.5, 0.0, 2.0], np.float32), [0, 2]
  three = testing.decider(row.build(3), 3)(jacobian, active=[True, False, True], losses=losses)
  two = testing.decider(row.build(2), 2)(jacobian[rest], losses=losses[rest])
  same(three[0][jnp.array(rest)], two[0], rtol=1e-4, atol=1e-6)


@every_row
def test_compiles_once(row):
  testing.check_compiles_once(row.build(3))


@pytest.mark.parametrize("row", [
    pytest.param(row, id=name, marks=() if name in ("equal", "mgda", "graddrop") else SLOW)
    for name, row in FIRST.items()])
def test_aggregate_ignores_what_inactive_tasks_hold(row):
  balancer, jacobian = row.build(3), testing.normal(3)
  jacobian[2] = np.nan
  d, _ = jax.jit(lambda jacobian: balancing.aggregate(
      balancer, jacobian, active=jnp.array([True, True, False])))(jacobian)
  assert np.isfinite(d).all()


@every_row
def test_dtypes(row):
  testing.check_dtypes(row.build(3))


@pytest.mark.parametrize("row", [
    pytest.param(row, id=name, marks=() if name in ("mgda", "graddrop", "moco", "modo") else SLOW)
    for name, row in FIRST.items()])
def test_sharded_gradients_decide_the_same(row):
  assert jax.device_count() == 8
  testing.check_sharding(row.build(2))


@pytest.mark.parametrize("num_tasks", [2, pytest.param(5, marks=SLOW)])
@pytest.mark.parametrize("row, claim", [
    pytest.param(row, claim, id=f"{name}-{claim}",
                 marks=() if row is FIRST[row.name] else SLOW)
    for name, row in zip(IDS, ROWS) for claim in row.claims])
def test_claims(row, claim, num_tasks):
  testing.PROPERTIES[claim](row.build(num_tasks), num_tasks)


@pytest.mark.parametrize("name", ["equal", "mgda", "pcgrad"])
def test_pytree_equals_flat_matrix(name):
  flat = jnp.asarray(testing.normal(3))
  decide = jax.jit(lambda jacobian: balancing.aggregate(balancing.get(name), jacobian)[0])
  d = decide({"a": flat[:, :4].reshape(3, 2, 2), "b": (flat[:, 4], flat[:, 5:])})
  found = np.concatenate([d["a"].reshape(-1), d["b"][0].reshape(1), d["b"][1]])
  same(found, decide(flat), rtol=1e-5, atol=1e-6)


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


@every_row
def test_a_saved_and_restored_state_goes_on_bit_for_bit(row):
  testing.check_resumes(row.build(3))


@pytest.mark.slow
def test_all_states_go_through_one_checkpoint(tmp_path):
  """Each as it is after a step; what comes back has the same types, shapes, dtypes and bits."""
  states = {str(index): testing.decider(row.build(3), 3)(testing.normal(3))[2]
            for index, row in enumerate(ROWS)}
  fresh = {str(index): init_state(row.build(3), 3, jnp.asarray(testing.normal(3)))
           for index, row in enumerate(ROWS)}
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(0, args=ocp.args.StandardSave(states))
    restored = manager.restore(0, args=ocp.args.StandardRestore(fresh))
  assert jax.tree.structure(restored) == jax.tree.structure(states)
  for found, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(states), strict=True):
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


def test_a_search_varies_all_but_what_is_structural():
  for name, factory in balancing.METHODS.items():
    searched = {argument for row in ROWS if row.name == name for argument in row.search()}
    assert set(inspect.signature(factory).parameters) - searched <= STRUCTURAL, name
    assert not searched & STRUCTURAL, name


@pytest.mark.parametrize("row", [
    pytest.param(row, id=name, marks=() if row in LOSSES and (
        row is FIRST[row.name] or "warmup" in row.kwargs(3)) else SLOW)
    for name, row in zip(IDS, ROWS) if row.search()])
def test_a_search_over_hyperparameters_is_one_vmap(row):
  testing.check_hyperparameters(functools.partial(row.searched, 3), row.search())


def test_a_search_over_wrappers_is_one_vmap():
  testing.check_hyperparameters(functools.partial(balancing.get, "ntkmtl"),
                                {"smoothed": (0.0, 0.9), "max_norm": (0.1, 1.0)})


def test_a_method_that_takes_arrays_for_something_else_is_caught():
  def factory(weight):
    return balancing.fixed((1.0, 1.0, weight if isinstance(weight, float) else 0.5))
  with pytest.raises(AssertionError, match="vmap over hyperparameters, step 0, at {'weight': 2.0}"):
    testing.check_hyperparameters(factory, {"weight": (0.5, 2.0)})


def test_a_state_that_cannot_be_saved_is_caught():
  @jax.tree_util.register_dataclass
  @dataclasses.dataclass
  class Memory:
    count: jax.Array

  balancer = balancing.Balancer(
      "private", lambda num_tasks: Memory(jnp.int32(0)),
      lambda signals, state: (balancing.Decision(jnp.ones(3)), Memory(state.count + 1)),
      frozenset({"losses"}))
  with pytest.raises(AssertionError, match="private: expected a state of arrays in NamedTuples"):
    testing.check_resumes(balancer)


@pytest.mark.parametrize("num_tasks, size", [
    (3, 16 * 4096 + 1), (3, 17 * 4096), (3, 16 * 4096 - 5), (13, 16 * 4096 + 1)])
def test_long_gradients_are_multiplied_block_by_block(num_tasks, size):
  """Against float64; the last block is a rest, there is none, all is one piece; many tasks."""
  one, other = (jax.random.normal(jax.random.key(i), (num_tasks, size)) for i in range(2))
  found = jax.jit(gramian_of)({"a": one}, {"a": other})
  expected = np.asarray(one, np.float64) @ np.asarray(other, np.float64).T
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)
  gradient = jax.grad(lambda one: gramian_of({"a": one}, {"a": other})[0, 1])(one)
  np.testing.assert_allclose(gradient, jnp.zeros_like(one).at[0].set(other[1]), rtol=1e-6)
