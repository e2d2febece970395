"""CoV-Weighting: losses that still vary weigh more."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, masked
from mtl_jax.balancing.balancer import Balancer, Decision, Signals

LARGEST_RATIO = 1e15  # whose square is still a float32


class CovWeightingState(NamedTuple):
  """Statistics of each task's losses so far.

  Attributes:
    loss: [T] mean loss.
    ratio: [T] mean of the ratios of losses to their mean before.
    variance: [T] variance of these ratios.
    steps: [T] int32 losses seen.
  """

  loss: jax.Array
  ratio: jax.Array
  variance: jax.Array
  steps: jax.Array


def cov_weighting(decay: float | jax.Array | None = None) -> Balancer:
  """Weighs tasks by the coefficient of variation of their relative losses.

  The rule: with `ℓ_i` a loss over the mean of those before it (first `ℓ_i = 1`), and `c_i` the
  standard deviation of the `ℓ_i` so far over their mean, `w_i = c_i / Σ c_j`. In a task's first
  two steps its `c_i` is the mean of those that are known, so that all start with `1 / T`.

  Args:
    decay: None for statistics of all steps alike; a number in [0, 1) for exponential ones, which
      keep this share of the past in every step.

  Returns:
    A balancer that needs the losses only; one backward pass. The weights sum to one.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J, state = jnp.array([[-4., 1., 1.], [6., 1., 1.]]), cov_weighting().init(2)
  >>> for losses in ([1., 1.], [3., 2.], [1., 1.]):  # ℓ: 1, 3 and 1, 2
  ...   d, state = balancing.aggregate(cov_weighting(), J, losses=jnp.array(losses), state=state)
  >>> [round(float(x), 4) for x in d]  # c: 1/2 and 1/3
  [0.0, 1.0, 1.0]

  Reference:
    Groenendijk, Karaoglu, Gevers, Mensink: Multi-Loss Weighting with Coefficient of Variations.
    WACV 2021, arXiv:2009.01717.

  Differences:
    As in the official code, the weights of a step come from the steps before it and the variance
    has 1e-8 added. With a decay the official variance is still a plain mean over all steps; ours
    decays as the means do. A loss below 1e-20 counts as that much, and `ℓ` stays within [1e-15,
    1e15].
  """
  if decay is not None:
    hyperparameters.check_numbers("cov_weighting", "decay", decay, "None or a number in [0, 1)",
                                  lambda array: array.ndim == 0 and 0 <= array < 1)

  def init(num_tasks: int) -> CovWeightingState:
    zeros = jnp.zeros(num_tasks, float)
    return CovWeightingState(zeros, zeros, zeros, jnp.zeros(num_tasks, jnp.int32))

  def update(signals: Signals, state: CovWeightingState) -> tuple[Decision, CovWeightingState]:
    active, dtype = signals.active, state.loss.dtype
    losses, first = masked.positive(signals.losses, active, dtype), state.steps == 0

    known = active & (state.steps >= 2)
    variations = jnp.sqrt(state.variance + 1e-8) / jnp.where(first, 1, state.ratio)
    typical = jnp.where(known.any(), masked.mean(variations, known), 1)
    variations = jnp.where(active, jnp.where(known, variations, typical), 0)
    weights = variations / jnp.where(active.any(), jnp.sum(variations), 1)

    ratios = jnp.where(first, 1, losses / jnp.where(first, 1, state.loss))
    ratios = jnp.clip(ratios, 1 / LARGEST_RATIO, LARGEST_RATIO)
    even = 1 / (state.steps + 1).astype(dtype)
    gain = even if decay is None else jnp.where(first, 1, 1 - jnp.asarray(decay, dtype))
    mean = state.ratio + gain * (ratios - state.ratio)
    spread = jnp.maximum((ratios - state.ratio) * (ratios - mean), 0)
    stepped = CovWeightingState(
        loss=state.loss + gain * (losses - state.loss),
        ratio=mean,
        variance=state.variance + gain * (spread - state.variance),
        steps=state.steps + 1,
    )
    return Decision(weights), masked.keep(active, stepped, state)

  return Balancer("cov_weighting", init, update, frozenset({"losses"}), scale_heads=True,
                  scale="mean")
