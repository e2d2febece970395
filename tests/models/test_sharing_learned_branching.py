"""Learned branching: paths through trunks side by side, drawn in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.models.sharing import SHARINGS
from mtl_jax.models.sharing.learned_branching import BranchingUnit
from tests.models.sharing_cases import (IMAGES, TASKS, TRUNKS, TWO, apart, assert_close,
                                        check_drawn_owners, filled, joined)

CNN = TRUNKS["cnn"]


def choosing(variables, logits):
  """The same trunks, with the same logits at all units."""
  for name, unit in variables["params"].items():
    if name.startswith("units_"):
      unit["logits"] = jnp.asarray(logits, jnp.float32)
  return variables


@pytest.mark.parametrize("train", [False, True])
def test_where_each_picks_its_own_trunks_are_independent(train):
  """Draws, too, where the odds are e^50 to one."""
  sharing, independent = (SHARINGS[name](CNN, TASKS) for name in ("learned_branching",
                                                                  "independent"))
  variables = choosing(filled(sharing, IMAGES, TWO, False), 50 * np.eye(3))
  found, expected = jax.jit(lambda v: (
      sharing.apply(v, IMAGES, TWO, train, maps=True, rngs={"dropout": jax.random.key(0)}),
      independent.apply(apart(v), IMAGES, TWO, train, maps=True)))(variables)
  assert_close(found, expected)


def test_where_all_pick_one_trunk_it_is_hard_with_branches():
  sharing = SHARINGS["learned_branching"](CNN, TASKS)
  hard = SHARINGS["hard"](CNN, TASKS, branch_at="conv2")
  variables = choosing(filled(sharing, IMAGES, TWO, False), 50 * np.eye(3)[[1, 1, 1]])
  params = variables["params"]
  copies = {"params": {"trunk": params["trunks_a_1"], **{
      name: part for name, part in params.items() if name.startswith("branches_")}}}
  assert_close(*jax.jit(lambda v, w: (sharing.apply(v, IMAGES, TWO, False),
                                      hard.apply(w, IMAGES, TWO, False)))(variables, copies))


def test_a_tree_of_choices():
  """Row i of the logits is column i: b and c go on from a_1 at conv1, a_1 from c at conv2."""
  sharing = SHARINGS["learned_branching"](CNN, TASKS)
  variables = filled(sharing, IMAGES, TWO, False)
  order = {task: i for i, task in enumerate(TASKS)}
  picks = {"conv1": {"b": "a_1", "a_1": "a_1", "c": "a_1"},
           "conv2": {"b": "b", "a_1": "c", "c": "c"}}
  for stage, parents in picks.items():
    rows = np.zeros((3, 3), np.float32)
    for task, parent in parents.items():
      rows[order[task], order[parent]] = 1
    variables["params"][f"units_{stage}"]["logits"] = jnp.asarray(rows)

  @jax.jit
  def run(variables):
    part = lambda kind, task: joined(variables, f"{kind}_{task}")
    stage = lambda kind, task, name, x: CNN.apply(part(kind, task), name, x, method="stage")
    expected = {}
    for task, stream in TWO.items():
      second = picks["conv2"][task]
      x = stage("trunks", picks["conv1"][second], "conv1", IMAGES[stream])
      x = stage("trunks", second, "conv2", x)
      expected[task] = stage("branches", task, "features", x)
    return sharing.apply(variables, IMAGES, TWO, False), expected

  assert_close(*run(variables))


def test_who_owns_what_over_many_draws():
  sharing = SHARINGS["learned_branching"](CNN, TASKS)
  variables = choosing(filled(sharing, IMAGES, TWO, False), np.zeros((3, 3)))
  check_drawn_owners(sharing, variables["params"], draws=20)


def test_parents_are_drawn_as_often_as_the_logits_say():
  probabilities = np.array([[0.7, 0.3], [0.1, 0.9]], np.float32)
  columns = [jnp.array([[1.0]]), jnp.array([[0.0]])]
  draw = jax.jit(jax.vmap(lambda key: jnp.stack(BranchingUnit().apply(
      {"params": {"logits": jnp.log(probabilities)}}, columns, True, rngs={"dropout": key}))))
  drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))[:, :, 0, 0]
  np.testing.assert_allclose(np.where(drawn > 0.5, 1, 0), drawn, atol=1e-6)  # one parent each
  np.testing.assert_allclose(drawn.mean(axis=0), probabilities[:, 0], atol=0.03)  # 4 deviations


def test_the_gradient_is_that_of_the_softmax_of_the_draw():
  columns = [jnp.array([[2.0]]), jnp.array([[-1.0]])]
  logits, key = jnp.array([[0.3, -0.2], [1.0, 0.5]]), jax.random.key(3)
  unit = BranchingUnit(temperature=0.5)

  def total(logits):
    mixed = unit.apply({"params": {"logits": logits}}, columns, True, rngs={"dropout": key})
    return (jnp.stack(mixed)[:, 0, 0] * jnp.array([1.0, 3.0])).sum()

  # Of two parents drawn with p and 1 - p the slope is p (1 - p) (x_0 - x_1) / temperature.
  found = np.asarray(jax.grad(total)(logits))
  np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-6)
  slopes = np.abs(found[:, 0]) / (np.array([1.0, 3.0]) * 3 / 0.5)  # p (1 - p)
  assert np.all(slopes > 0) and np.all(slopes <= 0.25) and np.all(found[:, 0] > 0)


@pytest.mark.parametrize("kwargs, message", [
    ({"temperature": 0.0}, "temperature: expected a number above 0, found 0.0"),
    ({"units_at": ("conv9",)}, "units_at: expected one of")])
def test_what_does_not_fit_is_said(kwargs, message):
  with pytest.raises(ValueError, match=message):
    SHARINGS["learned_branching"](CNN, TASKS, **kwargs)
