"""Checks of the methods' hyperparameters, and the one sentence in which they fail."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_choice(method: str, argument: str, value: Any, options: Sequence[str]) -> None:
  """Raises unless `value` is one of the options.

  >>> check_choice("pcgrad", "reduction", "avg", ("sum", "mean"))
  Traceback (most recent call last):
  ...
  ValueError: pcgrad: reduction: expected 'sum' or 'mean', found 'avg'
  """
  if not (isinstance(value, str) and value in options):
    *others, last = map(repr, options)
    raise mistake(method, argument, f"{', '.join(others)} or {last}", value)


def check_numbers(method: str, argument: str, value: Any, expected: str,
                  valid: Callable[[np.ndarray], Any]) -> None:
  """Raises unless `value` holds finite numbers that are `valid`; traced values pass unseen.

  Args:
    method: name of the method.
    argument: name of its argument.
    value: a number, an array or a sequence of numbers.
    expected: what the sentence says was expected.
    valid: takes the value as a float64 array, tells whether it will do.
  """
  if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)):
    return
  try:
    array = np.asarray(value)
    numeric = array.dtype.kind not in "bOSU"
    array = array.astype(np.float64) if numeric else array
  except (TypeError, ValueError):  # a ragged sequence
    numeric = False
  if not (numeric and np.isfinite(array).all() and valid(array)):
    raise mistake(method, argument, expected, value)


def check_length(method: str, argument: str, value: Any, num_tasks: int) -> None:
  """Raises if `value` is neither a scalar nor one number a task."""
  shape = jnp.asarray(value).shape  # which takes sequences of traced numbers too
  if shape not in ((), (num_tasks,)):
    raise mistake(method, argument, f"one number for each of the {num_tasks} tasks", value)


def mistake(method: str, argument: str, expected: str, found: Any) -> ValueError:
  """The error that says which argument, what it should be and what it was."""
  return ValueError(f"{method}: {argument}: expected {expected}, found {found!r}")
