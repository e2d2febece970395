"""Quadratic programs of the size of the task count, solved on the device.

Everything here has fixed shapes and a fixed number of iterations, so it compiles, batches and
shards; and it works on unit rows, so that float32 suffices whatever the gradients' norms.
"""

import jax
import jax.numpy as jnp

ITERATIONS = 25


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


def nonnegative_minimum(matrix: jax.Array, linear: jax.Array, mask: jax.Array) -> jax.Array:
  """Minimises `½ yᵀ M y - bᵀ y` over `y ≥ 0` by a primal-dual interior point.

  Mehrotra's predictor and corrector, with a common step length for both. A small ridge in the
  Newton matrix, absent from the residual, keeps it positive definite where `M` is singular.

  Args:
    matrix: [T, T] symmetric, positive semidefinite, with a diagonal of about one.
    linear: [T] the vector b; the minimum must exist.
    mask: [T] bool; coordinates that do not take part are neither read nor moved.

  Returns:
    [T] the minimiser; 0 where masked.

  >>> y = nonnegative_minimum(jnp.eye(2), jnp.array([2., -1.]), jnp.array([True, True]))
  >>> [round(float(x), 4) for x in y]
  [2.0, 0.0]
  """
  eps = jnp.finfo(matrix.dtype).eps
  floor = eps**2
  both = mask[:, None] & mask[None]
  matrix, linear = jnp.where(both, matrix, 0), jnp.where(mask, linear, 0)
  count = jnp.maximum(jnp.sum(mask, dtype=matrix.dtype), 1)

  def longest_step(point: jax.Array, move: jax.Array) -> jax.Array:
    falls = move < 0
    return jnp.min(jnp.where(falls, -point / jnp.where(falls, move, -1), jnp.inf))

  def iterate(_, point: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    y, z = point
    residual = jnp.matmul(matrix, y, precision=jax.lax.Precision.HIGHEST) - linear - z
    factor = jax.scipy.linalg.cho_factor(matrix + jnp.diag(z / y + 32 * eps), lower=True)

    def newton(complement: jax.Array) -> tuple[jax.Array, jax.Array]:
      """The moves that lead, to first order, to a zero residual and y z = complement."""
      pull = jnp.where(mask, complement / y - z, 0)
      dy = jax.scipy.linalg.cho_solve(factor, jnp.where(mask, pull - residual, 0))
      return dy, pull - z / y * dy

    gap = jnp.sum(y * z, where=mask) / count
    dy, dz = newton(jnp.zeros_like(y))
    step = jnp.minimum(1, jnp.minimum(longest_step(y, dy), longest_step(z, dz)))
    centring = (jnp.sum((y + step * dy) * (z + step * dz), where=mask) / count / gap)**3
    dy, dz = newton(jnp.minimum(centring, 1) * gap - dy * dz)
    step = jnp.minimum(1, 0.995 * jnp.minimum(longest_step(y, dy), longest_step(z, dz)))
    # Rounding can cost a Gramian more of its definiteness than the ridge gives back; the
    # factorisation then fails, and the point reached so far is as good as the matrix.
    sound = jnp.isfinite(jnp.sum(dy) + jnp.sum(dz))
    return (jnp.where(sound, jnp.maximum(y + step * dy, floor), y),
            jnp.where(sound, jnp.maximum(z + step * dz, floor), z))

  start = jnp.ones_like(linear)
  y, _ = jax.lax.fori_loop(0, ITERATIONS, iterate, (start, start))
  return jnp.where(mask, y, 0)


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
