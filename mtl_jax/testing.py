"""Checks for balancing methods: the contract that all keep, and the properties that papers claim.

`check_balancer(factory, claims=…)` runs them on a method of your own; they raise AssertionError
with a sentence that says what was broken, and on which Jacobian.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.balancing.balancer import (EXTRAS, LEVELS, Balancer, Signals, aggregate, combine,
                                        fill_in, init_state)

PARAMETERS = 8  # more than some task counts, fewer than others
TASK_COUNTS = (1, 2, 3, 11, 40)
CLAIM_TASK_COUNTS = (2, 5)


def normal(num_tasks: int, seed: int = 0, parameters: int = PARAMETERS) -> np.ndarray:
  """A Jacobian [T, P] of independent normal numbers, float32."""
  return np.random.default_rng(seed).normal(size=(num_tasks, parameters)).astype(np.float32)


def conflicting() -> np.ndarray:
  """A Jacobian [3, P] whose three pairs all conflict, so that the order of projections matters."""
  jacobian = np.zeros((3, PARAMETERS), np.float32)
  jacobian[:, :3] = [[2.0, -1.0, -0.5], [-1.0, 1.0, -0.7], [-0.5, -0.6, 1.5]]
  return jacobian


def hard_cases(num_tasks: int) -> dict[str, np.ndarray]:
  """Jacobians [T, P] on which arithmetic goes wrong first, by name.

  >>> list(hard_cases(2))[:4]
  ['zero', 'zero row', 'normal', 'equal']
  """
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


def signals_of(balancer: Balancer, state: Any, jacobian: Any, *, active: Any = None,
               losses: Any = None, key: Any = None) -> Signals:
  """All that a method asks for, about one Jacobian; losses are ones where not given."""
  num_tasks = jax.tree.leaves(jacobian)[0].shape[0]
  return fill_in(Signals(
      losses=jnp.ones(num_tasks, jnp.float32) if losses is None else losses,
      active=jnp.ones(num_tasks, bool) if active is None else active,
      key=jax.random.key(0) if key is None else key,
  ), balancer, state, jacobian)


def _decide(balancer: Balancer, jacobian: jax.Array, state: Any, active: jax.Array,
            losses: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
  decision, state = balancer.update(
      signals_of(balancer, state, jacobian, active=active, losses=losses, key=key), state)
  direction = decision.direction
  if direction is None:
    direction = combine(jnp.where(active[:, None], jacobian, 0), decision.weights)
  return decision.weights, direction, state


@functools.lru_cache(maxsize=512)
def decider(balancer: Balancer, num_tasks: int) -> Callable[..., tuple[Any, Any, Any]]:
  """A method's update compiled once: `decide(jacobian, …) -> (weights, direction, state)`.

  The same method and number of tasks get the same function, so that all checks share one program.
  Its `traces` lists the shapes it was traced for, and its `program` is the jitted function of
  `(jacobian, state, active, losses, key)`.
  """
  traces = []

  @jax.jit
  def decide(jacobian, state, active, losses, key):
    traces.append(jacobian.shape)
    return _decide(balancer, jacobian, state, active, losses, key)

  def with_defaults(jacobian, state=None, active=None, losses=None, key=None):
    if not isinstance(jacobian, jax.Array):
      jacobian = np.asarray(jacobian, np.float32)
    return decide(jacobian,
                  init_state(balancer, num_tasks, jacobian) if state is None else state,
                  np.ones(num_tasks, bool) if active is None else np.asarray(active),
                  np.ones(num_tasks, np.float32) if losses is None else losses,
                  jax.random.key(0) if key is None else key)

  with_defaults.traces, with_defaults.program = traces, decide
  return with_defaults


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


def _assert_close(found: Any, expected: Any, what: str, rtol: float = 1e-4,
                  atol: float = 1e-6) -> None:
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=what),
               found, expected)


def _assert_same(found: Any, expected: Any, what: str) -> None:
  """All shapes, dtypes and bits are equal."""
  def compare(a: Any, b: Any) -> None:
    a, b = np.asarray(a), np.asarray(b)
    assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes()), (
        f"{what}: expected {b!r} bit for bit, found {a!r}")
  jax.tree.map(compare, found, expected)


# ---- Properties: each takes a method and a number of tasks.


def non_conflicting(balancer: Balancer, num_tasks: int) -> None:
  """No task gets worse to first order: `J d ≥ 0`."""
  decide = decider(balancer, num_tasks)
  for seed in range(5):
    jacobian = normal(num_tasks, seed)
    _, direction, _ = decide(jacobian)
    cosines = jacobian @ np.asarray(direction) / (
        np.linalg.norm(jacobian, axis=1) * max(np.linalg.norm(direction), 1e-3))
    assert cosines.min() > -2e-3, f"{balancer.name}: J d has a cosine of {cosines.min():.2e}"


def permutation_equivariant(balancer: Balancer, num_tasks: int) -> None:
  """Renumbering the tasks renumbers the weights and keeps the direction."""
  decide = decider(balancer, num_tasks)
  for seed in range(3):
    jacobian = normal(num_tasks, seed)
    order = np.random.default_rng(seed).permutation(num_tasks)
    weights, direction, _ = decide(jacobian)
    permuted, same, _ = decide(jacobian[order])
    what = f"{balancer.name}: tasks in the order {order}"
    _assert_close(same, direction, what, rtol=1e-3, atol=1e-4)
    _assert_close(permuted, np.asarray(weights)[order], what, rtol=2e-2, atol=2e-3)


def scale_equivariant(balancer: Balancer, num_tasks: int) -> None:
  """All gradients c times as long give a direction c times as long."""
  decide = decider(balancer, num_tasks)
  jacobian = normal(num_tasks)
  _, direction, _ = decide(jacobian)
  for scale in (1e-6, 1e-3, 1e3, 1e6):
    _, scaled, _ = decide(jacobian * scale)
    _assert_close(np.asarray(scaled) / scale, direction, f"{balancer.name}: times {scale:g}",
                  rtol=1e-3, atol=1e-4)


def scale_invariant(balancer: Balancer, num_tasks: int) -> None:
  """All gradients c times as long give the same direction, of the same length."""
  decide = decider(balancer, num_tasks)
  jacobian = normal(num_tasks)
  _, direction, _ = decide(jacobian)
  for scale in (1e-3, 1e3):
    _, scaled, _ = decide(jacobian * scale)
    _assert_close(scaled, direction, f"{balancer.name}: times {scale:g}", rtol=1e-3, atol=1e-4)


def linear_under_row_scaling(balancer: Balancer, num_tasks: int) -> None:
  """The direction is linear in the tasks' scales: `d(diag(a + b) J) = d(diag(a) J) + d(diag(b) J)`.

  UPGrad's paper asks for it (Quinton, Rey, arXiv:2406.16232).
  """
  decide = decider(balancer, num_tasks)
  jacobian, rng = normal(num_tasks), np.random.default_rng(1)
  a, b = rng.uniform(0.5, 2, (2, num_tasks, 1)).astype(np.float32)
  parts = [np.asarray(decide(scale * jacobian)[1]) for scale in (a, b)]
  _assert_close(decide((a + b) * jacobian)[1], sum(parts), f"{balancer.name}: scaled rows",
                rtol=1e-3, atol=1e-3)


def simplex(balancer: Balancer, num_tasks: int) -> None:
  """Weights are non-negative and sum to one."""
  decide = decider(balancer, num_tasks)
  for name, jacobian in hard_cases(num_tasks).items():
    weights = np.asarray(decide(jacobian)[0])
    assert (weights >= 0).all() and abs(weights.sum() - 1) < 1e-4, (
        f"{balancer.name}: {name}: weights sum to {weights.sum()}, the least is {weights.min()}")


def stationary(balancer: Balancer, num_tasks: int) -> None:
  """Where a convex combination of the gradients is zero, so is the direction."""
  decide = decider(balancer, num_tasks)
  for seed in range(3):
    jacobian = normal(num_tasks, seed)
    shares = np.random.default_rng(seed).dirichlet(np.ones(num_tasks))[:, None]
    jacobian -= (shares * jacobian).sum(axis=0)
    length = np.linalg.norm(decide(jacobian)[1]) / np.linalg.norm(jacobian, axis=1).mean()
    assert length < 5e-3, f"{balancer.name}: a direction of length {length:.2e} from none"


def declared_scale(balancer: Balancer, num_tasks: int) -> None:
  """T equal gradients come out as their sum or their mean, as the method declares."""
  jacobian = np.repeat(normal(1), num_tasks, axis=0)
  _, direction, _ = decider(balancer, num_tasks)(jacobian)
  factor = {"sum": num_tasks, "mean": 1, "own": None}[balancer.scale]
  if factor:
    _assert_close(direction, factor * jacobian[0], f"{balancer.name}: equal gradients", rtol=2e-5)


PROPERTIES: dict[str, Callable[[Balancer, int], None]] = {
    "declared_scale": declared_scale,
    "linear_under_row_scaling": linear_under_row_scaling,
    "non_conflicting": non_conflicting,
    "permutation_equivariant": permutation_equivariant,
    "scale_equivariant": scale_equivariant,
    "scale_invariant": scale_invariant,
    "simplex": simplex,
    "stationary": stationary,
}


# ---- The contract.


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
      _assert_close(found, expected, f"{balancer.name}: an absent task holding {garbage}",
                    rtol=1e-6)
      assert found[0][1] == 0, f"{balancer.name}: an absent task has weight {found[0][1]}"
      jax.tree.map(lambda new, old: np.testing.assert_array_equal(
          new[1], old[1], err_msg=f"{balancer.name}: an absent task's state"), found[2], state)
    weights, direction, kept = decide(jacobian, state, np.zeros(3, bool), losses)
    assert not np.any(weights) and not np.any(direction), f"{balancer.name}: nobody active"
    _assert_close(kept, state, f"{balancer.name}: state with nobody active", rtol=1e-6)


def check_batches(balancer: Balancer) -> None:
  """A batch over keys equals one at a time."""
  jacobian, decide = conflicting(), decider(balancer, 3)
  keys = jax.random.split(jax.random.key(1), 4)
  state = init_state(balancer, 3, jacobian)
  together = jax.jit(jax.vmap(lambda key: decide.program(
      jacobian, state, np.ones(3, bool), np.ones(3, np.float32), key)[1]))(keys)
  _assert_close(together, np.stack([decide(jacobian, state, key=key)[1] for key in keys]),
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
    weights, direction, state = _decide(balancer, state=state, **inputs)
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
      _assert_close(jax.tree.map(lambda leaf, index=index: leaf[index], batch), alone,
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
  _assert_close(decide(split), decide(jacobian), f"{balancer.name}: {devices} devices", rtol=1e-5,
                atol=1e-6)


def check_balancer(factory: Callable[[int], Balancer], *, claims: Sequence[str] = (),
                   task_counts: Sequence[int] = TASK_COUNTS,
                   hyperparameters: Mapping[str, Sequence[Any]] | None = None) -> None:
  """Runs the whole contract, and the claimed properties, on a method.

  Args:
    factory: `factory(num_tasks) -> Balancer`.
    claims: names of `PROPERTIES`.
    task_counts: numbers of tasks for the hard cases; the properties take 2 and 5.
    hyperparameters: values, two or more of each, for arguments that `factory` also takes by name
      and that a search may vary; see `check_hyperparameters`.

  Raises:
    AssertionError: with a sentence on what was broken.
    ValueError: for a claim that is not in `PROPERTIES`.

  >>> from mtl_jax import balancing
  >>> check_balancer(lambda num_tasks, weight=1.: balancing.fixed((weight,) * num_tasks),
  ...                claims=["scale_equivariant"], task_counts=(2,),
  ...                hyperparameters={"weight": (1., 2.)})
  """
  unknown = set(claims) - set(PROPERTIES)
  if unknown:
    raise ValueError(f"claims: expected some of {', '.join(PROPERTIES)}, found {sorted(unknown)}")
  balancers = functools.cache(factory)  # one of each size, so that checks share its program
  check_declaration(balancers(3))
  check_state(balancers(3))
  check_compiles_once(balancers(3))
  check_inactive(balancers(3))
  check_batches(balancers(3))
  check_dtypes(balancers(3))
  check_sharding(balancers(2))
  check_resumes(balancers(3))
  if hyperparameters:
    check_hyperparameters(functools.partial(factory, 3), hyperparameters)
  for num_tasks in task_counts:
    check_hard_cases(balancers(num_tasks), num_tasks)
  for claim in claims:
    for num_tasks in CLAIM_TASK_COUNTS:
      PROPERTIES[claim](balancers(num_tasks), num_tasks)
