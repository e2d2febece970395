"""Quadratic programs of the size of the task count, over what is not negative."""

import jax
import jax.numpy as jnp

PIVOTS = 6  # of the search for the positive entries, at most; well-posed programs take 1 to 4
ITERATIONS = 25  # of the interior point, at most; twice what well-posed programs take


def nonnegative_minimum(matrix: jax.Array, linear: jax.Array, mask: jax.Array,
                        prices: jax.Array | None = None) -> jax.Array:
  """Minimises `½ yᵀ M y - bᵀ y` over `y ≥ 0`, `pricesᵀ y = 1`.

  Without prices a few pivots solve most programs to rounding; the others, and those with prices,
  are left to an interior point. Has forward derivatives only.

  Args:
    matrix: [T, T] symmetric, positive semidefinite, with a diagonal of about one.
    linear: [T] the vector b; the minimum must exist.
    mask: [T] bool; coordinates that do not take part are neither read nor moved.
    prices: [T] not negative, with a maximum of about one; without them `y` is only `≥ 0`.

  Returns:
    [T] the minimiser; 0 where masked.

  >>> y = nonnegative_minimum(jnp.eye(2), jnp.array([2., -1.]), jnp.array([True, True]))
  >>> [round(float(x), 4) for x in y]
  [2.0, 0.0]
  >>> y = nonnegative_minimum(jnp.eye(2), jnp.array([1., 0.5]), jnp.ones(2, bool), jnp.ones(2))
  >>> [round(float(x), 4) for x in y]
  [0.75, 0.25]
  """
  both = mask[:, None] & mask[None]
  matrix, linear = jnp.where(both, matrix, 0), jnp.where(mask, linear, 0)
  if prices is not None:
    return _interior_point(matrix, linear, mask, jnp.where(mask, prices, 0))
  y, found = _by_pivots(matrix, linear, mask)
  return jnp.where(found, y, _interior_point(matrix, linear, mask, skip=found))


def _by_pivots(matrix: jax.Array, linear: jax.Array,
               mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`nonnegative_minimum` without prices, by block principal pivoting.

  If it is known which entries are positive, the rest is a linear system. Entries of the wrong sign
  change sides, all at once, until there are none. Where `M` is nearly singular that may never
  happen, or the system not be solved to rounding.

  Args:
    matrix: [T, T], 0 where masked.
    linear: [T], 0 where masked.
    mask: [T] bool.

  Returns:
    [T] the minimiser, and [] bool, whether it was found.

  Reference:
    Júdice, Pires: A block principal pivoting algorithm for large-scale strictly monotone linear
    complementarity problems. Computers and Operations Research 21, 1994.
  """
  eps = jnp.finfo(matrix.dtype).eps
  product = lambda y: jnp.matmul(matrix, y, precision=jax.lax.Precision.HIGHEST)

  def unfinished(state: tuple[jax.Array, ...]) -> jax.Array:
    i, *_, found = state
    return (i < PIVOTS) & ~found

  def pivot(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    i, positive, *_ = state
    both = positive[:, None] & positive[None]
    factor = jax.scipy.linalg.cho_factor(
        jnp.where(both, matrix, 0) + jnp.diag(jnp.where(positive, 32 * eps, 1)), lower=True)
    solve = lambda b: jax.scipy.linalg.cho_solve(factor, jnp.where(positive, b, 0))
    y = solve(linear)
    y += solve(linear - product(y))  # so that the ridge does not count
    slope = product(y) - linear
    wrong = mask & ~(jnp.where(positive, y, slope) >= -4 * eps)
    unsolved = positive & ~(jnp.abs(slope) <= 4 * eps)
    return i + 1, positive ^ wrong, y, ~jnp.any(wrong | unsolved)

  start = jnp.zeros((), jnp.int32), linear > 0, jnp.zeros_like(linear), jnp.zeros((), bool)
  *_, y, found = jax.lax.while_loop(unfinished, pivot, start)
  return jnp.maximum(y, 0), found


def _interior_point(matrix: jax.Array, linear: jax.Array, mask: jax.Array,
                    prices: jax.Array | None = None, skip: jax.Array | bool = False) -> jax.Array:
  """`nonnegative_minimum` by a primal-dual interior point.

  Mehrotra's predictor and corrector, with a common step length for both. A small ridge in the
  Newton matrix, absent from the residual, keeps it positive definite where `M` is singular. It ends
  where the duality gap is below rounding, or after `ITERATIONS`.

  Args:
    matrix: [T, T], 0 where masked.
    linear: [T], 0 where masked.
    mask: [T] bool.
    prices: [T], 0 where masked, or none.
    skip: [] bool, whether the result is not needed.

  Returns:
    [T] the minimiser; 0 where masked.
  """
  eps = jnp.finfo(matrix.dtype).eps
  floor = eps**2
  count = jnp.maximum(jnp.sum(mask, dtype=matrix.dtype), 1)

  def gap_of(y: jax.Array, z: jax.Array) -> jax.Array:
    return jnp.sum(y * z, where=mask) / count

  def unfinished(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    i, y, z = state
    return jnp.logical_not(skip) & (i < ITERATIONS) & (gap_of(y, z) > floor)

  def iterate(state: tuple[jax.Array, jax.Array, jax.Array]
              ) -> tuple[jax.Array, jax.Array, jax.Array]:
    i, y, z = state
    residual = jnp.matmul(matrix, y, precision=jax.lax.Precision.HIGHEST) - linear - z
    factor = jax.scipy.linalg.cho_factor(matrix + jnp.diag(z / y + 32 * eps), lower=True)
    along = None if prices is None else jax.scipy.linalg.cho_solve(factor, prices)

    def newton(complement: jax.Array) -> tuple[jax.Array, jax.Array]:
      """The moves that lead, to first order, to a zero residual and y z = complement."""
      pull = jnp.where(mask, complement / y - z, 0)
      dy = jax.scipy.linalg.cho_solve(factor, jnp.where(mask, pull - residual, 0))
      if along is not None:  # the price's multiplier takes up what the budget lacks
        lacking = 1 - jnp.sum(prices * (jnp.where(mask, y, 0) + dy))
        dy += lacking / jnp.maximum(jnp.sum(prices * along), jnp.finfo(dy.dtype).tiny) * along
      return dy, pull - z / y * dy

    gap = gap_of(y, z)
    dy, dz = newton(jnp.zeros_like(y))
    step = jnp.minimum(1, jnp.minimum(longest_step(y, dy), longest_step(z, dz)))
    centring = (jnp.sum((y + step * dy) * (z + step * dz), where=mask) / count / gap)**3
    dy, dz = newton(jnp.minimum(centring, 1) * gap - dy * dz)
    step = jnp.minimum(1, 0.995 * jnp.minimum(longest_step(y, dy), longest_step(z, dz)))
    # Rounding can cost a Gramian more of its definiteness than the ridge gives back; the
    # factorisation then fails, and the point reached so far is as good as the matrix.
    sound = jnp.isfinite(jnp.sum(dy) + jnp.sum(dz))
    return (i + 1, jnp.where(sound, jnp.maximum(y + step * dy, floor), y),
            jnp.where(sound, jnp.maximum(z + step * dz, floor), z))

  start = jnp.ones_like(linear)
  _, y, _ = jax.lax.while_loop(unfinished, iterate, (jnp.zeros((), jnp.int32), start, start))
  return jnp.where(mask, y, 0)


def longest_step(point: jax.Array, move: jax.Array) -> jax.Array:
  """The longest step along `move` that keeps every entry of a positive point above zero."""
  falls = move < 0
  return jnp.min(jnp.where(falls, -point / jnp.where(falls, move, -1), jnp.inf))
