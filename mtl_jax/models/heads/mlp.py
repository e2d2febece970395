"""A head with hidden layers."""

from collections.abc import Sequence

import flax.linen as nn
import jax


class MLP(nn.Module):
  """Dense layers with ReLU and dropout, then a dense layer: [B, F] -> [B, num_outputs].

  Attributes:
    num_outputs: size of the output.
    hidden: widths of the hidden layers.
    dropout: rate of dropped hidden units in training.
  """

  num_outputs: int
  hidden: Sequence[int] = (128,)
  dropout: float = 0.0

  @nn.compact
  def __call__(self, features: jax.Array, train: bool = False) -> jax.Array:
    if not 0 <= self.dropout < 1:
      raise ValueError(f"mlp: dropout: expected a rate in [0, 1), found {self.dropout}")
    x = features
    for i, width in enumerate(self.hidden):
      x = nn.relu(nn.Dense(width, name=f"hidden{i + 1}")(x))
      x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(self.num_outputs, name="dense")(x)
