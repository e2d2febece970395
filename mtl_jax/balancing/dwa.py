"""DWA: who improves more slowly weighs more."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, masked, trained
from mtl_jax.balancing.balancer import Balancer, Decision, Signals

LARGEST_RATIO = 1e30


class DwaState(NamedTuple):
  """How the losses went, window by window.

  Attributes:
    mean: [T] mean loss of the window so far.
    steps: [T] int32 steps in the window so far.
    last: [T] mean loss of the last complete window.
    before: [T] mean loss of the window before it.
    windows: [T] int32 how many of these two there are.
  """

  mean: jax.Array
  steps: jax.Array
  last: jax.Array
  before: jax.Array
  windows: jax.Array


def dwa(temperature: float | jax.Array = 2.0, window: int | jax.Array = 25) -> Balancer:
  """Dynamic weight average: weighs tasks by how slowly their loss falls.

  The rule: with `r_i` the mean loss of the last complete window over that of the window before,
  `w = T softmax(r / τ)`, over the T active tasks. The weights are one until two windows are
  complete.

  Args:
    temperature: τ, above 0; the higher, the more alike the weights.
    window: steps in a window, from 1 on. The paper's is an epoch: give the steps of yours.

  Returns:
    A balancer that needs the losses only; one backward pass. The weights sum to T. A task's
    window counts the steps in which it is active; with less than two windows its `r` is one.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J, state = jnp.array([[-4., 1., 1.], [6., 1., 1.]]), dwa(window=1).init(2)
  >>> for losses in ([1., 1.], [1., 4.], [3., 5.]):
  ...   d, state = balancing.aggregate(dwa(window=1), J, losses=jnp.array(losses), state=state)
  >>> [round(float(x), 4) for x in d]
  [8.3515, 2.0, 2.0]

  Reference:
    Liu, Johns, Davison: End-to-End Multi-Task Learning with Attention. CVPR 2019,
    arXiv:1803.10704.

  Differences:
    Like nash-mtl, which also has 25 steps, we count windows in steps; its weights sum to one,
    with windows of ones before the first. TorchJD leaves the ends of epochs to the caller. A mean
    loss below 1e-20 counts as that much, and a ratio is at most 1e30.
  """
  trained.check_rate("dwa", "temperature", temperature)
  hyperparameters.check_numbers(
      "dwa", "window", window, "a whole number of steps from 1 on",
      lambda array: array.ndim == 0 and array >= 1 and array == array.round())

  def init(num_tasks: int) -> DwaState:
    zeros, none = jnp.zeros(num_tasks, float), jnp.zeros(num_tasks, jnp.int32)
    return DwaState(zeros, none, zeros + 1, zeros + 1, none)

  def update(signals: Signals, state: DwaState) -> tuple[Decision, DwaState]:
    active, dtype = signals.active, state.mean.dtype
    ratios = jnp.minimum(state.last / state.before, LARGEST_RATIO)
    ratios = jnp.where(state.windows == 2, ratios, 1)
    weights = masked.count(active, dtype) * masked.softmax(ratios, active, temperature)

    losses = masked.positive(signals.losses, active, dtype)
    steps = state.steps + 1
    mean = state.mean + (losses - state.mean) / steps.astype(dtype)
    complete = steps >= jnp.asarray(window, steps.dtype)
    stepped = DwaState(
        mean=jnp.where(complete, 0, mean),
        steps=jnp.where(complete, 0, steps),
        last=jnp.where(complete, mean, state.last),
        before=jnp.where(complete, state.last, state.before),
        windows=jnp.where(complete, jnp.minimum(state.windows + 1, 2), state.windows),
    )
    return Decision(weights), masked.keep(active, stepped, state)

  return Balancer("dwa", init, update, frozenset({"losses"}), scale_heads=True)
