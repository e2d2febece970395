"""Every balancing method as it is put through the contract, and what it claims."""

from collections.abc import Callable
import functools
import inspect
import typing
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
    claims: names of `mtl_jax.testing.PROPERTIES` that the method has.
    unsearched: arguments that do not go with the row's others.
  """

  name: str
  kwargs: Callable[[int], dict[str, Any]] = lambda num_tasks: {}
  at_zero: Callable[[int], float] = lambda num_tasks: 1.0
  draws: bool = False
  signed: bool = False
  settled: bool = True
  claims: tuple[str, ...] = ()
  unsearched: tuple[str, ...] = ()

  @functools.cache
  def build(self, num_tasks: int) -> balancing.Balancer:
    """The same method at every call, so that all tests share its compiled program."""
    return balancing.get(self.name, **self.kwargs(num_tasks))

  def search(self) -> dict[str, tuple[Any, Any]]:
    """Two values for every argument that may be an array, the first as in the row."""
    given = self.kwargs(3)
    return {parameter.name: two_values(parameter, given)
            for parameter in inspect.signature(balancing.METHODS[self.name]).parameters.values()
            if may_be_array(parameter) and parameter.name not in self.unsearched}

  def searched(self, num_tasks: int, **chosen) -> balancing.Balancer:
    """The method as in the row, but for what is chosen."""
    return balancing.get(self.name, **{**self.kwargs(num_tasks), **chosen})


def may_be_array(parameter: inspect.Parameter) -> bool:
  return jax.Array in typing.get_args(parameter.annotation) or parameter.annotation is jax.Array


def two_values(parameter: inspect.Parameter, given: dict[str, Any]) -> tuple[Any, Any]:
  """An argument's value in a row, and another one; both made up where there is none."""
  value = given.get(parameter.name, parameter.default)
  if value is None:
    takes_number = float in typing.get_args(parameter.annotation)
    return (0.5, 0.9) if takes_number else ((0.2, 0.5, 1.0), (1.0, 0.25, 0.5))
  if isinstance(value, int):
    return value, value + 1
  if isinstance(value, float):
    return value, 0.75 * value if value >= 0.1 else 0.3
  return value, tuple(0.75 * part for part in value)


def mean(num_tasks: int) -> float:
  return 1 / num_tasks


def drawn(num_tasks: int) -> jax.Array:
  """Weights that the key of the contract's hard cases draws: not one number, but [T]."""
  return jax.nn.softmax(jax.random.normal(jax.random.key(0), (num_tasks,)))


EVEN = ("permutation_equivariant", "scale_equivariant")
SAFE = ("non_conflicting", "permutation_equivariant")

LOSSES = (
    Row("equal", claims=(*EVEN, "linear_under_row_scaling")),
    Row("fixed", lambda num_tasks: {"weights": (0.5,) * num_tasks}, lambda num_tasks: 0.5,
        claims=("linear_under_row_scaling", "scale_equivariant")),
    Row("uncertainty", at_zero=lambda num_tasks: 0.5),
    Row("random_weights", at_zero=drawn, draws=True, claims=("simplex",)),
    Row("revised_uncertainty", at_zero=lambda num_tasks: 0.5),
    Row("dwa"),
    Row("dwa", lambda num_tasks: {"temperature": 0.5, "window": 1}),
    Row("geometric", at_zero=mean, claims=EVEN),
    Row("scale_invariant"),
    Row("imtl_l"),
    Row("stch", at_zero=lambda num_tasks: num_tasks**-2, unsearched=("warmup",)),
    Row("stch", lambda num_tasks: {"weights": (0.5,) * num_tasks, "ideal": 0.1},
        lambda num_tasks: 0.5 / num_tasks, unsearched=("warmup",)),
    Row("stch", lambda num_tasks: {"warmup": 0, "nadir_steps": 1},
        unsearched=("weights", "ideal")),
    Row("tchebycheff", at_zero=lambda num_tasks: num_tasks**-2),
    Row("pbi", at_zero=lambda num_tasks: num_tasks**-0.5, signed=True),
    Row("cosmos", at_zero=mean, signed=True),
    Row("cov_weighting", at_zero=mean, claims=("permutation_equivariant", "simplex")),
    Row("cov_weighting", lambda num_tasks: {"decay": 0.9}, mean),
    Row("famo", at_zero=mean, claims=("permutation_equivariant", "simplex")),
    Row("group_dro", at_zero=mean, claims=("permutation_equivariant", "simplex")),
    Row("go4align", lambda num_tasks: {"groups": min(2, num_tasks)}),
    Row("ldc_mtl", at_zero=mean, signed=True),
    Row("ldc_mtl", lambda num_tasks: {"normalization": "log"}, mean, signed=True),
)

GRAMIAN = (
    Row("mgda", at_zero=mean, claims=(*SAFE, "scale_equivariant", "simplex", "stationary")),
    Row("mgda", lambda num_tasks: {"normalization": "l2"}, mean,
        claims=(*SAFE, "scale_invariant", "stationary")),
    Row("mgda", lambda num_tasks: {"normalization": "loss+"}, mean,
        claims=(*SAFE, "scale_invariant", "stationary")),
    Row("pcgrad", draws=True, claims=("scale_equivariant",)),
    Row("pcgrad", lambda num_tasks: {"reduction": "mean"}, mean, draws=True),
    Row("gradvac", draws=True, claims=("scale_equivariant",)),
    Row("imtl_g", at_zero=mean, signed=True, claims=EVEN),
    Row("imtl", at_zero=mean, signed=True, claims=EVEN),
    Row("aligned_mtl", signed=True, claims=EVEN),
    Row("aligned_mtl", lambda num_tasks: {"scale": "median"}, signed=True, claims=EVEN),
    Row("aligned_mtl", lambda num_tasks: {"scale": "rmse", "preference": (0.5,) * num_tasks},
        lambda num_tasks: 0.5, signed=True),
    Row("conflict_free", signed=True,
        claims=(*SAFE, "scale_equivariant", "linear_under_row_scaling")),
    Row("conflict_free", lambda num_tasks: {"length": "harmonic"}, mean, signed=True,
        claims=(*SAFE, "scale_equivariant")),
    Row("gradnorm", claims=EVEN),
    Row("ntkmtl", at_zero=lambda num_tasks: num_tasks**0.5, claims=EVEN),
    Row("krum", at_zero=mean, claims=(*EVEN, "simplex")),
    Row("krum", lambda num_tasks: {"byzantine": 0, "selected": 2, "distance": "plain"}, mean,
        claims=(*EVEN, "simplex")),
    Row("cagrad", at_zero=lambda num_tasks: 1.2 / num_tasks, claims=EVEN),
    Row("cagrad", lambda num_tasks: {"c": 1.0, "rescale": 2}, mean,
        claims=(*SAFE, "scale_equivariant")),
    Row("upgrad", at_zero=mean,
        claims=(*SAFE, "scale_equivariant", "linear_under_row_scaling", "stationary")),
    Row("upgrad", lambda num_tasks: {"preference": (0.5,) * num_tasks, "regularization": 1e-4},
        lambda num_tasks: 0.5, claims=(*SAFE, "scale_equivariant", "linear_under_row_scaling")),
    Row("dualproj", at_zero=mean, claims=(*SAFE, "scale_equivariant", "stationary")),
    Row("pcd", at_zero=mean),
    Row("pcd", lambda num_tasks: {"threshold": (0.5,) * num_tasks, "decay": 0.9}, mean),
    Row("nash_mtl", at_zero=mean, claims=(*SAFE, "scale_invariant")),
    Row("nash_mtl", lambda num_tasks: {"max_norm": None}, mean, claims=(*SAFE, "scale_invariant"),
        unsearched=("max_norm",)),
    Row("fairgrad", at_zero=mean, claims=SAFE),
    Row("fairgrad", lambda num_tasks: {"alpha": 0.5}, mean, claims=SAFE),
    Row("pivrg", lambda num_tasks: {"scores": tuple(range(num_tasks))}, mean, settled=False,
        claims=("non_conflicting",)),
)

TASK_GRADS = (
    Row("graddrop", at_zero=lambda num_tasks: 0.0, draws=True, claims=EVEN),
    Row("graddrop", lambda num_tasks: {"leak": (0.3,) * num_tasks}, lambda num_tasks: 0.0, True,
        claims=EVEN),
    Row("trimmed_mean", at_zero=mean, claims=EVEN),
    Row("moco", at_zero=mean, claims=("permutation_equivariant", "simplex")),
    Row("moco", lambda num_tasks: {"normalization": "loss", "simplex": "softmax"}, mean,
        claims=("permutation_equivariant", "scale_invariant", "simplex")),
    Row("db_mtl", claims=EVEN),
    Row("excess_mtl", claims=EVEN),
    Row("excess_mtl", lambda num_tasks: {"start": "update"}),
)

PARTS = (
    Row("modo", at_zero=mean, claims=("permutation_equivariant", "simplex")),
    Row("modo", lambda num_tasks: {"weight_step": 0.1}, mean, claims=("simplex",)),
    Row("sdmgrad", at_zero=mean, claims=("simplex",)),  # long steps magnify rounding
    Row("sdmgrad", lambda num_tasks: {"weight_step": 0.1}, mean, claims=EVEN),
    Row("sdmgrad", lambda num_tasks: {"weight_step": 0.1, "preference": (0.5,) * num_tasks},
        lambda num_tasks: (1 / num_tasks + 0.15) / 1.3),
    Row("auto_lambda", at_zero=lambda num_tasks: 0.1, signed=True,
        claims=("permutation_equivariant",)),
    Row("auto_lambda", lambda num_tasks: {"form": "softmax", "init": 0.0}, mean,
        claims=("permutation_equivariant", "simplex")),
    Row("moml", at_zero=mean, claims=("permutation_equivariant", "simplex")),
    Row("forum", at_zero=mean, claims=("permutation_equivariant", "non_conflicting")),
)

ROWS = LOSSES + GRAMIAN + TASK_GRADS + PARTS
FIRST = {row.name: row for row in reversed(ROWS)}  # the first row of each method
