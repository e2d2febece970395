"""Preferences among tasks and the ideal point, as scalarisations of many objectives take them."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, masked


def check(method: str, weights: Any, ideal: Any = 0.0) -> None:
  """Raises unless preferences and ideal point are what the scalarisations take."""
  if weights is not None:
    hyperparameters.check_numbers(
        method, "weights", weights, "one weight a task, none negative, not all zero",
        lambda array: array.ndim == 1 and (array >= 0).all() and array.any())
  hyperparameters.check_numbers(method, "ideal", ideal, "a finite number, or one a task",
                                lambda array: array.ndim <= 1)


def check_lengths(method: str, num_tasks: int, weights: Any, ideal: Any = 0.0) -> None:
  """Raises unless preferences and ideal point fit the number of tasks."""
  if weights is not None:
    hyperparameters.check_length(method, "weights", weights, num_tasks)
  hyperparameters.check_length(method, "ideal", ideal, num_tasks)


def of_active(weights: Any, active: jax.Array, dtype: Any) -> jax.Array:
  """Preferences [T] of the active tasks, 0 elsewhere; equal ones that sum to one if None."""
  given = 1 / masked.count(active, dtype) if weights is None else jnp.asarray(weights, dtype)
  return jnp.where(active, given, 0)


def above_ideal(losses: jax.Array, active: jax.Array, ideal: Any) -> jax.Array:
  """What the losses [T] exceed the ideal point by; 0 where inactive."""
  values = masked.losses_of(losses, active)
  return jnp.where(active, values - jnp.asarray(ideal, values.dtype), 0)
