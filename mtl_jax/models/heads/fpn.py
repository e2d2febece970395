"""A dense head on a feature pyramid."""

from collections.abc import Mapping, Sequence
import math

import flax.linen as nn
import jax

from mtl_jax.models.heads.pyramid import FeaturePyramid, check_size, resize
from mtl_jax.models.operators import Conv


def groups(channels: int) -> int:
  """Groups of a GroupNorm: the most, up to 32, of one size that is at least four channels.

  A channel alone, on a map of one pixel, would be normalised to nothing.

  >>> [groups(channels) for channels in (128, 64, 12, 4, 3)]
  [32, 16, 1, 1, 1]
  """
  return math.gcd(32, channels, max(channels // 4, 1))


class SemanticFPN(nn.Module):
  """The levels of a feature pyramid, enlarged to the finest and summed: [B, H, W, num_outputs].

  Every level goes through 3x3 convolutions with GroupNorm and ReLU, resized to the next finer
  level's grid after each, the finest through one without resizing; a 1x1 convolution of the sum
  is resized to the image by bilinear interpolation.

  Attributes:
    num_outputs: channels of the output.
    size: (H, W) of the output in pixels.
    channels: of the pyramid and of the layers behind it.
    levels: the stages that become levels, as in `FeaturePyramid`.

  >>> import jax.numpy as jnp
  >>> maps = {"conv1": jnp.ones((2, 7, 5, 4)), "conv2": jnp.ones((2, 3, 2, 8)),
  ...         "features": jnp.ones((2, 6))}
  >>> head = SemanticFPN(num_outputs=3, size=(15, 11), channels=16)
  >>> jax.eval_shape(head.init_with_output, jax.random.key(0), maps)[0].shape
  (2, 15, 11, 3)

  Reference:
    Kirillov, Girshick, He, Dollár: Panoptic Feature Pyramid Networks. CVPR 2019, arXiv:1901.02446.

  Differences:
    The paper has 256 channels in the pyramid and 128 behind it, and doubles the resolution where
    we resize to the next level's, which is the same where sizes are even.
  """

  num_outputs: int
  size: Sequence[int]
  channels: int = 128
  levels: Sequence[str] | None = None
  reads = "maps"

  @nn.compact
  def __call__(self, maps: Mapping[str, jax.Array]) -> jax.Array:
    """Outputs [B, H, W, num_outputs] of maps `{stage: [B, h, w, c], …}`.

    Raises:
      ValueError: where there is no such stage, levels are out of order, or the size is none.
    """
    check_size("fpn", self.size)
    pyramid = FeaturePyramid(self.channels, self.levels, name="pyramid")(maps)
    grids = [level.shape[1:3] for level in pyramid.values()]
    branches = []
    for depth, (stage, x) in enumerate(pyramid.items()):
      for finer in reversed(range(max(depth, 1))):
        x = Conv(self.channels, (3, 3), use_bias=False, name=f"conv_{stage}_{finer}")(x)
        x = nn.GroupNorm(groups(self.channels), name=f"norm_{stage}_{finer}")(x)
        x = resize(nn.relu(x), grids[finer])
      branches.append(x)
    return resize(Conv(self.num_outputs, (1, 1), name="output")(sum(branches)), self.size)
