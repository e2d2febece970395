"""Auto-Lambda: weights that make held-out losses fall after a step that was tried out."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, masked, trained
from mtl_jax.balancing.balancer import Balancer, Decision, Lookahead, Signals
from mtl_jax.balancing.trained import TrainedState

FORMS = ("raw", "softmax")


def auto_lambda(form: str = "raw", init: float | jax.Array = 0.1,
                learning_rate: float | jax.Array = 1e-4,
                inner_learning_rate: float | jax.Array = 0.1,
                primary: Sequence[float] | jax.Array | None = None) -> Balancer:
  """Learns the weights by the gradient of held-out losses through one step of the network.

  The rule: `θ' = θ - α Σ w_i ∇L_i(θ)` on one half of the batch. On the other half,
  `F = Σ p_i L_i(θ')`, whose derivative is `∂F/∂w_i = -α ∇L_i(θ)·∇F(θ')`. Adam moves `w`
  against it, and the network takes its step on the first half with the new weights.

  Args:
    form: "raw", the weights themselves are learned and may turn negative, as in the paper; or
      "softmax", their logits are.
    init: first value of each weight, or logit; within [-30, 30].
    learning_rate: of the Adam that moves them; above 0.
    inner_learning_rate: α, above 0.
    primary: [T] p, none negative: which tasks the weights shall serve; all alike when left out.

  Returns:
    A balancer that needs a look-ahead: it cuts the batch in two, and adds to the step one more
    backward and one forward-mode pass on the first half and a forward and backward pass on the
    second. Its state holds the weights, or their logits, [T]; a task that is not active keeps its
    own.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, state = balancing.aggregate(auto_lambda(learning_rate=0.01), J)
  >>> [round(float(x), 4) for x in state.values]  # the first gradient points away from the sum
  [0.09, 0.11]

  Reference:
    Liu, James, Davison, Johns: Auto-Lambda: Disentangling Dynamic Task Relationships. TMLR 2022,
    arXiv:2202.03091.

  Differences:
    The official code takes a difference of two gradients where the derivative here is exact. Its
    trial step has the network's learning rate, momentum and weight decay; ours is plain SGD. It
    draws the second batch from the training data; here it is half of the step's batch. LibMTL
    learns logits: `auto_lambda(form="softmax", init=0.0, learning_rate=1e-3)`.
  """
  hyperparameters.check_choice("auto_lambda", "form", form, FORMS)
  trained.check("auto_lambda", init, learning_rate)
  trained.check_rate("auto_lambda", "inner_learning_rate", inner_learning_rate)
  if primary is not None:
    hyperparameters.check_numbers(
        "auto_lambda", "primary", primary, "one weight a task, none negative, not all zero",
        lambda array: array.ndim == 1 and (array >= 0).all() and array.any())

  def init_state(num_tasks: int) -> TrainedState:
    if primary is not None:
      hyperparameters.check_length("auto_lambda", "primary", primary, num_tasks)
    return trained.start_state(jnp.full(num_tasks, init, float))

  def weights_of(values: jax.Array, active: jax.Array) -> jax.Array:
    return masked.softmax(values, active) if form == "softmax" else jnp.where(active, values, 0)

  def objectives(num_tasks: int) -> jax.Array:
    shares = jnp.ones(num_tasks, float) if primary is None else jnp.asarray(primary, float)
    return shares[None]

  def update(signals: Signals, state: TrainedState) -> tuple[Decision, TrainedState]:
    values, active = state.values, signals.active
    slopes = jnp.where(active, signals.ahead.slopes[0], 0).astype(values.dtype)
    gradient = -jnp.asarray(inner_learning_rate, values.dtype) * slopes
    if form == "softmax":
      weights = weights_of(values, active)
      gradient = weights * (gradient - jnp.sum(weights * gradient))
    state = trained.step(state, gradient, learning_rate, active)
    return Decision(weights_of(state.values, active)), state

  return Balancer(
      "auto_lambda", init_state, update, frozenset({"losses", "lookahead"}), scale_heads=True,
      scale="own" if form == "raw" else "mean", parts=2,
      lookahead=Lookahead(lambda state, active: weights_of(state.values, active),
                          inner_learning_rate, objectives=objectives))
