"""Convex programs of the size of the task count, solved on the device.

Everything here has fixed shapes and a bounded number of iterations, so it compiles, batches and
shards; and it works on unit rows, so that float32 suffices whatever the gradients' norms.
"""

import jax
import jax.numpy as jnp

from mtl_jax.balancing import masked
from mtl_jax.balancing.quadratic import longest_step, nonnegative_minimum

ROUNDS = 10  # of Dinkelbach's method, each one quadratic program
NEWTON_STEPS = 60  # at most; 3 to 14 do, unless the gradients are all but dependent


def unit_rows(gramian: jax.Array, active: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Splits a Gramian into cosines and norms: `G_ij = norms_i cosines_ij norms_j`.

  Args:
    gramian: [T, T]. Rows and columns of inactive tasks may hold anything.
    active: [T] bool.

  Returns:
    Cosines [T, T] and norms [T], both 0 for tasks that are inactive or have a zero gradient.

  >>> cosines, norms = unit_rows(jnp.array([[9., 6.], [6., 16.]]), jnp.array([True, True]))
  >>> norms.tolist(), round(float(cosines[0, 1]), 4)
  ([3.0, 4.0], 0.5)
  """
  squares = jnp.where(active, jnp.diagonal(gramian), 0)
  live = squares >= jnp.finfo(gramian.dtype).tiny
  norms = jnp.where(live, jnp.sqrt(squares), 0)
  lengths = jnp.where(live, norms, 1)
  both = live[:, None] & live[None]
  return jnp.where(both, gramian, 0) / lengths[:, None] / lengths[None], norms


def shortest_combination(gramian: jax.Array, active: jax.Array,
                         prices: jax.Array | None = None) -> jax.Array:
  """Minimises `wᵀ G w` over `w ≥ 0` with `pricesᵀ w = 1`; on the simplex with prices of one.

  In `y_i = w_i ‖g_i‖` the rows are unit vectors and the constraint is `aᵀ y = 1` with
  `a_i = prices_i / ‖g_i‖`. The problem is homogeneous, so up to a factor its solution is that of
  `min yᵀ C y + (aᵀ y - 1)²` over `y ≥ 0`. With `a` scaled to a maximum of one, the factor lies
  between ½ and 1, however far apart the norms are.

  Args:
    gramian: [T, T], float32 or wider. Rows and columns of inactive tasks may hold anything.
    active: [T] bool.
    prices: [T] not negative; ones when left out.

  Returns:
    [T] weights; 0 where inactive. Active tasks with a zero gradient attain the minimum, 0: if
    there are any, they share a total weight of 1 equally.

  >>> w = shortest_combination(jnp.array([[18., -22.], [-22., 38.]]), jnp.array([True, True]))
  >>> [round(float(x), 4) for x in w]
  [0.6, 0.4]
  """
  dtype = gramian.dtype
  cosines, norms = unit_rows(gramian, active)
  live = norms > 0
  prices = jnp.ones_like(norms) if prices is None else jnp.where(live, prices, 0)
  highest = jnp.max(prices)
  prices = jnp.where(highest > 0, prices, 1)  # if all is free, every price is one
  highest = jnp.where(highest > 0, highest, 1)
  prices /= highest

  shortest = jnp.min(jnp.where(live, norms, jnp.inf))
  inverse = jnp.where(live, shortest / jnp.where(live, norms, 1), 0)
  ratios = prices * inverse
  ratios /= jnp.maximum(jnp.max(ratios), jnp.finfo(dtype).tiny)
  y = nonnegative_minimum(cosines + ratios[:, None] * ratios[None], ratios, live)
  combination = y * inverse
  spent = jnp.sum(prices * combination)
  weights = combination / jnp.where(spent > 0, spent, 1) / highest

  zero = active & ~live
  count = jnp.sum(zero, dtype=dtype)
  return jnp.where(count > 0, zero.astype(dtype) / jnp.maximum(count, 1), weights)


def regularized(gramian: jax.Array, active: jax.Array, amount: float | jax.Array) -> jax.Array:
  """Adds `amount` times the trace to the diagonal of a Gramian [T, T], but not to zero rows.

  >>> regularized(jnp.diag(jnp.array([3., 1., 0.])), jnp.ones(3, bool), 0.5).diagonal().tolist()
  [5.0, 3.0, 0.0]
  """
  squares = jnp.where(active, jnp.diagonal(gramian), 0)
  added = jnp.asarray(amount, gramian.dtype) * jnp.sum(squares)
  return gramian + jnp.diag(jnp.where(squares > 0, added, 0))


def cone_projection(cosines: jax.Array, start: jax.Array, mask: jax.Array) -> jax.Array:
  """Projects a combination of unit rows onto the cone of what conflicts with none of them.

  With unit rows `U` and `d0 = Uᵀ start`, the nearest `d` with `U d ≥ 0` is `Uᵀ y`, where `y`
  minimises `yᵀ C y` over `y ≥ start`. In `x = y - start` that is a program over `x ≥ 0`.

  Args:
    cosines: [T, T] `C`, as `unit_rows` gives it.
    start: [T] coefficients, with a maximum of about one.
    mask: [T] bool; rows that do not take part.

  Returns:
    [T] coefficients `y`.

  >>> cosines = jnp.array([[1., -0.5], [-0.5, 1.]])
  >>> y = cone_projection(cosines, jnp.array([1., 0.]), jnp.array([True, True]))
  >>> [round(float(x), 4) for x in y]
  [1.0, 0.5]
  """
  pull = jnp.matmul(cosines, start, precision=jax.lax.Precision.HIGHEST)
  return start + nonnegative_minimum(cosines, -pull, mask)


def worst_case_push(gramian: jax.Array, active: jax.Array, radius: jax.Array) -> jax.Array:
  """The push from the mean gradient, `radius` times as long, that serves the worst-off task best.

  With `g0` the mean gradient, it maximises `min_i g_i·(g0 + r‖g0‖ e)` over `‖e‖ ≤ 1`; the result
  combines the gradients to `‖g0‖ e`. By duality `e = g_w / ‖g_w‖` where `w` minimises
  `f(w) = g_w·g0 + r‖g0‖‖g_w‖` on the simplex. `f` is homogeneous, so in unit rows, with
  `y_i = w_i ‖g_i‖`, this is the least ratio `f(y) / aᵀy` with `a_i = 1 / ‖g_i‖`, and Dinkelbach's
  method finds it: given the ratio `t` so far, the `y` with the least `f(y) - t aᵀy` gives the
  next, which is never higher. That `y` is a quadratic program over `y ≥ 0`, whatever the norms.

  Args:
    gramian: [T, T], float32 or wider. Rows and columns of inactive tasks may hold anything.
    active: [T] bool.
    radius: [] positive.

  Returns:
    [T] coefficients of the gradients; 0 where inactive. A zero gradient counts in the mean only;
    if all are zero, or the mean is, each active task has the same coefficient.

  >>> gramian, active = jnp.array([[18., -22.], [-22., 38.]]), jnp.array([True, True])
  >>> [round(float(x), 4) for x in worst_case_push(gramian, active, jnp.array(0.5))]
  [0.4082, 0.0]
  """
  dtype = gramian.dtype
  cosines, norms = unit_rows(gramian, active)
  live = norms > 0
  count = masked.count(active, dtype)
  longest = jnp.max(norms)
  lengths = jnp.where(live, norms / jnp.where(longest > 0, longest, 1), 1)

  overlaps = jnp.matmul(cosines, lengths, precision=jax.lax.Precision.HIGHEST)
  total = jnp.sqrt(jnp.maximum(jnp.sum(lengths * overlaps, where=live), 0))  # ‖Σ g‖
  moves = total > jnp.sqrt(jnp.finfo(dtype).tiny)
  toward_mean = overlaps / jnp.where(moves, total, 1)
  prices = jnp.where(live, jnp.min(lengths) / lengths, 0)
  # Where zero lies in the hull of the gradients, no push helps; the ridge bounds it there. Its
  # square root is the length below which a combination of float32 unit rows is mere rounding.
  ridge = max(8 * float(jnp.finfo(dtype).eps), 1e-10)
  matrix = cosines + ridge * jnp.eye(len(norms), dtype=dtype)

  def cheapest(ratio: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    # The row asks for cos(u_i, e) ≥ demand_i. Below -1 it asks nothing, so far below is cut off.
    demand = (ratio * prices - toward_mean) / radius
    cut = demand < -2
    demand = jnp.maximum(demand, -2)
    scale = jnp.maximum(jnp.max(demand, where=live, initial=1), 1)
    y = scale * nonnegative_minimum(matrix, demand / scale, live)
    square = jnp.sum(y * jnp.matmul(matrix, y, precision=jax.lax.Precision.HIGHEST))
    return y, jnp.sqrt(jnp.maximum(square, 0)), cut

  def improve(_, ratio: jax.Array) -> jax.Array:
    y, length, cut = cheapest(ratio)
    kept = jnp.where(cut, 0, y)
    spent = jnp.sum(prices * kept)
    cost = radius * (length + 2 * jnp.sum(y, where=cut)) + jnp.sum(toward_mean * kept)
    better = cost / jnp.where(spent > 0, spent, 1)
    return jnp.where((length > 1) & (spent > 0), jnp.minimum(ratio, better), ratio)

  vertices = jnp.where(live, (toward_mean + radius) / jnp.where(live, prices, 1), jnp.inf)
  first = jnp.where(jnp.any(live), jnp.min(vertices), 0)
  y, length, _ = cheapest(jax.lax.fori_loop(0, ROUNDS, improve, first))
  push = total / count * y / jnp.maximum(length, 1) / lengths
  return jnp.where(active, jnp.where(moves & jnp.any(live), push, 1 / count), 0)


def fair_weights(gramian: jax.Array, active: jax.Array, shares: jax.Array,
                 alpha: jax.Array) -> jax.Array:
  """Solves `(G x)_i = (shares_i / x_i)^(1/α)` for `x > 0` by a damped primal-dual Newton method.

  It is the stationary point of a convex problem, hence unique where it exists. In units of what
  each task alone would get, `y_i = x_i ‖g_i‖^(2α/(1+α)) / shares_i^(1/(1+α))`, the equations are
  `z = M y` and `y z^α = 1` with ones on the diagonal of `M`; the second is linearised in its
  logarithm, and steps stop short of where an entry of `y` or `z` would reach zero. Has forward
  derivatives only.

  Args:
    gramian: [T, T], float32 or wider. Rows and columns of inactive tasks may hold anything.
    active: [T] bool.
    shares: [T] positive.
    alpha: [] positive. Up to 2, the solution is reached for norms eight decades apart, unless
      zero is all but in the hull of the gradients; at 4, for norms two decades apart.

  Returns:
    [T] weights `x`; 0 where inactive or where the gradient is zero. Where a convex combination of
    the gradients is zero no solution exists: a ridge of a few rounding units on the cosines, and
    a cap, keep `x` finite. If all active gradients are zero, their weights are equal and sum to 1.

  >>> gramian, active = jnp.array([[18., -22.], [-22., 38.]]), jnp.array([True, True])
  >>> x = fair_weights(gramian, active, jnp.ones(2), jnp.array(1.))
  >>> [round(float(v), 4) for v in x]
  [0.5915, 0.4071]
  """
  dtype = gramian.dtype
  eps, floor = jnp.finfo(dtype).eps, jnp.finfo(dtype).tiny**0.5
  cosines, norms = unit_rows(gramian, active)
  live = norms > 0
  longest = jnp.max(norms)
  longest = jnp.where(longest > 0, longest, 1)
  lengths = jnp.where(live, norms / longest, 1)
  alone = jnp.where(live, shares, 1)**(1 / (1 + alpha)) * lengths**((1 - alpha) / (1 + alpha))
  matrix = cosines + 4 * eps * jnp.eye(len(norms), dtype=dtype)
  cap = 32 * (4 * eps)**(-alpha / (1 + alpha))

  def unfinished(state: tuple[jax.Array, ...]) -> jax.Array:
    i, *_, moved = state
    return (i < NEWTON_STEPS) & (moved > 4 * eps)

  def iterate(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    i, y, z, _ = state
    residual = jnp.matmul(matrix, alone * y, precision=jax.lax.Precision.HIGHEST) / alone - z
    pull = -z / alpha * (alpha * jnp.log(z) + jnp.log(y))  # dz where y stays
    slope = z / (alpha * y)
    factor = jax.scipy.linalg.cho_factor(matrix + jnp.diag(slope + 32 * eps), lower=True)
    dy = jax.scipy.linalg.cho_solve(factor, jnp.where(live, alone * (pull - residual), 0)) / alone
    dz = jnp.where(live, pull - slope * dy, 0)
    step = jnp.minimum(1, 0.99 * jnp.minimum(longest_step(y, dy), longest_step(z, dz)))
    sound = jnp.isfinite(jnp.sum(dy) + jnp.sum(dz))
    moved = jnp.where(sound, jnp.max(jnp.maximum(jnp.abs(dy) / y, jnp.abs(dz) / z)), 0)
    y = jnp.where(sound, jnp.maximum(y + step * dy, floor), y)
    z = jnp.where(sound, jnp.maximum(z + step * dz, floor), z)
    y *= jnp.minimum(1, cap / jnp.max(y))  # all at once, so that what cancels still does
    return i + 1, y, z, moved

  start = jnp.ones_like(norms)
  _, y, _, _ = jax.lax.while_loop(
      unfinished, iterate, (jnp.zeros((), jnp.int32), start, start, jnp.array(jnp.inf, dtype)))
  weights = alone * y / lengths * longest**(-2 * alpha / (1 + alpha))
  equal = 1 / masked.count(active, dtype)
  return jnp.where(jnp.any(live), jnp.where(live, weights, 0), jnp.where(active, equal, 0))
