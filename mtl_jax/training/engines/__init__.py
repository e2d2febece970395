"""Gradient engines: how the tasks' gradients, or their inner products, are obtained.

An engine is one word, or a section with its arguments, valid for every balancing method that it
can serve:

  exact        gradients of the shared parameters, one backward pass of the trunk a task.
  features     gradients of the shared representation, one backward pass of the trunk whatever T.
  matrix_free  products of the Gramian with weights, for methods that search for theirs.
  sketched     an estimate of the Gramian from random directions, averaged over steps.

The last two pass the trunk forwards along directions of the shared parameters, a fixed number of
times whatever T. Heads and losses need no forward derivative; a trunk does, so that one with a
`jax.custom_vjp` is refused by jax, while `jax.custom_jvp` will do.
"""

from collections.abc import Callable, Mapping
import difflib
from typing import Any

import jax

from mtl_jax.balancing import Balancer
from mtl_jax.training.engines.engine import Backward, Engine
from mtl_jax.training.engines.exact import exact
from mtl_jax.training.engines.features import features
from mtl_jax.training.engines.matrix_free import matrix_free
from mtl_jax.training.engines.sketched import sketched

ENGINES: Mapping[str, Callable[..., Engine]] = {
    "exact": exact,
    "features": features,
    "matrix_free": matrix_free,
    "sketched": sketched,
}

__all__ = ["Backward", "ENGINES", "Engine", "adapted", "exact", "features", "get",
           "matrix_free", "sketched"]


def get(engine: str | Engine) -> Engine:
  """The engine of a word, with its defaults; an engine stays as it is.

  >>> get("features").name, get(sketched(directions=4)).name
  ('features', 'sketched')

  Raises:
    ValueError: for an unknown word.
  """
  if isinstance(engine, Engine):
    return engine
  if engine not in ENGINES:
    nearest = difflib.get_close_matches(str(engine), ENGINES)
    hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
    raise ValueError(f"gradients: expected one of {list(ENGINES)}, found {engine!r}{hint}")
  return ENGINES[engine]()


def adapted(engine: Engine, balancer: Balancer, state: Any, num_tasks: int) -> Balancer:
  """The method as an engine serves it, for a state that was created so.

  Raises:
    ValueError: where the state was created for another engine.
  """
  served = engine.adapt(balancer)
  if served is not balancer:
    expected = jax.eval_shape(lambda: served.init(num_tasks))
    if jax.tree.structure(state) != jax.tree.structure(expected):
      raise ValueError(f"state: expected one with what {engine.name} keeps from step to step, found "
                       "one without; create it with the same gradients=")
  return served
