"""Every balancing method as it is put through the contract, and what it claims."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

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


def drawn(num_tasks: int) -> jax.Array:
  """Weights that the key of the contract's hard cases draws: not one number, but [T]."""
  return jax.nn.softmax(jax.random.normal(jax.random.key(0), (num_tasks,)))


LOSSES = (
    Row("equal"),
    Row("fixed", lambda num_tasks: {"weights": (0.5,) * num_tasks}, lambda num_tasks: 0.5),
    Row("uncertainty", at_zero=lambda num_tasks: 0.5),
    Row("random_weights", at_zero=drawn, draws=True),
    Row("revised_uncertainty", at_zero=lambda num_tasks: 0.5),
    Row("dwa"),
    Row("dwa", lambda num_tasks: {"temperature": 0.5, "window": 1}),
    Row("geometric", at_zero=mean),
    Row("scale_invariant"),
    Row("imtl_l"),
    Row("stch", at_zero=lambda num_tasks: num_tasks**-2),
    Row("stch", lambda num_tasks: {"weights": (0.5,) * num_tasks, "ideal": 0.1},
        lambda num_tasks: 0.5 / num_tasks),
    Row("stch", lambda num_tasks: {"warmup": 0, "nadir_steps": 1}),
    Row("tchebycheff", at_zero=lambda num_tasks: num_tasks**-2),
    Row("pbi", at_zero=lambda num_tasks: num_tasks**-0.5, signed=True),
    Row("cosmos", at_zero=mean, signed=True),
    Row("cov_weighting", at_zero=mean),
    Row("cov_weighting", lambda num_tasks: {"decay": 0.9}, mean),
    Row("famo", at_zero=mean),
    Row("group_dro", at_zero=mean),
    Row("go4align", lambda num_tasks: {"groups": min(2, num_tasks)}),
    Row("ldc_mtl", at_zero=mean, signed=True),
    Row("ldc_mtl", lambda num_tasks: {"normalization": "log"}, mean, signed=True),
)

GRAMIAN = (
    Row("mgda", at_zero=mean),
    Row("mgda", lambda num_tasks: {"normalization": "l2"}, mean),
    Row("mgda", lambda num_tasks: {"normalization": "loss+"}, mean),
    Row("pcgrad", draws=True),
    Row("pcgrad", lambda num_tasks: {"reduction": "mean"}, mean, draws=True),
    Row("gradvac", draws=True),
    Row("imtl_g", at_zero=mean, signed=True),
    Row("imtl", at_zero=mean, signed=True),
    Row("aligned_mtl", signed=True),
    Row("aligned_mtl", lambda num_tasks: {"scale": "median"}, signed=True),
    Row("aligned_mtl", lambda num_tasks: {"scale": "rmse", "preference": (0.5,) * num_tasks},
        lambda num_tasks: 0.5, signed=True),
    Row("conflict_free", signed=True),
    Row("conflict_free", lambda num_tasks: {"length": "harmonic"}, mean, signed=True),
    Row("gradnorm"),
    Row("ntkmtl", at_zero=lambda num_tasks: num_tasks**0.5),
    Row("krum", at_zero=mean),
    Row("krum", lambda num_tasks: {"byzantine": 0, "selected": 2, "distance": "plain"}, mean),
    Row("cagrad", at_zero=lambda num_tasks: 1.2 / num_tasks),
    Row("cagrad", lambda num_tasks: {"c": 1.0, "rescale": 2}, mean),
    Row("upgrad", at_zero=mean),
    Row("upgrad", lambda num_tasks: {"preference": (0.5,) * num_tasks, "regularization": 1e-4},
        lambda num_tasks: 0.5),
    Row("dualproj", at_zero=mean),
    Row("pcd", at_zero=mean),
    Row("pcd", lambda num_tasks: {"threshold": (0.5,) * num_tasks, "decay": 0.9}, mean),
    Row("nash_mtl", at_zero=mean),
    Row("nash_mtl", lambda num_tasks: {"max_norm": None}, mean),
    Row("fairgrad", at_zero=mean),
    Row("fairgrad", lambda num_tasks: {"alpha": 0.5}, mean),
    Row("pivrg", lambda num_tasks: {"scores": tuple(range(num_tasks))}, mean, settled=False),
)

TASK_GRADS = (
    Row("graddrop", at_zero=lambda num_tasks: 0.0, draws=True),
    Row("graddrop", lambda num_tasks: {"leak": (0.3,) * num_tasks}, lambda num_tasks: 0.0, True),
    Row("trimmed_mean", at_zero=mean),
    Row("moco", at_zero=mean),
    Row("moco", lambda num_tasks: {"normalization": "loss", "simplex": "softmax"}, mean),
    Row("db_mtl"),
    Row("excess_mtl"),
    Row("excess_mtl", lambda num_tasks: {"start": "update"}),
)

ROWS = LOSSES + GRAMIAN + TASK_GRADS
