"""The reference network: two convolutions, two poolings, one dense layer."""

from collections.abc import Sequence

import flax.linen as nn
import jax


def max_pool(x: jax.Array) -> jax.Array:
  """2x2 maximum with stride 2: [B, H, W, C] -> [B, H//2, W//2, C].

  As a reshape, whose gradient XLA runs several times faster on CPUs than that of `nn.max_pool`.
  Among equal maxima the gradient is shared evenly, where `nn.max_pool` picks the first.
  """
  b, h, w, c = x.shape
  x = x[:, : h // 2 * 2, : w // 2 * 2]
  return x.reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


class CNN(nn.Module):
  """3x3 convolutions with ReLU and 2x2 max-pooling, then one dense layer.

  Attributes:
    channels: of the convolutions, each followed by a pooling.
    width: of the dense layer, the size of the features.
  """

  channels: Sequence[int] = (32, 64)
  width: int = 128

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Features [B, width] of images [B, H, W, C]."""
    x = images
    for i, channels in enumerate(self.channels):
      x = max_pool(nn.relu(nn.Conv(channels, (3, 3), name=f"conv{i + 1}")(x)))
    x = x.reshape(x.shape[0], -1)
    if x.shape[1] == 0:
      raise ValueError(f"cnn: images: expected at least {2 ** len(self.channels)} pixels a side, "
                       f"found {images.shape[1]}x{images.shape[2]}")
    return nn.relu(nn.Dense(self.width, name="dense")(x))
