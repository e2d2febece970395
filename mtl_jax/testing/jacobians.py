"""Jacobians to try a method on, and its update on one of them, compiled once."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.balancing.balancer import Balancer, Signals, combine, fill_in, init_state

PARAMETERS = 8  # more than some task counts, fewer than others


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


def decide_once(balancer: Balancer, jacobian: jax.Array, state: Any, active: jax.Array,
                losses: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
  """Weights, direction and new state of one update, outside of jit."""
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
    return decide_once(balancer, jacobian, state, active, losses, key)

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


def assert_close(found: Any, expected: Any, what: str, rtol: float = 1e-4,
                 atol: float = 1e-6) -> None:
  """Raises AssertionError, which says `what`, unless two pytrees agree."""
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=what),
               found, expected)
