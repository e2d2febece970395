"""PCD: the first task leads, the others are constraints that no step may break."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, quadratic, solvers
from mtl_jax.balancing.balancer import Balancer, Decision, Signals
from mtl_jax.balancing.preference import of_active


class PCDState(NamedTuple):
  """How large each task's gradient usually is.

  Attributes:
    mean_square: [T] running mean of the squared norms, free of the bias towards its start.
    steps: [T] int32, how many batches have held the task.
  """

  mean_square: jax.Array
  steps: jax.Array


def pcd(threshold: float | jax.Array = 0.02, decay: float | jax.Array = 0.999,
        epsilon: float | jax.Array = 1e-8) -> Balancer:
  """Follows the first task as closely as progress on every other task allows.

  The rule: with gradients divided by their usual size, `ĝ_i = g_i / √(v_i + ε)` where `v_i` is the
  running mean of `‖g_i‖²`, take `d̃ = argmin ½‖d - ĝ_0‖²` subject to `ĝ_j·d ≥ τ_j ‖ĝ_j‖²` for the
  others, and `d = ‖g_0‖ d̃ / ‖d̃‖`. The program is solved in its multipliers. Where no direction
  meets all constraints, `d = g_0`. The order of the tasks is their priority: in a batch without
  the first, the first that is present leads.

  Args:
    threshold: τ, the progress asked for, one number or one a task; not negative. The leading
      task's own is not used.
    decay: of the running means; in [0, 1).
    epsilon: added under the root; above 0.

  Returns:
    A balancer that needs the Gramian. Its state is [T] arrays; a task that is not active keeps
    its own, step count included. Its length is that of the leading gradient: zero, with weight 1
    on that task, if that is zero; if all are zero the active tasks weigh the same, 1 in total.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, state = balancing.aggregate(pcd(), J)
  >>> [round(float(x), 4) for x in d]
  [-0.82, 2.9434, 2.9434]
  >>> [round(float(x), 3) for x in state.mean_square], state.steps.tolist()
  ([18.0, 38.0], [1, 1])

  Reference:
    Priority-Constrained Descent. TMLR 2026, arXiv:2606.29521.

  Differences:
    TorchJD solves the program on the host in float64, keeps one step count for all tasks and
    needs the primary task in every batch. A program counts as infeasible here if the solution
    misses a constraint by a thousandth of the largest.
  """
  hyperparameters.check_numbers("pcd", "threshold", threshold,
                                "a number not below 0, or one a task",
                                lambda array: array.ndim <= 1 and (array >= 0).all())
  hyperparameters.check_numbers("pcd", "decay", decay, "a number in [0, 1)",
                                lambda array: array.ndim == 0 and 0 <= array < 1)
  hyperparameters.check_numbers("pcd", "epsilon", epsilon, "a number above 0",
                                lambda array: array.ndim == 0 and array > 0)

  def init(num_tasks: int) -> PCDState:
    hyperparameters.check_length("pcd", "threshold", threshold, num_tasks)
    return PCDState(jnp.zeros(num_tasks, float), jnp.zeros(num_tasks, jnp.int32))

  def track(squares: jax.Array, active: jax.Array, state: PCDState) -> PCDState:
    kind = state.mean_square.dtype
    keep, steps = jnp.asarray(decay, kind), state.steps + active.astype(jnp.int32)
    share = (1 - keep) / (1 - keep**jnp.maximum(steps, 1).astype(kind))
    moved = state.mean_square + share * (squares.astype(kind) - state.mean_square)
    return PCDState(jnp.where(active, moved, state.mean_square), steps)

  def update(signals: Signals, state: PCDState) -> tuple[Decision, PCDState]:
    gramian, active = signals.gramian, signals.active
    dtype = gramian.dtype
    cosines, norms = solvers.unit_rows(gramian, active)
    live, leads = norms > 0, active & (jnp.cumsum(active) == 1)
    state = track(norms**2, active, state)
    usual = jnp.sqrt(state.mean_square.astype(dtype) + jnp.asarray(epsilon, dtype))
    sizes = jnp.where(live, norms / usual, 0)
    largest = jnp.max(sizes)
    sizes /= jnp.where(largest > 0, largest, 1)

    # In unit rows: cos(u_j, d̃) ≥ τ_j sizes_j, where d̃ starts as sizes_0 u_0.
    start, others = jnp.where(leads, sizes, 0), live & ~leads
    product = lambda y: jnp.matmul(cosines, y, precision=jax.lax.Precision.HIGHEST)
    lacking = jnp.asarray(threshold, dtype) * sizes - product(start)
    scale = jnp.maximum(jnp.max(lacking, where=others, initial=1), 1)
    ridge = 8 * jnp.finfo(dtype).eps * jnp.eye(len(norms), dtype=dtype)
    multipliers = scale * quadratic.nonnegative_minimum(cosines + ridge, lacking / scale, others)
    missed = jnp.max(lacking - product(multipliers), where=others, initial=0)
    mixed = start + jnp.where(missed < 1e-3 * scale, multipliers, 0)

    length = jnp.sqrt(jnp.maximum(jnp.sum(mixed * product(mixed)), jnp.finfo(dtype).eps))
    lead = jnp.sum(norms, where=leads)
    weights = mixed / length * jnp.where(live, lead / jnp.where(live, norms, 1), 0)
    weights = jnp.where(lead > 0, weights, leads.astype(dtype))
    equal = of_active(None, active, dtype)
    return Decision(jnp.where(jnp.any(live), weights, equal)), state

  return Balancer("pcd", init, update, frozenset({"gramian"}), scale="mean")
