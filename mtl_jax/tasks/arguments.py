"""Checks of the arguments of tasks, and the one sentence in which they fail."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def check(task: str, argument: str, ok: bool, expected: str, found: Any) -> None:
  """Raises unless `ok`.

  >>> check("age", "delta", False, "a number > 0", -1.0)
  Traceback (most recent call last):
  ...
  ValueError: age: delta: expected a number > 0, found -1.0
  """
  if not ok:
    raise ValueError(f"{task}: {argument}: expected {expected}, found {found!r}")


def check_choice(task: str, argument: str, found: Any, options: Sequence[str]) -> None:
  """Raises unless `found` is one of the options."""
  *others, last = map(repr, options)
  check(task, argument, found in tuple(options), f"{', '.join(others)} or {last}", found)


def numbers(task: str, argument: str, found: Any, size: int, *, least: float = -np.inf,
            above: float = -np.inf) -> np.ndarray:
  """`size` finite numbers as float32 [size], from as many or from one for all.

  Args:
    task: name of the task.
    argument: name of its argument.
    found: a number or a sequence of numbers.
    size: how many there must be.
    least: none may be less.
    above: each must be more.

  >>> numbers("age", "std", 2.0, 3).tolist()
  [2.0, 2.0, 2.0]
  """
  array = np.asarray(found, np.float32)
  bound = (f" not below {least:g}" if least > -np.inf else
           f" above {above:g}" if above > -np.inf else "")
  fits = array.shape in ((), (1,), (size,)) and np.isfinite(array).all()
  check(task, argument, bool(fits and (array >= least).all() and (array > above).all()),
        f"{size} number{'s' if size > 1 else ''}{bound}", found)
  return np.broadcast_to(array, (size,))
