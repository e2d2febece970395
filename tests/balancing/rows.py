"""Every balancing method as it is put through the contract, and what it claims."""

from collections.abc import Callable
from typing import Any, NamedTuple

from mtl_jax import balancing


class Row(NamedTuple):
  """A method as it is put through the contract, and what it claims.

  Attributes:
    name: of the method.
    kwargs: from the number of tasks to the factory's arguments.
    at_zero: weight of each of T active tasks when every gradient is zero.
    draws: whether the decision depends on the key.
    signed: whether weights may be negative.
    settled: False where the update with all tasks but one absent may differ from that of fewer
      tasks, because the method's constants depend on T.
  """

  name: str
  kwargs: Callable[[int], dict[str, Any]] = lambda num_tasks: {}
  at_zero: Callable[[int], float] = lambda num_tasks: 1.0
  draws: bool = False
  signed: bool = False
  settled: bool = True

  def build(self, num_tasks: int) -> balancing.Balancer:
    return balancing.get(self.name, **self.kwargs(num_tasks))


def mean(num_tasks: int) -> float:
  return 1 / num_tasks


LOSSES = (
    Row("equal"),
    Row("fixed", lambda num_tasks: {"weights": (0.5,) * num_tasks}, lambda num_tasks: 0.5),
    Row("uncertainty", at_zero=lambda num_tasks: 0.5),
)

GRAMIAN = (
    Row("mgda", at_zero=mean),
    Row("mgda", lambda num_tasks: {"normalization": "l2"}, mean),
    Row("mgda", lambda num_tasks: {"normalization": "loss+"}, mean),
    Row("pcgrad", draws=True),
    Row("pcgrad", lambda num_tasks: {"reduction": "mean"}, mean, draws=True),
)

TASK_GRADS = (
    Row("graddrop", at_zero=lambda num_tasks: 0.0, draws=True),
    Row("graddrop", lambda num_tasks: {"leak": (0.3,) * num_tasks}, lambda num_tasks: 0.0, True),
)

ROWS = LOSSES + GRAMIAN + TASK_GRADS
