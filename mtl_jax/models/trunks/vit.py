"""The vision transformer."""

import flax.linen as nn
import jax

from mtl_jax.models.operators import Conv
from mtl_jax.models.trunks.trunk import Trunk, check_images


class TransformerBlock(nn.Module):
  """Attention and a perceptron, each behind a LayerNorm and around an identity: [B, N, D] -> same.

  Attributes:
    num_heads: of the attention, a divisor of D.
    hidden: width of the perceptron.
    dropout: rate after the attention and after both layers of the perceptron.
  """

  num_heads: int
  hidden: int
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    drop = nn.Dropout(self.dropout, deterministic=not train)
    xavier = nn.initializers.xavier_uniform()
    y = nn.LayerNorm(epsilon=1e-6, name="norm1")(x)
    x = x + drop(nn.MultiHeadDotProductAttention(self.num_heads, kernel_init=xavier,
                                                 name="attention")(y))
    y = nn.LayerNorm(epsilon=1e-6, name="norm2")(x)
    y = drop(nn.gelu(nn.Dense(self.hidden, kernel_init=xavier, name="dense1")(y)))
    return x + drop(nn.Dense(x.shape[-1], kernel_init=xavier, name="dense2")(y))


class ViT(Trunk):
  """Patches with learned positions through pre-norm transformer blocks, averaged over space.

  Its stages are "patches", "block1", … and "features"; the maps of all but the last are grids
  [B, H/patch, W/patch, width]. The defaults are ViT-Tiny's, with patches for small images.

  Attributes:
    patch: side of a patch in pixels, a divisor of the images' sides.
    width: D, of every patch and of the features.
    depth: number of blocks.
    num_heads: of the attention, a divisor of `width`.
    mlp_ratio: width of the blocks' perceptrons over `width`.
    dropout: rate after the positions and in the blocks, in training.

  >>> import functools
  >>> import jax.numpy as jnp
  >>> trunk, images = ViT(width=8, depth=1, num_heads=2), jnp.zeros((1, 8, 12, 3))
  >>> variables = jax.eval_shape(trunk.init, jax.random.key(0), images)
  >>> maps = jax.eval_shape(functools.partial(trunk.apply, method="maps"), variables, images)
  >>> {stage: x.shape for stage, x in maps.items()}
  {'patches': (1, 2, 3, 8), 'block1': (1, 2, 3, 8), 'features': (1, 8)}

  Reference:
    Dosovitskiy, Beyer, Kolesnikov, Weissenborn, Zhai, Unterthiner, Dehghani, Minderer, Heigold,
    Gelly, Uszkoreit, Houlsby: An Image is Worth 16x16 Words: Transformers for Image Recognition at
    Scale. ICLR 2021, arXiv:2010.11929.

  Differences:
    The paper reads a class token; we average the patches, as its appendix also tries, so that all
    that passes between stages is a grid. The last LayerNorm belongs to the stage "features". Like
    the official code we use the tanh form of GELU; unlike it, biases start at zero.
  """

  patch: int = 4
  width: int = 192
  depth: int = 12
  num_heads: int = 3
  mlp_ratio: int = 4
  dropout: float = 0.0

  @property
  def stages(self) -> tuple[str, ...]:
    """The patches, every block, and the features."""
    return ("patches", *(f"block{i + 1}" for i in range(self.depth)), "features")

  @nn.compact
  def stage(self, name: str, x: jax.Array, train: bool = False) -> jax.Array:
    """One stage: a grid [B, h, w, width], or of the last one features [B, width].

    Raises:
      ValueError: for images that patches do not tile, or of another size than that for which the
        positions were made; for fields out of range; for an unknown stage.
    """
    self.place(name)
    if name == "patches":
      return self._patches(x, train)
    if name == "features":
      return nn.LayerNorm(epsilon=1e-6, name="norm")(x).mean(axis=(1, 2))
    tokens = x.reshape(x.shape[0], -1, self.width)
    block = TransformerBlock(self.num_heads, self.mlp_ratio * self.width, self.dropout, name=name)
    return block(tokens, train).reshape(x.shape)

  def _patches(self, images: jax.Array, train: bool) -> jax.Array:
    check_images("vit", images)
    if images.shape[1] % self.patch or images.shape[2] % self.patch:
      raise ValueError(f"vit: images: expected sides that patches of {self.patch} pixels divide, "
                       f"found {images.shape[1]}x{images.shape[2]}")
    if self.width % self.num_heads:
      raise ValueError(f"vit: num_heads: expected a divisor of the width {self.width}, "
                       f"found {self.num_heads}")
    if not 0 <= self.dropout < 1:
      raise ValueError(f"vit: dropout: expected a rate in [0, 1), found {self.dropout}")
    x = Conv(self.width, (self.patch, self.patch), (self.patch, self.patch), padding="VALID",
                name="embedding")(images)
    grid = x.shape[1:3]
    if self.has_variable("params", "positions"):
      known = self.get_variable("params", "positions").shape[1:3]
      if known != grid:
        raise ValueError(f"vit: images: expected {known[0]}x{known[1]} patches, as the positions "
                         f"are for, found {grid[0]}x{grid[1]}")
    positions = self.param("positions", nn.initializers.normal(0.02), (1, *grid, self.width))
    return nn.Dropout(self.dropout, deterministic=not train)(x + positions)
