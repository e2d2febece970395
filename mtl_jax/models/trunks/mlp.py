"""Dense layers, for vectors."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from mtl_jax.models.operators import Dense
from mtl_jax.models.trunks.trunk import Trunk


class MLPTrunk(Trunk):
  """Inputs of any shape, flattened, through dense layers with ReLU and dropout.

  Its stages are "hidden1", "hidden2", … and "features", one a layer; all give vectors, so heads
  that read maps cannot use it.

  Attributes:
    widths: of the layers; the last is the size of the features.
    dropout: rate of dropped units of every layer in training.

  >>> import jax.numpy as jnp
  >>> trunk, vectors = MLPTrunk(widths=(8, 4)), jnp.zeros((3, 5))
  >>> variables = trunk.init(jax.random.key(0), vectors)
  >>> trunk.stages, trunk.apply(variables, vectors).shape
  (('hidden1', 'features'), (3, 4))
  """

  widths: Sequence[int] = (512, 512)
  dropout: float = 0.0

  @property
  def stages(self) -> tuple[str, ...]:
    """A stage each layer; the last is "features"."""
    return (*(f"hidden{i + 1}" for i in range(len(self.widths) - 1)), "features")

  @nn.compact
  def stage(self, name: str, x: jax.Array, train: bool = False) -> jax.Array:
    """One layer: [B, …] -> [B, width]; ValueError for fields out of range or an unknown stage."""
    if not self.widths:
      raise ValueError("mlp: widths: expected at least one layer, found none")
    if not 0 <= self.dropout < 1:
      raise ValueError(f"mlp: dropout: expected a rate in [0, 1), found {self.dropout}")
    place = self.place(name)
    x = x.reshape(x.shape[0], -1)
    x = nn.relu(Dense(self.widths[place], name=f"dense{place + 1}")(x))
    return nn.Dropout(self.dropout, deterministic=not train)(x)
