"""CAGrad: near the mean gradient, the direction that serves the worst-off task best."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, masked, search, solvers
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, no_state
from mtl_jax.balancing.preference import of_active


def cagrad(c: float | jax.Array = 0.5, rescale: int = 1) -> Balancer:
  """Moves at most `c‖g0‖` away from the mean gradient `g0`, to the good of the worst-off task.

  The rule: `d = g0 + c ‖g0‖ g_w / ‖g_w‖` with `g_w = Σ w_i g_i`, where `w` minimises
  `g_w·g0 + c ‖g0‖ ‖g_w‖` over the simplex. That `d` maximises `min_i g_i·d` over the ball around
  `g0`. With `c = 0` it is the mean; from `c = 1` on, no task conflicts with it; for large `c` it
  turns to the direction of MGDA. `d` is then divided according to `rescale`.

  Args:
    c: radius of the ball in lengths of `g0`; not negative. The default is that of LibMTL; the
      official experiments use 0.4 on NYUv2 and, with it, the sum of the gradients.
    rescale: 0 leaves `d`, 1 divides it by `1 + c²`, 2 by `1 + c`.

  Returns:
    A balancer that needs the Gramian. With equal gradients `g` comes out as `(1 + c) g` before it
    is rescaled, hence as `g` with `rescale=2`; when all gradients are zero the weights are equal
    and of that scale. A task whose gradient is zero counts in the mean, and no more: nothing can
    serve it or harm it. Where zero lies in the hull of the gradients the push may be shorter than
    `c ‖g0‖`; from `c = 1` on, it leaves there the part of `g0` that conflicts with nobody.
    It also works from products with the Gramian, by `search.descend`; there `‖g_w‖` counts as a
    thousandth of `‖g0‖` at least.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, _ = balancing.aggregate(cagrad(), J)
  >>> [round(float(x), 4) for x in d]
  [0.1468, 0.9633, 0.9633]

  Reference:
    Liu, Liu, Jin, Stone, Liu: Conflict-Averse Gradient Descent for Multi-task Learning. NeurIPS
    2021, arXiv:2110.14048.

  Differences:
    The official code and nash-mtl multiply `d` by T, some descendants then clip its norm at 1;
    LibMTL does neither, nor do we. TorchJD has no default `c`, does not rescale and returns zero
    where `‖g_w‖` is small. The official code and LibMTL call SciPy's SLSQP with 1e-8 under the
    root, TorchJD a conic solver; here Dinkelbach's method runs on the device.
  """
  hyperparameters.check_numbers("cagrad", "c", c, "a number not below 0",
                                lambda array: array.ndim == 0 and array >= 0)
  hyperparameters.check_numbers("cagrad", "rescale", rescale, "0, 1 or 2",
                                lambda array: array.ndim == 0 and array in (0, 1, 2))

  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    gramian, active = signals.gramian, signals.active
    radius = jnp.asarray(c, gramian.dtype)
    # Without a push its direction is of no account, but it has to be finite.
    push = solvers.worst_case_push(gramian, active, jnp.maximum(radius, 1e-3))
    return _pushed(active, radius, push, rescale), state

  def by_products(count: int) -> Balancer:
    def search_or_solve(signals: Signals, state: search.SearchState) -> tuple[Decision, Any]:
      if signals.gramian is not None:
        return update(signals, state)
      radius = jnp.asarray(c, state.point.dtype)
      push, state = _search(signals, state, jnp.maximum(radius, 1e-3), count)
      return _pushed(signals.active, radius, push, rescale), state
    return balancer._replace(init=search.init, update=search_or_solve,
                             needs=frozenset({"products"}))

  balancer = Balancer("cagrad", no_state, update, frozenset({"gramian"}),
                      scale="mean" if rescale == 2 else "own")
  return balancer._replace(by_products=by_products)


def _pushed(active: jax.Array, radius: jax.Array, push: jax.Array, rescale: int) -> Decision:
  """The mean, pushed and rescaled."""
  weights = of_active(None, active, push.dtype) + radius * push
  return Decision(weights / (1, 1 + radius**2, 1 + radius)[rescale])


def _search(signals: Signals, state: search.SearchState, radius: jax.Array,
            count: int) -> tuple[jax.Array, search.SearchState]:
  """The push [T], by a search that starts between the mean and where the last one ended."""
  active, dtype = signals.active, state.point.dtype
  any_task = lambda weights: signals.products(weights).astype(dtype)
  equal = of_active(None, active, dtype)
  image = search.within(any_task, active)(equal)
  live = active & (image != 0)  # a zero gradient counts in the mean only
  product, unit = search.scaled(search.within(any_task, live), image)
  image /= unit
  mean = jnp.sqrt(jnp.maximum(jnp.sum(equal * image), 0))
  linear = image / (radius * jnp.where(mean > 0, mean, 1))

  start = of_active(None, live, dtype)
  place = search.Place(start, image * masked.count(active, dtype) / masked.count(live, dtype),
                       state.step * unit)
  way = masked.shares(state.point, live, dtype) - start
  place = search.along(place, way, product(way), linear)
  place = search.descend(product, place, live, count - 2, linear)
  push = place.point * mean / jnp.maximum(place.length, jnp.where(mean > 0, mean / 1000, 1))
  state = search.SearchState(masked.with_shares(state.point, place.point, live),
                             place.step / unit)
  return jnp.where(active, jnp.where(mean > 0, push, equal), 0), state
