"""The reference network: two convolutions, two poolings, one dense layer."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from mtl_jax.models.operators import Dense, conv_relu_max_pool
from mtl_jax.models.trunks.trunk import Trunk, check_images


class _Convolution(nn.Module):
  """3x3 convolution with bias, ReLU and 2x2 max-pooling; parameters are those of `nn.Conv`.

  Attributes:
    channels: of the output.
  """

  channels: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, x.shape[3], self.channels))
    bias = self.param("bias", nn.initializers.zeros, (self.channels,))
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=None)
    return conv_relu_max_pool(x, kernel, bias, "SAME", (2, 2))


class CNN(Trunk):
  """3x3 convolutions with ReLU and 2x2 max-pooling, then one dense layer.

  Attributes:
    channels: of the convolutions, each followed by a pooling; stages "conv1", "conv2", ….
    width: of the dense layer, the size of the features.
    pool: what the dense layer reads of the last map: "flatten" all of it, or "mean" over space,
      which images of any size go through.

  >>> import functools
  >>> import jax.numpy as jnp
  >>> trunk, images = CNN(width=8), jnp.zeros((1, 12, 12, 3))
  >>> variables = jax.eval_shape(trunk.init, jax.random.key(0), images)
  >>> maps = jax.eval_shape(functools.partial(trunk.apply, method="maps"), variables, images)
  >>> {stage: x.shape for stage, x in maps.items()}
  {'conv1': (1, 6, 6, 32), 'conv2': (1, 3, 3, 64), 'features': (1, 8)}
  """

  channels: Sequence[int] = (32, 64)
  width: int = 128
  pool: str = "flatten"

  @property
  def stages(self) -> tuple[str, ...]:
    """A stage each convolution, then the features."""
    return (*(f"conv{i + 1}" for i in range(len(self.channels))), "features")

  @nn.compact
  def stage(self, name: str, x: jax.Array, train: bool = False) -> jax.Array:
    """One stage: half the resolution, or of the last one the features [B, width].

    Raises:
      ValueError: for images with fewer pixels than the poolings need, or an unknown stage.
    """
    del train
    place = self.place(name)
    if place == 0:
      self._check_images(x)
    if name == "features":
      pooled = x.mean(axis=(1, 2)) if self.pool == "mean" else x.reshape(x.shape[0], -1)
      return nn.relu(Dense(self.width, name="dense")(pooled))
    return _Convolution(self.channels[place], name=name)(x)

  def _check_images(self, images: jax.Array) -> None:
    check_images("cnn", images)
    if self.pool not in ("flatten", "mean"):
      raise ValueError(f"cnn: pool: expected 'flatten' or 'mean', found {self.pool!r}")
    if min(images.shape[1:3]) < 2 ** len(self.channels):
      raise ValueError(f"cnn: images: expected at least {2 ** len(self.channels)} pixels a side, "
                       f"found {images.shape[1]}x{images.shape[2]}")
