"""A linear head."""

import flax.linen as nn
import jax


class Linear(nn.Module):
  """One dense layer: features [B, F] -> outputs [B, num_outputs]."""

  num_outputs: int

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    return nn.Dense(self.num_outputs, name="dense")(features)
