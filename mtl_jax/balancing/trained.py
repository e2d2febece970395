"""Numbers that a method trains beside the network, one a task, each with its own Adam."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_jax.balancing import hyperparameters, masked
from mtl_jax.balancing.balancer import Balancer, Decision, Signals

LIMIT = 30.0  # of a trained logarithm: a loss that stays zero would drive it to infinity
LARGEST_GRADIENT = 1e15  # whose square is still a float32


class TrainedState(NamedTuple):
  """What the tasks have learned beside the network.

  Attributes:
    values: [T] the trained numbers; what they stand for, the method says.
    adam: Adam's moments and step counts, one a task: every leaf is [T].
  """

  values: jax.Array
  adam: Any


def balancer(name: str, init: float | jax.Array, learning_rate: float | jax.Array,
             weights: Callable[[jax.Array], jax.Array],
             gradient: Callable[[jax.Array, jax.Array], jax.Array]) -> Balancer:
  """A method whose weights depend on nothing but one trained number a task.

  Args:
    name: of the method.
    init: first value of every task, within [-`LIMIT`, `LIMIT`].
    learning_rate: of Adam; above 0.
    weights: from the values [T] before the step to the tasks' weights [T].
    gradient: from the values [T] and the losses [T], 0 where inactive, to what Adam descends, [T].

  Returns:
    A balancer that needs the losses only, and has a `TrainedState`; a task that is not active
    keeps its own part of it.

  Raises:
    ValueError: where `init` or `learning_rate` is out of its range.

  >>> from mtl_jax import balancing
  >>> shrinking = balancer("shrinking", 1., 0.1, weights=jnp.abs, gradient=lambda v, losses: v)
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, state = balancing.aggregate(shrinking, J)
  >>> d.tolist(), [round(float(v), 3) for v in state.values]
  ([2.0, 2.0, 2.0], [0.9, 0.9])
  """
  check(name, init, learning_rate)

  def init_state(num_tasks: int) -> TrainedState:
    return start_state(jnp.full(num_tasks, init, dtype=float))

  def update(signals: Signals, state: TrainedState) -> tuple[Decision, TrainedState]:
    active, values = signals.active, state.values
    losses = masked.losses_of(signals.losses, active, values.dtype)
    decision = Decision(jnp.where(active, weights(values), 0))
    return decision, step(state, gradient(values, losses), learning_rate, active)

  return Balancer(name, init_state, update, frozenset({"losses"}), scale_heads=True, scale="own")


def start_state(values: jax.Array) -> TrainedState:
  """The state before the first step, for first values [T]."""
  return TrainedState(values, start(values))


def step(state: TrainedState, gradient: jax.Array, learning_rate: Any,
         active: jax.Array) -> TrainedState:
  """The state after one step of the active tasks' Adam against their gradients [T]."""
  stepped = TrainedState(*descend(state.values, state.adam, gradient, learning_rate))
  return masked.keep(active, stepped, state)


def check(method: str, init: Any, learning_rate: Any) -> None:
  """Raises unless the first value lies within the limit and the learning rate is above 0."""
  hyperparameters.check_numbers(
      method, "init", init, f"a number in [{-LIMIT:g}, {LIMIT:g}]",
      lambda array: array.ndim == 0 and abs(array) <= LIMIT)
  check_rate(method, "learning_rate", learning_rate)


def check_rate(method: str, argument: str, rate: Any) -> None:
  """Raises unless `rate` is a number above 0."""
  hyperparameters.check_numbers(method, argument, rate, "a number above 0",
                                lambda array: array.ndim == 0 and array > 0)


def start(values: jax.Array) -> Any:
  """Adam's first moments and step counts for values [T]: every leaf is [T]."""
  return jax.vmap(optax.scale_by_adam().init)(values)


def descend(values: jax.Array, adam: Any, gradient: jax.Array,
            learning_rate: Any) -> tuple[jax.Array, Any]:
  """One step of each task's Adam against its gradient.

  Args:
    values: [T].
    adam: state of `start`.
    gradient: [T]; what exceeds `LARGEST_GRADIENT` is clipped to it.
    learning_rate: above 0.

  Returns:
    The new values, within `LIMIT`, and Adam's new state.
  """
  gradient = jnp.clip(gradient, -LARGEST_GRADIENT, LARGEST_GRADIENT)
  with jax.numpy_dtype_promotion("standard"):  # Adam takes a power of its integer count
    move, adam = jax.vmap(optax.scale_by_adam().update)(gradient, adam)
  rate = jnp.asarray(learning_rate, values.dtype)
  return jnp.clip(values - rate * move, -LIMIT, LIMIT), adam
