"""MGDA: the shortest convex combination of the gradients."""

from typing import Any

import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, masked, search, solvers
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, no_state
from mtl_jax.balancing.preference import of_active

NORMALIZATIONS = ("none", "l2", "loss", "loss+")


def mgda(normalization: str = "none") -> Balancer:
  """Finds the minimum-norm point in the convex hull of the task gradients.

  The rule: with each gradient divided by its scale `n_i`, `α = argmin ‖Σ α_i g_i / n_i‖²` over
  the simplex, and `d = Σ w_i g_i` with `w_i = α_i / n_i`. No task gets worse to first order
  along `d`, and `d = 0` exactly where no direction serves all.

  Args:
    normalization: the scale: "none" 1, "l2" the norm of the gradient, "loss" the size of the
      loss, "loss+" their product.

  Returns:
    A balancer that needs the Gramian. With "none" the weights sum to one; in general
    `Σ w_i n_i = 1`. A task whose gradient is zero is itself the minimum: such tasks share the
    whole weight, so that with nothing but zeros all active tasks weigh the same. With "none" and
    "loss" it also works from products with the Gramian, by `search.descend`.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, _ = balancing.aggregate(mgda("l2"), J)
  >>> [round(float(x), 4) for x in d]
  [0.0153, 0.199, 0.199]

  Reference:
    Sener, Koltun: Multi-Task Learning as Multi-Objective Optimization. NeurIPS 2018,
    arXiv:1810.04650. The rule without scales: Désidéri, C. R. Math. 350 (2012).

  Differences:
    The official code walks by pairs from the best two tasks, LibMTL by projected gradient, with
    weights of two tasks kept within [0.001, 0.999]; nash-mtl multiplies the weights by T; TorchJD
    stops Frank-Wolfe early. Here the minimum is reached to rounding, at a vertex too. A loss enters
    by its absolute value, so that no gradient is turned round.
  """
  hyperparameters.check_choice("mgda", "normalization", normalization, NORMALIZATIONS)

  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    gramian = signals.gramian
    scales = jnp.ones(gramian.shape[0], gramian.dtype)
    if normalization in ("loss", "loss+"):
      scales *= jnp.abs(signals.losses).astype(gramian.dtype)
    if normalization in ("l2", "loss+"):
      scales *= jnp.sqrt(jnp.diagonal(gramian))
    return Decision(solvers.shortest_combination(gramian, signals.active, scales)), state

  def by_products(count: int) -> Balancer:
    def search_or_solve(signals: Signals, state: search.SearchState) -> tuple[Decision, Any]:
      if signals.gramian is not None:
        return update(signals, state)
      return _search(signals, state, normalization == "loss", count)
    return balancer._replace(init=search.init, update=search_or_solve,
                             needs=frozenset({"products"}))

  balancer = Balancer("mgda", no_state, update, frozenset({"gramian"}),
                      scale="mean" if normalization == "none" else "own")
  if normalization in ("l2", "loss+"):  # products do not tell the gradients' norms
    return balancer
  return balancer._replace(by_products=by_products)


def _search(signals: Signals, state: search.SearchState, by_loss: bool,
            count: int) -> tuple[Decision, search.SearchState]:
  """Goes on from where the last step's search ended, in units of the scales."""
  active, dtype = signals.active, state.point.dtype
  inverse = jnp.ones_like(state.point)
  if by_loss:
    sizes = jnp.abs(masked.losses_of(signals.losses, active, dtype))
    inverse = 1 / masked.positive(sizes, active, dtype)
  product = search.within(
      lambda shares: inverse * signals.products(inverse * shares).astype(dtype), active)
  start = masked.shares(state.point, active, dtype)
  image = product(start)
  product, unit = search.scaled(product, image)
  place = search.Place(start, image / unit, state.step * unit)
  place = search.descend(product, place, active, count - 1)
  shares = jnp.where(jnp.any(image), place.point, of_active(None, active, dtype))
  state = search.SearchState(masked.with_shares(state.point, shares, active), place.step / unit)
  return Decision(jnp.where(active, inverse * shares, 0)), state
