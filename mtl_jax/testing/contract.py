"""The contract that every balancing method keeps, check by check."""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.balancing.balancer import EXTRAS, LEVELS, Balancer, aggregate, init_state
from mtl_jax.testing.jacobians import (PARAMETERS, assert_close, conflicting, decide_once, decider,
                                       hard_cases, normal, signals_of)


@functools.lru_cache(maxsize=512)
def _after_step(balancer: Balancer) -> Callable[..., Any]:
  """A method's look after the step, compiled once."""
  return jax.jit(balancer.after_step)


def _inputs(num_tasks: int, step: int) -> dict[str, Any]:
  """What a method is shown at one step of a run; every step differs."""
  return {"jacobian": normal(num_tasks, step), "active": np.ones(num_tasks, bool),
          "losses": np.linspace(2, 0.5, num_tasks, dtype=np.float32) / (1 + step),
          "key": jax.random.key(step)}


def _advance(balancer: Balancer, num_tasks: int, step: int, state: Any) -> tuple[Any, Any, Any]:
  """Weights, direction and state of one step of a run, the look after it included."""
  inputs = _inputs(num_tasks, step)
  weights, direction, state = decider(balancer, num_tasks)(state=state, **inputs)
  if balancer.after_step:
    state = _after_step(balancer)(inputs["losses"] * 0.9, inputs["active"], state)
  return weights, direction, state


def _assert_same(found: Any, expected: Any, what: str) -> None:
  """All shapes, dtypes and bits are equal."""
  def compare(a: Any, b: Any) -> None:
    a, b = np.asarray(a), np.asarray(b)
    assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes()), (
        f"{what}: expected {b!r} bit for bit, found {a!r}")
  jax.tree.map(compare, found, expected)


def check_declaration(balancer: Balancer) -> None:
  """A method names one level and only known extras, and starts without computing."""
  assert isinstance(balancer.needs, frozenset), (
      f"{balancer.name}: expected a frozenset for needs, found {balancer.needs!r}")
  levels = balancer.needs & set(LEVELS)
  assert len(levels) == 1, f"{balancer.name}: expected one of {LEVELS} in needs, found {levels}"
  unknown = balancer.needs - {*LEVELS, *EXTRAS}
  assert not unknown, f"{balancer.name}: unknown needs {sorted(unknown)}"
  assert ("losses_after_step" in balancer.needs) == (balancer.after_step is not None), (
      f"{balancer.name}: after_step and the need of losses_after_step go together")
  assert balancer.scale in ("sum", "mean", "own"), f"{balancer.name}: scale {balancer.scale!r}"
  jacobian = jnp.asarray(normal(3))
  kinds = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)
  abstract = jax.eval_shape(lambda: init_state(balancer, 3, jacobian))
  assert kinds(abstract) == kinds(init_state(balancer, 3, jacobian)), (
      f"{balancer.name}: init differs under eval_shape")


def check_state(balancer: Balancer) -> None:
  """The state keeps its shapes and dtypes, through `lax.cond` and after the step."""
  jacobian = jnp.asarray(normal(3))
  state = init_state(balancer, 3, jacobian)
  signals = signals_of(balancer, state, jacobian)

  def step(state):
    state = balancer.update(signals, state)[1]
    if balancer.after_step:
      state = balancer.after_step(signals.losses, signals.active, state)
    return state
  jax.eval_shape(lambda go, s: jax.lax.cond(go, step, lambda s: s, s), True, state)


def check_hard_cases(balancer: Balancer, num_tasks: int) -> None:
  """Weights, direction and state are finite float32 on every hard case, two steps in a row."""
  decide = decider(balancer, num_tasks)
  for name, jacobian in hard_cases(num_tasks).items():
    state = None
    for step in (1, 2):
      weights, direction, state = decide(jacobian, state)
      for leaf in jax.tree.leaves((weights, direction, state)):
        assert np.isfinite(leaf).all(), (
            f"{balancer.name}: T = {num_tasks}: {name}: not finite at step {step}")
      assert weights.dtype == direction.dtype == jnp.float32, (
          f"{balancer.name}: {name}: weights of {weights.dtype}, a direction of {direction.dtype}")


def check_compiles_once(balancer: Balancer) -> None:
  """Other values, another key, a later state and absent tasks need no new program."""
  decide, state = decider(balancer, 3), None
  for seed in range(3):
    *_, state = decide(normal(3, seed), state, [True, seed != 1, True], key=jax.random.key(seed))
  assert len(decide.traces) == len(set(decide.traces)), (
      f"{balancer.name}: compiled {len(decide.traces)} times for {set(decide.traces)}")


def check_inactive(balancer: Balancer) -> None:
  """An absent task gets weight 0, keeps its state, and changes nobody else's result."""
  decide, active = decider(balancer, 3), np.array([True, False, True])
  *_, later = decide(normal(3, seed=5), losses=np.array([0.4, 0.9, 1.9], np.float32))
  for state in (init_state(balancer, 3, normal(3)), later):
    jacobian, losses = normal(3), np.array([0.5, 0.0, 2.0], np.float32)
    jacobian[1] = 0
    expected = decide(jacobian, state, active, losses)
    for garbage in (np.nan, np.inf, -3e38, 1.0):
      jacobian[1], losses[1] = garbage, garbage
      found = decide(jacobian, state, active, losses)
      assert_close(found, expected, f"{balancer.name}: an absent task holding {garbage}",
                    rtol=1e-6)
      assert found[0][1] == 0, f"{balancer.name}: an absent task has weight {found[0][1]}"
      jax.tree.map(lambda new, old: np.testing.assert_array_equal(
          new[1], old[1], err_msg=f"{balancer.name}: an absent task's state"), found[2], state)
    weights, direction, kept = decide(jacobian, state, np.zeros(3, bool), losses)
    assert not np.any(weights) and not np.any(direction), f"{balancer.name}: nobody active"
    assert_close(kept, state, f"{balancer.name}: state with nobody active", rtol=1e-6)


def check_batches(balancer: Balancer) -> None:
  """A batch over keys equals one at a time."""
  jacobian, decide = conflicting(), decider(balancer, 3)
  keys = jax.random.split(jax.random.key(1), 4)
  state = init_state(balancer, 3, jacobian)
  together = jax.jit(jax.vmap(lambda key: decide.program(
      jacobian, state, np.ones(3, bool), np.ones(3, np.float32), key)[1]))(keys)
  assert_close(together, np.stack([decide(jacobian, state, key=key)[1] for key in keys]),
                f"{balancer.name}: vmap over keys", rtol=1e-5, atol=1e-6)


def check_resumes(balancer: Balancer) -> None:
  """A run whose state was saved and restored goes on bit for bit as if it had not been.

  The state goes to the host and through Flax's serialisation; no file is touched.
  """
  first = _advance(balancer, 3, 0, None)
  try:
    saved = flax.serialization.to_bytes(jax.device_get(first[2]))
  except TypeError as error:
    raise AssertionError(f"{balancer.name}: expected a state of arrays in NamedTuples, found one "
                         f"that cannot be saved: {error}") from error
  restored = flax.serialization.from_bytes(init_state(balancer, 3, normal(3)), saved)
  _assert_same(restored, first[2], f"{balancer.name}: the restored state")
  straight, resumed = first[2], restored
  for step in (1, 2):
    *expected, straight = _advance(balancer, 3, step, straight)
    *found, resumed = _advance(balancer, 3, step, resumed)
    _assert_same((found, resumed), (expected, straight),
                 f"{balancer.name}: {step} steps after its state was restored")


def check_hyperparameters(factory: Callable[..., Balancer],
                          values: Mapping[str, Sequence[Any]]) -> None:
  """A search over hyperparameters is one vmap: arrays of values equal one method a value.

  Args:
    factory: a method's factory, which takes these arguments by name.
    values: for each argument the values that it takes, each a number or, for three tasks, one a
      task; as many for every argument, which change together.

  Raises:
    AssertionError: where the batch differs from one after the other.

  >>> from mtl_jax import balancing
  >>> check_hyperparameters(balancing.fixed, {"weights": [(1., 2., 3.), (0., 1., .5)]})
  """
  columns = {name: jnp.asarray(column) for name, column in values.items()}
  jacobian = normal(3)

  def advance(hyperparameters: Any, state: Any, inputs: Any) -> tuple[Any, Any, Any]:
    balancer = factory(**hyperparameters)
    weights, direction, state = decide_once(balancer, state=state, **inputs)
    if balancer.after_step:
      state = balancer.after_step(inputs["losses"] * 0.9, inputs["active"], state)
    return weights, direction, state

  program = jax.jit(jax.vmap(advance, in_axes=(0, 0, None)))
  states = jax.vmap(lambda chosen: init_state(factory(**chosen), 3, jacobian),
                    axis_size=len(next(iter(columns.values()))))(columns)
  together = []
  for step in range(2):
    *decisions, states = program(columns, states, _inputs(3, step))
    together.append((*decisions, states))
  for index, one_each in enumerate(zip(*values.values(), strict=True)):
    chosen = dict(zip(values, one_each))
    balancer, state = factory(**chosen), None
    for step, batch in enumerate(together):
      alone = _advance(balancer, 3, step, state)
      state = alone[2]
      assert_close(jax.tree.map(lambda leaf, index=index: leaf[index], batch), alone,
                    f"{balancer.name}: vmap over hyperparameters, step {step}, at {chosen}",
                    rtol=1e-4, atol=1e-5)


def check_dtypes(balancer: Balancer) -> None:
  """Low-precision gradients are decided upon in float32, float64 ones in float64.

  The direction has the dtype and the shape of the parameters.
  """
  def decide(tree, losses):
    state = init_state(balancer, 3, tree)
    decision, _ = balancer.update(signals_of(balancer, state, tree, losses=losses), state)
    return decision.weights, aggregate(balancer, tree, losses=losses)[0]

  def check(dtype, loss_dtype, weights_dtype):
    tree = {"a": jax.ShapeDtypeStruct((3, 2, 2), dtype), "b": jax.ShapeDtypeStruct((3,), dtype)}
    weights, d = jax.eval_shape(decide, tree, jax.ShapeDtypeStruct((3,), loss_dtype))
    assert weights_dtype in (None, weights.dtype), (
        f"{balancer.name}: weights of {weights.dtype} for gradients of {jnp.dtype(dtype)}")
    found = (d["a"].dtype, d["b"].dtype, d["a"].shape, d["b"].shape)
    assert found == (dtype, dtype, (2, 2), ()), (
        f"{balancer.name}: a direction unlike the parameters of {jnp.dtype(dtype)}: {found}")

  for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
    check(dtype, jnp.float32, jnp.float32)
  with jax.enable_x64(True):
    check(jnp.float64, jnp.float64, jnp.float64)
    check(jnp.float64, jnp.float32, None)


def check_sharding(balancer: Balancer) -> None:
  """With the parameters split over all devices, decision and state do not change."""
  devices, decide = jax.device_count(), decider(balancer, 2)
  jacobian = normal(2, parameters=math.lcm(PARAMETERS, devices))
  mesh = jax.make_mesh((devices,), ("parts",), axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.device_put(jacobian, jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(None, "parts")))
  assert_close(decide(split), decide(jacobian), f"{balancer.name}: {devices} devices", rtol=1e-5,
                atol=1e-6)
