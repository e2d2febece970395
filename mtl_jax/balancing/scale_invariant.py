"""Scale invariance: the sum of the logarithms of the losses."""

from typing import Any

import jax.numpy as jnp

from mtl_jax.balancing import masked
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, no_state


def scale_invariant() -> Balancer:
  """Minimises the sum of the logarithms of the losses, to which units do not matter.

  The rule: `w_i = 1 / L_i`, the gradient of `Σ log L_i`.

  Returns:
    A balancer that needs the losses only; one backward pass.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, _ = balancing.aggregate(scale_invariant(), J, losses=jnp.array([2., 4.]))
  >>> d.tolist()
  [-0.5, 0.75, 0.75]

  Reference:
    The baseline "SI" of Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya: Multi-Task
    Learning as a Bargaining Game. ICML 2022, arXiv:2202.01017.

  Differences:
    A loss below 1e-20, zero or negative, counts as that much. Aligned-MTL's code takes
    `log(1 + L)`, which is not invariant.
  """
  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    losses = masked.positive(signals.losses, signals.active)
    return Decision(jnp.where(signals.active, 1 / losses, 0)), state

  return Balancer("scale_invariant", no_state, update, frozenset({"losses"}), scale_heads=True,
                  scale="own")
