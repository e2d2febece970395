"""GradNorm: weights are trained until every task pulls as hard as its pace asks for."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_jax.balancing import hyperparameters, masked, solvers, trained
from mtl_jax.balancing.balancer import Balancer, Decision, Signals

LEAST = 1e-3  # weight: Adam would step through zero
FASTEST = 1e6  # ratio of a loss to its first value


class GradnormState(NamedTuple):
  """The trained weights, and where the losses started.

  Attributes:
    weights: [T] positive, with sum T.
    first_losses: [T] each task's loss when it was first active; 0 before.
    seen: [T] bool, whether that has been.
    adam: Adam's moments and step counts, one a task: every leaf is [T].
  """

  weights: jax.Array
  first_losses: jax.Array
  seen: jax.Array
  adam: Any


def gradnorm(alpha: float | jax.Array = 1.5, learning_rate: float | jax.Array = 0.025) -> Balancer:
  """Trains the weights so that slow tasks have long weighted gradients, fast ones short ones.

  The rule: with `n_i = w_i ‖g_i‖` and `r_i` the share of its first loss that task i still has,
  divided by the mean share, each task's target is `mean(n) r_i^α`, held constant. The weights
  descend `Σ |n_i - target_i|`, whose gradient is `sign(n_i - target_i) ‖g_i‖`, by Adam, and are
  then scaled to the sum T. `d = Σ w_i g_i` with the weights from before that.

  Args:
    alpha: not negative; how much a task that lags behind is helped. With 0 all are to have the
      same norm.
    learning_rate: of the Adam that moves the weights; above 0.

  Returns:
    A balancer that needs the Gramian and looks at the losses; it weighs the heads too. Its
    state is [T] arrays; a task that is not active keeps its own, and the others share the rest
    of the sum.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, state = balancing.aggregate(gradnorm(), J)
  >>> d.tolist(), [round(float(w), 3) for w in state.weights]
  ([2.0, 2.0, 2.0], [1.025, 0.975])

  Reference:
    Chen, Badrinarayanan, Lee, Rabinovich: GradNorm: Gradient Normalization for Adaptive Loss
    Balancing in Deep Multitask Networks. ICML 2018, arXiv:1711.02257.

  Differences:
    The paper takes norms at the last shared layer only, to be cheap; here, as in LibMTL, they
    are those of all gradients that the step hands over. No second backward pass is needed: only
    the norms matter. LibMTL trains logits of weights `T softmax` with the network's optimizer,
    takes the mean losses of the first epoch as the first ones and leaves the heads unweighted.
    Some codes use the new weights at once, or turn the sign of the exponent. Ours alone: Adam
    sees norms in units of their mean, and no weight falls below 0.001 before scaling. TorchJD
    has no GradNorm.
  """
  hyperparameters.check_numbers("gradnorm", "alpha", alpha, "a number not below 0",
                                lambda array: array.ndim == 0 and array >= 0)
  trained.check_rate("gradnorm", "learning_rate", learning_rate)

  def init(num_tasks: int) -> GradnormState:
    weights = jnp.ones(num_tasks, float)
    return GradnormState(weights, 0 * weights, jnp.zeros(num_tasks, bool),
                         trained.start(weights))

  def update(signals: Signals, state: GradnormState) -> tuple[Decision, GradnormState]:
    active, weights = signals.active, state.weights
    dtype = weights.dtype
    losses = masked.losses_of(signals.losses, active, dtype)
    first = jnp.where(state.seen, state.first_losses, losses)
    _, norms = solvers.unit_rows(signals.gramian, active)
    unit = masked.mean(norms, active)
    norms = (norms / jnp.where(unit > 0, unit, 1)).astype(dtype)
    gradient = norm_gradient(weights, norms, paces(losses, first, active),
                             jnp.asarray(alpha, dtype), active)

    with jax.numpy_dtype_promotion("standard"):  # Adam takes a power of its integer count
      move, moments = jax.vmap(optax.scale_by_adam().update)(gradient, state.adam)
    moved = jnp.maximum(weights - jnp.asarray(learning_rate, dtype) * move, LEAST)
    left = len(weights) - jnp.sum(jnp.where(active, 0, weights))
    moved *= left / jnp.maximum(jnp.sum(moved, where=active), LEAST)
    stepped = GradnormState(moved, first, jnp.ones_like(active), moments)
    return (Decision(jnp.where(active, weights, 0).astype(signals.gramian.dtype)),
            masked.keep(active, stepped, state))

  return Balancer("gradnorm", init, update, frozenset({"gramian"}), scale_heads=True)


def paces(losses: jax.Array, first: jax.Array, active: jax.Array) -> jax.Array:
  """What is left of each first loss, [T], over the mean of that; ones if nothing is left."""
  shares = jnp.where(first != 0, losses / jnp.where(first != 0, first, 1), 1)
  shares = jnp.where(active, jnp.clip(shares, 0, FASTEST), 0)
  mean = masked.mean(shares, active)
  return jnp.where(mean > 0, shares / jnp.where(mean > 0, mean, 1), 1)


def norm_gradient(weights: jax.Array, norms: jax.Array, pace: jax.Array, alpha: jax.Array,
                  active: jax.Array) -> jax.Array:
  """Gradient [T] of `Σ |w_i ‖g_i‖ - target_i|` by the weights; all arguments but alpha are [T]."""
  weighted = jnp.where(active, weights * norms, 0)
  mean = masked.mean(weighted, active)
  return jnp.where(active, jnp.sign(weighted - mean * pace**alpha) * norms, 0)
