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
import difflib

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
  """The method that a config names, built with its factory's keyword arguments.

  Args:
    name: a key of `METHODS`.
    **kwargs: the factory's own arguments; what is left out keeps the factory's default.

  Returns:
    The balancer.

  >>> get("mgda", normalization="l2").name
  'mgda'
  >>> get("pcgard")
  Traceback (most recent call last):
  ...
  ValueError: balancing: name: expected one of equal, fixed, graddrop, mgda, pcgrad, uncertainty, \
found 'pcgard'; nearest: pcgrad
  """
  if name not in METHODS:
    nearest = difflib.get_close_matches(str(name), METHODS)
    hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
    raise ValueError(f"balancing: name: expected one of {', '.join(sorted(METHODS))}, "
                     f"found {name!r}{hint}")
  return METHODS[name](**kwargs)
