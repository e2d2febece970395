"""Numbers that a method trains beside the network, one a task, each with its own Adam."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_jax.balancing import hyperparameters

LIMIT = 30.0  # of a trained logarithm: a loss that stays zero would drive it to infinity
LARGEST_GRADIENT = 1e15  # whose square is still a float32


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
