"""Rules for the constant factors of the tasks' losses, before any balancing."""

from typing import NamedTuple

import numpy as np


class Rule(NamedTuple):
  """What a rule reads of each task, and how strongly.

  Attributes:
    reads: "sizes", how many training examples carry a label; "initial_losses", those on validation
      before the first step; or "relative_losses", those of the latest evaluation over the initial
      ones, read anew after each.
    power: to which the values are raised.
  """

  reads: str
  power: float


def data_size(power: float = 1.0) -> Rule:
  """The more labelled training examples, the more weight.

  Args:
    power: 1 in proportion, 0 equal, between them tempered, -1 the other way round.
  """
  return Rule("sizes", power)


def complexity(power: float = -1.0) -> Rule:
  """By the loss before training, which is high where a task is hard or its unit small.

  Args:
    power: -1 makes all weighted losses start alike; 1 gives hard tasks more weight.
  """
  return Rule("initial_losses", power)


def validation(power: float = 1.0) -> Rule:
  """By validation performance: what has learned least, relative to its start, gets most weight.

  Args:
    power: 1 in proportion to the part of the initial loss that is left; -1 the other way round.
  """
  return Rule("relative_losses", power)


RULES = {
    "data_size": data_size,
    "complexity": complexity,
    "validation": validation,
}


def weigh(values: np.ndarray, power: float) -> np.ndarray:
  """Weights [T] in proportion to a power of positive values [T], with a mean of one.

  Values that are not finite or not above zero, as of a task without labels, give weight one.

  >>> weigh(np.array([100., 300.]), 1.0).round(4).tolist()
  [0.5, 1.5]
  >>> weigh(np.array([2., np.nan, 1.]), -1.0).round(4).tolist()
  [0.6667, 1.0, 1.3333]
  """
  known = np.isfinite(values) & (values > 0)
  logs = power * np.log(np.where(known, values, 1))
  shares = np.exp(logs - logs[known].max(initial=-np.inf)) if known.any() else np.ones(len(values))
  return np.where(known, shares / shares[known].mean() if known.any() else 1, 1)
