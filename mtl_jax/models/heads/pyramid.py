"""A feature pyramid: maps of every resolution that all know what the deepest one knows."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax

from mtl_jax.models.operators import Conv


def spatial_maps(where: str, maps: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Those of a trunk's maps that lie in space, [B, h, w, c], in their order.

  Args:
    where: who asks, for the message.
    maps: of a trunk by stage.

  Raises:
    ValueError: where there are none, as in a trunk of dense layers.
  """
  found = {stage: x for stage, x in maps.items() if x.ndim == 4}
  if not found:
    raise ValueError(f"{where}: expected a trunk with maps [B, h, w, c], found "
                     f"{ {stage: x.shape for stage, x in maps.items()} }")
  return found


def map_of(where: str, maps: Mapping[str, jax.Array], stage: str) -> jax.Array:
  """The map [B, h, w, c] of one stage; ValueError where the trunk has none of that name."""
  found = spatial_maps(where, maps)
  if stage not in found:
    raise ValueError(f"{where}: expected one of the trunk's stages {list(found)}, found {stage!r}")
  return found[stage]


def check_size(where: str, size: Sequence[int]) -> None:
  """Raises ValueError where `size` is not (H, W) in pixels."""
  if len(size) != 2 or min(size) < 1:
    raise ValueError(f"{where}: size: expected (height, width) in pixels, found {size!r}")


def resize(x: jax.Array, size: Sequence[int], method: str = "bilinear") -> jax.Array:
  """Maps [B, h, w, C] on another grid: [B, size[0], size[1], C].

  >>> import jax.numpy as jnp
  >>> resize(jnp.array([0.0, 4.0]).reshape(1, 1, 2, 1), (1, 4)).ravel().tolist()
  [0.0, 1.0, 3.0, 4.0]
  """
  return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), method)


class FeaturePyramid(nn.Module):
  """Lateral 1x1 convolutions, a sum from coarse to fine, and a 3x3 convolution on every level.

  Attributes:
    channels: of every level.
    levels: the stages that become levels, from fine to coarse; when left out the last stage of
      each resolution. A vision transformer, whose maps have one resolution, then has one level.

  >>> import jax.numpy as jnp
  >>> maps = OrderedDict(stem=jnp.ones((1, 8, 8, 4)), layer1=jnp.ones((1, 8, 8, 4)),
  ...                    layer2=jnp.ones((1, 4, 4, 8)), features=jnp.ones((1, 8)))
  >>> pyramid = FeaturePyramid(channels=16)
  >>> levels, _ = jax.eval_shape(pyramid.init_with_output, jax.random.key(0), maps)
  >>> {stage: level.shape for stage, level in levels.items()}
  {'layer1': (1, 8, 8, 16), 'layer2': (1, 4, 4, 16)}

  Reference:
    Lin, Dollár, Girshick, He, Hariharan, Belongie: Feature Pyramid Networks for Object Detection.
    CVPR 2017, arXiv:1612.03144.

  Differences:
    The paper doubles the coarser level by its nearest neighbours; we take the nearest neighbours
    on the finer level's own grid, which is the same where sizes are even and also works where they
    are odd. The paper has 256 channels.
  """

  channels: int = 128
  levels: Sequence[str] | None = None

  @nn.compact
  def __call__(self, maps: Mapping[str, jax.Array]) -> OrderedDict[str, jax.Array]:
    """Levels `{stage: [B, h, w, channels]}` from fine to coarse, of maps `{stage: [B, h, w, c]}`.

    Both are in the order of the stages, which jax keeps of an OrderedDict only.

    Raises:
      ValueError: where there is no such stage, or a level is finer than the one before.
    """
    levels, above = {}, None
    for stage, x in reversed(self._chosen(maps).items()):
      x = Conv(self.channels, (1, 1), name=f"lateral_{stage}")(x)
      above = x if above is None else x + resize(above, x.shape[1:3], "nearest")
      levels[stage] = Conv(self.channels, (3, 3), name=f"output_{stage}")(above)
    return OrderedDict(reversed(levels.items()))

  def _chosen(self, maps: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    if self.levels is None:
      last = {x.shape[1:3]: stage for stage, x in spatial_maps("pyramid", maps).items()}
      return {last[size]: maps[last[size]] for size in sorted(last, reverse=True)}
    if not self.levels:
      raise ValueError("pyramid: levels: expected at least one stage, found none")
    chosen = {stage: map_of("pyramid: levels", maps, stage) for stage in self.levels}
    sizes = [x.shape[1:3] for x in chosen.values()]
    if any(a > b for fine, coarse in zip(sizes, sizes[1:]) for a, b in zip(coarse, fine)):
      raise ValueError("pyramid: levels: expected stages from fine to coarse, found "
                       f"{dict(zip(chosen, sizes))}")
    return chosen
