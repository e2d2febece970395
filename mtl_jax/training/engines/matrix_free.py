"""Products of the Gramian with weights, each one pass back through the trunk and one forwards."""

from typing import Any

import jax

from mtl_jax.balancing import Balancer, Signals
from mtl_jax.training.engines.engine import Backward, Engine


def matrix_free(products: int = 3) -> Engine:
  """For methods that can search for their weights: the Gramian is never formed.

  `G w = J (Jᵀ w)` is one backward pass for `Jᵀ w` and, along it, the derivatives of all T losses by
  one forward pass. A step costs a few such products whatever T. The method starts each search
  where the last step's ended, and keeps that place in its state.

  Args:
    products: how many a step a method may ask for; one that needs a fixed number takes that.

  Raises:
    ValueError: where there are fewer than two: one tells no curvature.

  >>> from mtl_jax import balancing
  >>> matrix_free().objection(balancing.mgda(), True, True) is None
  True
  >>> matrix_free().objection(balancing.pcgrad(), True, True)
  'does not work from products with the Gramian'
  """
  if products < 2:
    raise ValueError(f"products: expected 2 or more a step, found {products!r}")

  def look(balancer: Balancer, signals: Signals, state: Any,
           backward: Backward) -> tuple[Signals, Any, Any]:
    del balancer

    def product(weights: jax.Array, p: int = 0, q: int = 0) -> jax.Array:
      return backward.slopes(backward.pull(weights, q), p)
    return signals._replace(products=product), None, state

  def adapt(balancer: Balancer) -> Balancer:
    return balancer.by_products(products) if balancer.by_products else balancer

  return Engine("matrix_free", look, _objection, adapt, forwards=True)


def _objection(balancer: Balancer, one_stream: bool, one_representation: bool) -> str | None:
  del one_stream, one_representation
  if balancer.by_products or "products" in balancer.needs:
    return None
  return "does not work from products with the Gramian"
