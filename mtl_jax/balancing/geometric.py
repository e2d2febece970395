"""GLS: the geometric mean of the losses."""

from typing import Any

import jax.numpy as jnp

from mtl_jax.balancing import masked
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, no_state


def geometric() -> Balancer:
  """Minimises the geometric mean of the losses, to which units do not matter.

  The rule: with `M = (Π L_i)^(1/T)` over the T active tasks, `w_i = M / (T L_i)`, its gradient.

  Returns:
    A balancer that needs the losses only; one backward pass. Equal losses weigh `1 / T` each.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, _ = balancing.aggregate(geometric(), J, losses=jnp.array([1., 4.]))
  >>> [round(float(x), 4) for x in d]
  [-2.5, 1.25, 1.25]

  Reference:
    Chennupati, Sistu, Yogamani, Rawashdeh: MultiNet++: Multi-Stream Feature Aggregation and
    Geometric Loss Strategy for Multi-Task Learning. CVPR Workshops 2019, arXiv:1904.08492.

  Differences:
    The product is a sum of logarithms, as in TorchJD, and cannot overflow; LibMTL multiplies, and
    reports as weights what is not the gradient. A loss below 1e-20, zero or negative, counts as
    that much (TorchJD rejects the negative); a weight is at most exp(80).
  """
  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    active = signals.active
    logs = jnp.log(masked.positive(signals.losses, active))
    powers = jnp.exp(jnp.minimum(masked.mean(logs, active) - logs, masked.LARGEST_LOG))
    return Decision(jnp.where(active, powers / masked.count(active, logs.dtype), 0)), state

  return Balancer("geometric", no_state, update, frozenset({"losses"}), scale_heads=True,
                  scale="own")
