"""IMTL: losses learn their scale, and gradients meet in an impartial direction."""

import jax
import jax.numpy as jnp

from mtl_jax.balancing import masked, solvers, trained
from mtl_jax.balancing.balancer import Balancer, Decision, Signals
from mtl_jax.balancing.imtl_g import impartial_weights
from mtl_jax.balancing.trained import TrainedState


def imtl(learning_rate: float | jax.Array = 0.025) -> Balancer:
  """Scales each loss towards one, then weighs the scaled gradients impartially.

  The rule: with `h_i = exp(s_i) g_i` the gradient of the scaled loss, `d = Σ α_i h_i` has
  `Σ α_i = 1` and the same projection on every `h_i`; so `w_i = α_i exp(s_i)`. Beside the network
  `s_i` minimises `exp(s_i) L_i - s_i`: Adam moves it against `exp(s_i) L_i - 1`, and at rest
  `exp(s_i) = 1 / L_i`. The direction is that of IMTL-G; the scales decide its length.

  Args:
    learning_rate: of the Adam that moves `s`, which starts at 0; above 0.

  Returns:
    A balancer that needs the Gramian and looks at the losses. The `values` of its state are `s`;
    a task that is not active keeps its own. If all gradients are zero, `w_i = exp(s_i)` over the
    number of active tasks.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, state = balancing.aggregate(imtl(), J, losses=jnp.array([2., 0.5]))
  >>> [round(float(x), 4) for x in d]
  [0.0767, 1.0, 1.0]
  >>> [round(float(s), 3) for s in state.values]
  [-0.025, 0.025]

  Reference:
    Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang: Towards Impartial Multi-task Learning. ICLR
    2021.

  Differences:
    The paper gives the heads the gradients of the scaled losses; here they get those of the
    losses, like under every method that looks at gradients. LibMTL trains `s` with the network's
    optimizer and weight decay; here it has a learning rate of its own, nothing decays it, and it
    stays within ±30. TorchJD has the two parts only. What `imtl_g` says of singular cases holds
    here too.
  """
  trained.check_rate("imtl", "learning_rate", learning_rate)

  def init(num_tasks: int) -> TrainedState:
    return trained.start_state(jnp.zeros(num_tasks, float))

  def update(signals: Signals, state: TrainedState) -> tuple[Decision, TrainedState]:
    active, scales = signals.active, jnp.exp(state.values)
    losses = masked.losses_of(signals.losses, active, scales.dtype)
    cosines, norms = solvers.unit_rows(signals.gramian, active)
    weights = impartial_weights(cosines, norms * scales.astype(norms.dtype), active)
    weights *= scales.astype(norms.dtype)
    return Decision(weights), trained.step(state, losses * scales - 1, learning_rate, active)

  return Balancer("imtl", init, update, frozenset({"gramian"}), scale="own")
