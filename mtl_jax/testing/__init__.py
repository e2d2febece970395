"""Checks for balancing methods: the contract that all keep, and the properties that papers claim.

`check_balancer(factory, claims=…)` runs them on a method of your own; they raise AssertionError
with a sentence that says what was broken, and on which Jacobian.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

from mtl_jax.balancing.balancer import Balancer
from mtl_jax.testing.contract import (check_batches, check_compiles_once, check_declaration,
                                      check_dtypes, check_hard_cases, check_hyperparameters,
                                      check_inactive, check_resumes, check_sharding, check_state)
from mtl_jax.testing.jacobians import conflicting, decider, hard_cases, normal, signals_of
from mtl_jax.testing.properties import PROPERTIES, declared_scale

TASK_COUNTS = (1, 2, 3, 11, 40)
CLAIM_TASK_COUNTS = (2, 5)


def check_balancer(factory: Callable[[int], Balancer], *, claims: Sequence[str] = (),
                   task_counts: Sequence[int] = TASK_COUNTS,
                   hyperparameters: Mapping[str, Sequence[Any]] | None = None) -> None:
  """Runs the whole contract, and the claimed properties, on a method.

  Args:
    factory: `factory(num_tasks) -> Balancer`.
    claims: names of `PROPERTIES`.
    task_counts: numbers of tasks for the hard cases; the properties take 2 and 5.
    hyperparameters: values, two or more of each, for arguments that `factory` also takes by name
      and that a search may vary; see `check_hyperparameters`.

  Raises:
    AssertionError: with a sentence on what was broken.
    ValueError: for a claim that is not in `PROPERTIES`.

  >>> from mtl_jax import balancing
  >>> check_balancer(lambda num_tasks, weight=1.: balancing.fixed((weight,) * num_tasks),
  ...                claims=["scale_equivariant"], task_counts=(2,),
  ...                hyperparameters={"weight": (1., 2.)})
  """
  unknown = set(claims) - set(PROPERTIES)
  if unknown:
    raise ValueError(f"claims: expected some of {', '.join(PROPERTIES)}, found {sorted(unknown)}")
  balancers = functools.cache(factory)  # one of each size, so that checks share its program
  check_declaration(balancers(3))
  check_state(balancers(3))
  check_compiles_once(balancers(3))
  check_inactive(balancers(3))
  check_batches(balancers(3))
  check_dtypes(balancers(3))
  check_sharding(balancers(2))
  check_resumes(balancers(3))
  if hyperparameters:
    check_hyperparameters(functools.partial(factory, 3), hyperparameters)
  for num_tasks in task_counts:
    check_hard_cases(balancers(num_tasks), num_tasks)
  for claim in claims:
    for num_tasks in CLAIM_TASK_COUNTS:
      PROPERTIES[claim](balancers(num_tasks), num_tasks)
