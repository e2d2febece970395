"""Smooth Tchebycheff: the worst tasks decide, softly."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.balancing import hyperparameters, masked, preference, trained
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, no_state


class StchState(NamedTuple):
  """What the warm-up form knows of each task.

  Attributes:
    nadir: [T] mean loss over the steps that gather it.
    steps: [T] int32 steps in which the task was active, until the nadir is complete.
  """

  nadir: jax.Array
  steps: jax.Array


def stch(mu: float | jax.Array = 1.0, weights: Sequence[float] | jax.Array | None = None,
         ideal: float | Sequence[float] | jax.Array = 0.0,
         warmup: int | jax.Array | None = None, nadir_steps: int | jax.Array = 100) -> Balancer:
  """Minimises a smooth maximum of the losses.

  The rule, as in the paper: `w` is the gradient of `μ log Σ exp(λ_i (L_i - z_i) / μ)`, so that
  `w = λ softmax(λ (L - z) / μ)`.

  With `warmup`, as in the paper's experiments on multi-task learning: first `w_i = 1 / L_i`, the
  gradient of `Σ log L_i`, for `warmup` steps and for `nadir_steps` more, over which the nadir `N`
  is the mean loss; from then on the gradient of `T μ log Σ exp(log(L_i / N_i) / μ)` over the T
  active tasks, `w_i = T softmax(log(L / N) / μ)_i / L_i`.

  Args:
    mu: μ, above 0; the smaller, the nearer to the maximum.
    weights: [T] preferences λ, none negative, not all zero; `1 / T` of the active tasks if None.
      Left out where `warmup` is given.
    ideal: z, a number or one a task: what no loss falls below. Left out where `warmup` is given.
    warmup: steps of the logarithmic sum before the nadir is gathered, from 0 on; None for the
      form without warm-up. The paper has four epochs.
    nadir_steps: steps over which the nadir is gathered, from 1 on. The paper has one epoch.

  Returns:
    A balancer that needs the losses only; one backward pass. With `warmup` a task counts the
    steps in which it is active, and takes part in the maximum once its own nadir is complete.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, _ = balancing.aggregate(stch(mu=0.1), J, losses=jnp.array([1., 2.]))
  >>> [round(float(x), 4) for x in d]
  [2.9665, 0.5, 0.5]

  Reference:
    Lin, Zhang, Yang, Liu, Wang, Zhang: Smooth Tchebycheff Scalarization for Multi-Objective
    Optimization. ICML 2024, arXiv:2402.19078.

  Differences:
    TorchJD has the first form, LibMTL and the official code for multi-task learning the second,
    in epochs; here steps count. In logarithms and quotients a loss below 1e-20, zero or negative,
    counts as that much.
  """
  trained.check_rate("stch", "mu", mu)
  preference.check("stch", weights, ideal)
  if warmup is None:
    return _without_warmup(mu, weights, ideal)
  if weights is not None:
    raise hyperparameters.mistake("stch", "weights", "None where warmup is given", weights)
  if isinstance(ideal, jax.core.Tracer) or np.any(np.asarray(ideal) != 0):
    raise hyperparameters.mistake("stch", "ideal", "0.0 where warmup is given", ideal)
  hyperparameters.check_numbers(
      "stch", "warmup", warmup, "None or a whole number of steps from 0 on",
      lambda array: array.ndim == 0 and array >= 0 and array == array.round())
  hyperparameters.check_numbers(
      "stch", "nadir_steps", nadir_steps, "a whole number of steps from 1 on",
      lambda array: array.ndim == 0 and array >= 1 and array == array.round())
  return _with_warmup(mu, warmup, nadir_steps)


def _without_warmup(mu: Any, weights: Any, ideal: Any) -> Balancer:
  """The form of the paper's theory."""
  def init(num_tasks: int) -> tuple:
    preference.check_lengths("stch", num_tasks, weights, ideal)
    return no_state(num_tasks)

  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    distances = preference.above_ideal(signals.losses, signals.active, ideal)
    preferred = preference.of_active(weights, signals.active, distances.dtype)
    shares = masked.softmax(preferred * distances, signals.active, mu)
    return Decision(preferred * shares), state

  return Balancer("stch", init, update, frozenset({"losses"}), scale_heads=True, scale="own")


def _with_warmup(mu: Any, warmup: Any, nadir_steps: Any) -> Balancer:
  """The form of the paper's experiments on multi-task learning."""
  def init(num_tasks: int) -> StchState:
    return StchState(jnp.zeros(num_tasks, float), jnp.zeros(num_tasks, jnp.int32))

  def update(signals: Signals, state: StchState) -> tuple[Decision, StchState]:
    active, steps, dtype = signals.active, state.steps, state.nadir.dtype
    gathered = steps - jnp.asarray(warmup, steps.dtype)
    settled = gathered >= jnp.asarray(nadir_steps, steps.dtype)
    losses = masked.positive(signals.losses, active, dtype)

    excess = jnp.log(losses) - jnp.log(jnp.maximum(state.nadir, masked.SMALLEST))
    present = active & settled
    shares = masked.count(present, dtype) * masked.softmax(excess, present, mu)
    weights = jnp.where(active, jnp.where(settled, shares, 1) / losses, 0)

    gathering = (gathered >= 0) & ~settled
    number = jnp.maximum(gathered + 1, 1).astype(dtype)
    nadir = jnp.where(gathering, state.nadir + (losses - state.nadir) / number, state.nadir)
    stepped = StchState(nadir, jnp.where(settled, steps, steps + 1))
    return Decision(weights), masked.keep(active, stepped, state)

  return Balancer("stch", init, update, frozenset({"losses"}), scale_heads=True, scale="own")
