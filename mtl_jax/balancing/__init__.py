"""How tasks share the trunk: one file a published method, one table of all of them.

| name | paper | year | looks at |
|---|---|---|---|
| `equal` | unitary scalarisation, Kurin et al., NeurIPS | 2022 | losses |
| `fixed` | constant weights, tuned by hand | | losses |
| `uncertainty` | uncertainty weighting, Kendall, Gal, Cipolla, CVPR | 2018 | losses |
| `mgda` | multiple-gradient descent, Sener, Koltun, NeurIPS | 2018 | Gramian |
| `pcgrad` | gradient surgery, Yu et al., NeurIPS | 2020 | Gramian |
| `graddrop` | gradient sign dropout, Chen et al., NeurIPS | 2020 | task gradients |

A method is a factory that closes over its hyperparameters and returns a `Balancer`, a pair of
pure functions. To add one, write its file and enter it in `METHODS` and in this table.

>>> balancer = get("pcgrad", reduction="mean")
>>> balancer.name, sorted(balancer.needs)
('pcgrad', ['gramian'])
"""

from collections.abc import Callable
import dataclasses
import difflib
import inspect

from mtl_jax.balancing import wrappers
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, aggregate
from mtl_jax.balancing.equal import equal
from mtl_jax.balancing.fixed import fixed
from mtl_jax.balancing.graddrop import graddrop
from mtl_jax.balancing.mgda import mgda
from mtl_jax.balancing.pcgrad import pcgrad
from mtl_jax.balancing.uncertainty import uncertainty

METHODS: dict[str, Callable[..., Balancer]] = {
    # losses
    "equal": equal,
    "fixed": fixed,
    "uncertainty": uncertainty,
    # gramian
    "mgda": mgda,
    "pcgrad": pcgrad,
    # task_grads
    "graddrop": graddrop,
}

__all__ = [
    "METHODS", "Balancer", "Decision", "Signals", "aggregate", "equal", "fixed", "get", "graddrop",
    "mgda", "pcgrad", "uncertainty",
]


def get(name: str, **kwargs) -> Balancer:
  """The method that a config names, under the wrappers that it names.

  Args:
    name: a key of `METHODS`.
    **kwargs: the factory's own arguments, and fields of `wrappers.Options` (`every`, `smoothed`,
      `log_losses`, `max_norm`, `reduction`, `scale_heads`) that the factory has not got itself.

  Returns:
    The balancer.

  >>> get("mgda", normalization="l2", every=10).name
  'mgda'
  >>> get("pcgard")  # doctest: +ELLIPSIS
  Traceback (most recent call last):
  ...
  ValueError: balancing: name: expected one of ...; nearest: pcgrad
  """
  if name not in METHODS:
    nearest = difflib.get_close_matches(str(name), METHODS)
    hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
    raise ValueError(f"balancing: name: expected one of {', '.join(sorted(METHODS))}, "
                     f"found {name!r}{hint}")
  options = {key: kwargs.pop(key) for key in wrapper_fields(name) if key in kwargs}
  return wrappers.wrap(METHODS[name](**kwargs), wrappers.Options(**options))


def wrapper_fields(name: str) -> tuple[str, ...]:
  """The wrappers that `get` lays over a method: all whose name is no argument of its factory."""
  own = inspect.signature(METHODS[name]).parameters
  return tuple(field.name for field in dataclasses.fields(wrappers.Options)
               if field.name not in own)
