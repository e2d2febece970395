"""A dense head that doubles the resolution of one map until it is that of the image."""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax

from mtl_jax.models.heads.pyramid import check_size, map_of, resize, spatial_maps
from mtl_jax.models.operators import Conv


class Upsampling(nn.Module):
  """One map of the trunk, projected, then enlarged step by step: maps -> [B, H, W, num_outputs].

  A step resizes by bilinear interpolation, to twice the sides or what is left to do, then applies
  a 3x3 convolution with ReLU. A skipped-to map is added on its own grid, followed by the same.

  Attributes:
    num_outputs: channels of the output.
    size: (H, W) of the output in pixels.
    channels: of all layers in between.
    stage: where to start; the trunk's last map when left out.
    skips: earlier stages whose maps are added on the way.

  >>> import jax.numpy as jnp
  >>> maps = {"conv1": jnp.ones((2, 7, 5, 4)), "conv2": jnp.ones((2, 3, 2, 8)),
  ...         "features": jnp.ones((2, 6))}
  >>> head = Upsampling(num_outputs=3, size=(15, 11), channels=16, skips=("conv1",))
  >>> jax.eval_shape(head.init_with_output, jax.random.key(0), maps)[0].shape
  (2, 15, 11, 3)

  Reference:
    Long, Shelhamer, Darrell: Fully Convolutional Networks for Semantic Segmentation. CVPR 2015,
    arXiv:1411.4038.

  Differences:
    The paper upsamples scores by transposed convolutions that start as bilinear interpolation; we
    upsample features by the interpolation itself and learn a convolution after it, which leaves no
    checkerboard and works for every size.
  """

  num_outputs: int
  size: Sequence[int]
  channels: int = 64
  stage: str | None = None
  skips: Sequence[str] = ()
  reads = "maps"

  @nn.compact
  def __call__(self, maps: Mapping[str, jax.Array]) -> jax.Array:
    """Outputs [B, H, W, num_outputs] of maps `{stage: [B, h, w, c], …}`.

    Raises:
      ValueError: where there is no such stage, a skip is coarser than the start, or the size is
        none.
    """
    check_size("upsampling", self.size)
    stage = self.stage or list(spatial_maps("upsampling", maps))[-1]
    start = map_of("upsampling: stage", maps, stage)
    x, count = nn.relu(Conv(self.channels, (1, 1), name="project")(start)), 0
    for target, skip in [*self._skips(maps, start), (tuple(self.size), None)]:
      while x.shape[1:3] != target:
        count += 1
        x = resize(x, [min(2 * now, end) for now, end in zip(x.shape[1:3], target)])
        x = nn.relu(Conv(self.channels, (3, 3), name=f"up{count}")(x))
      if skip is not None:
        x = x + Conv(self.channels, (1, 1), name=f"skip_{skip}")(maps[skip])
        x = nn.relu(Conv(self.channels, (3, 3), name=f"merge_{skip}")(x))
    return Conv(self.num_outputs, (1, 1), name="output")(x)

  def _skips(self, maps: Mapping[str, jax.Array],
             start: jax.Array) -> list[tuple[tuple[int, ...], str]]:
    """Sizes and names of the skips, from coarse to fine."""
    sizes = {skip: map_of("upsampling: skips", maps, skip).shape[1:3] for skip in self.skips}
    deepest_first = [skip for skip in reversed(maps) if skip in sizes]
    for skip, size in sizes.items():
      if any(side < begin for side, begin in zip(size, start.shape[1:3])):
        raise ValueError(f"upsampling: skips: expected stages no coarser than the start, "
                         f"{start.shape[1:3]}, found {skip!r} of {size}")
    return [(sizes[skip], skip) for skip in sorted(deepest_first, key=sizes.get)]
