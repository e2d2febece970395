"""Equal weights: the plain sum of the losses."""

from typing import Any

from mtl_jax.balancing.balancer import Balancer, Decision, Signals, no_state


def equal() -> Balancer:
  """Every active task weighs one: the sum of the losses, also called unitary scalarisation.

  The rule: `w_i = 1`, `d = Σ g_i`.

  Returns:
    A balancer that needs the losses only; one backward pass.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, _ = balancing.aggregate(equal(), J)
  >>> d.tolist()
  [2.0, 2.0, 2.0]

  Reference:
    Kurin, De Palma, Kostrikov, Whiteson, Kumar: In Defense of the Unitary Scalarization for
    Deep Multi-Task Learning. NeurIPS 2022, arXiv:2201.04122.

  Differences:
    This is the sum, as in the paper. LibMTL documents the mean and computes the sum. For a mean,
    use `fixed` with weights `1 / T`.
  """
  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    return Decision(signals.active.astype(signals.losses.dtype)), state

  return Balancer("equal", no_state, update, frozenset({"losses"}), scale_heads=True)
