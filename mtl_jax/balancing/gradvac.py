"""GradVac: gradients are turned towards each other until they are as alike as they used to be."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, solvers
from mtl_jax.balancing.balancer import Balancer, Decision, Signals

STEEPEST = 1 - 1e-5  # of the targets: to reach a cosine of one takes an infinite multiple of g_j
LONGEST = 1e6  # multiple of any one gradient that may pile up in another


class GradvacState(NamedTuple):
  """How alike the gradients of the tasks have been.

  Attributes:
    targets: [T, T] moving averages of the cosines; row i as task i met the others.
  """

  targets: jax.Array


def gradvac(decay: float | jax.Array = 0.5) -> Balancer:
  """Raises the cosine of every pair of gradients to its moving average.

  The rule: for each `i` start from `g = g_i`; for the other `j` in random order let
  `φ = cos(g, g_j)`. Where `φ` is below the target `φ̂_ij`, add to `g` the multiple of `g_j` that
  makes their cosine `φ̂_ij`: `‖g‖ (φ̂ √(1 - φ²) - φ √(1 - φ̂²)) / (‖g_j‖ √(1 - φ̂²))`. Then
  `φ̂_ij ← decay φ̂_ij + (1 - decay) φ`. `d` is the sum of the results.

  Args:
    decay: share in [0, 1] of the old target that stays in the new one. Targets start at zero, so
      that the first step is that of PCGrad, and with 1 every step.

  Returns:
    A balancer that needs the Gramian, with one [T, T] array of state. The order is drawn from
    the step's key. Targets of pairs with an absent task, or with a gradient of zero, stay.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, state = balancing.aggregate(gradvac(), J)
  >>> [round(float(x), 4) for x in d]
  [0.5848, 3.8012, 3.8012]
  >>> d, state = balancing.aggregate(gradvac(), J, state=state)
  >>> [round(float(x), 4) for x in d]
  [1.0065, 3.2644, 3.2644]

  Reference:
    Wang, Tsvetkov, Firat, Cao: Gradient Vaccine: Investigating and Improving Multi-task
    Optimization in Massively Multilingual Models. ICLR 2021, arXiv:2010.05874.

  Differences:
    LibMTL and TorchJD write the average as `(1 - β) φ̂ + β φ`, with β = ½ by default; our decay is
    `1 - β`. Like them we update the target of every pair; some codes do so only where the
    gradient is changed. The paper keeps targets by groups of parameters, here there is one group.
    Where others add 1e-8 to denominators, we hold a target used within ±(1 - 1e-5).
  """
  hyperparameters.check_numbers("gradvac", "decay", decay, "a number in [0, 1]",
                                lambda array: array.ndim == 0 and 0 <= array <= 1)

  def init(num_tasks: int) -> GradvacState:
    return GradvacState(jnp.zeros((num_tasks, num_tasks), float))

  def update(signals: Signals, state: GradvacState) -> tuple[Decision, GradvacState]:
    active = signals.active
    cosines, norms = solvers.unit_rows(signals.gramian, active)
    dtype, live, tasks = cosines.dtype, norms > 0, jnp.arange(active.shape[0])
    keep = jnp.asarray(decay, dtype)
    order = jnp.argsort(jax.random.uniform(signals.key, cosines.shape, jnp.float32), axis=1)

    def meet(step: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
      coefficients, targets = carry
      other = order[:, step]
      overlaps = jnp.sum(coefficients * cosines[other], axis=1)
      products = jnp.matmul(coefficients, cosines, precision=jax.lax.Precision.HIGHEST)
      squares = jnp.sum(coefficients * products, axis=1)
      noise = 8 * jnp.finfo(dtype).eps * jnp.max(jnp.abs(coefficients), axis=1)**2
      met = (other != tasks) & live & live[other] & (squares > noise)
      lengths = jnp.sqrt(jnp.where(met, squares, 1))
      cosine = jnp.clip(overlaps / lengths, -1, 1)

      target = targets[tasks, other]
      used = jnp.clip(target, -STEEPEST, STEEPEST)
      more = lengths * (used * jnp.sqrt((1 - cosine**2) / (1 - used**2)) - cosine)
      coefficients = coefficients.at[tasks, other].add(jnp.where(met & (cosine < used), more, 0))
      largest = jnp.max(jnp.abs(coefficients), axis=1, keepdims=True)
      coefficients /= jnp.maximum(largest / LONGEST, 1)
      moved = keep * target + (1 - keep) * cosine
      return coefficients, targets.at[tasks, other].set(jnp.where(met, moved, target))

    # Row i holds g in units of ‖g_i‖, by the directions of all gradients.
    own = jnp.eye(len(tasks), dtype=dtype)
    coefficients, targets = jax.lax.fori_loop(
        0, len(tasks), meet, (own, state.targets.astype(dtype)))
    lengths = jnp.where(live, norms, 1)
    weights = 1 + jnp.sum(norms[:, None] * (coefficients - own), axis=0) / lengths
    state = GradvacState(targets.astype(state.targets.dtype))
    return Decision(jnp.where(active, weights, 0)), state

  return Balancer("gradvac", init, update, frozenset({"gramian"}))
