"""ResNet-18 (He, Zhang, Ren, Sun, CVPR 2016, arXiv:1512.03385) in torchvision's layout.

Padding, strides, epsilon and momentum are torchvision's, and `layer2_0/conv1/kernel` here is
`layer2.0.conv1.weight` there, transposed, so that its weights fit.
"""

from collections.abc import Callable, Sequence
import functools

import flax.linen as nn
import jax

from mtl_jax.models.operators import Conv, max_pool
from mtl_jax.models.trunks.trunk import Trunk, check_images

_kaiming = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _conv(channels: int, size: int, stride: int, name: str) -> nn.Conv:
  # linen's "SAME" pads (0, 1) under stride 2; torchvision pads both sides.
  return Conv(channels, (size, size), (stride, stride), padding=[(size // 2, size // 2)] * 2,
                 use_bias=False, kernel_init=_kaiming, name=name)


class BasicBlock(nn.Module):
  """Two 3x3 convolutions with BatchNorm around an identity or 1x1 shortcut."""

  channels: int
  stride: int

  @nn.compact
  def __call__(self, x: jax.Array, norm: Callable[..., nn.Module]) -> jax.Array:
    y = nn.relu(norm(name="bn1")(_conv(self.channels, 3, self.stride, "conv1")(x)))
    y = norm(name="bn2")(_conv(self.channels, 3, 1, "conv2")(y))
    if x.shape != y.shape:
      x = norm(name="downsample_1")(_conv(self.channels, 1, self.stride, "downsample_0")(x))
    return nn.relu(x + y)


class ResNet(Trunk):
  """A residual network of basic blocks, averaged over space.

  Attributes:
    blocks: number of blocks in each of "layer1", "layer2", ….
    channels: of the first of these stages; each later one has twice as many.
    stem: "cifar" (3x3, stride 1) or "imagenet" (7x7, stride 2, and 3x3 max-pooling).

  >>> import jax.numpy as jnp
  >>> trunk, images = ResNet(blocks=(1, 1), channels=4), jnp.zeros((1, 8, 8, 3))
  >>> variables = jax.eval_shape(trunk.init, jax.random.key(0), images)
  >>> maps = jax.eval_shape(functools.partial(trunk.apply, method="maps"), variables, images)
  >>> {stage: x.shape[1:] for stage, x in maps.items()}
  {'stem': (8, 8, 4), 'layer1': (8, 8, 4), 'layer2': (4, 4, 8), 'features': (8,)}
  """

  blocks: Sequence[int] = (2, 2, 2, 2)
  channels: int = 64
  stem: str = "cifar"

  @property
  def stages(self) -> tuple[str, ...]:
    """The stem, a stage each resolution, and the features."""
    return ("stem", *(f"layer{i + 1}" for i in range(len(self.blocks))), "features")

  def blocks_of(self, stage: str) -> tuple[str, ...]:
    """The residual blocks of a stage, such as "layer2_0"; the stem and the features have none."""
    place = self.place(stage)
    if stage in ("stem", "features"):
      return (stage,)
    return tuple(f"{stage}_{i}" for i in range(self.blocks[place - 1]))

  @nn.compact
  def stage(self, name: str, x: jax.Array, train: bool = False) -> jax.Array:
    """One stage: maps [B, h, w, c], or of the last one features [B, c].

    The name of one of its blocks runs that block alone; ValueError for an unknown name.
    """
    norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9,
                             epsilon=1e-5)
    if name == "stem":
      return self._stem(x, norm)
    if name == "features":
      return x.mean(axis=(1, 2))
    layer = name.partition("_")[0]
    place = self.place(layer if name in self.blocks_of(layer) else name)
    for block in self.blocks_of(layer) if name == layer else (name,):
      first = place > 1 and block == f"{layer}_0"
      x = BasicBlock(self.channels * 2 ** (place - 1), stride=2 if first else 1,
                     name=block)(x, norm)
    return x

  def _stem(self, images: jax.Array, norm: Callable[..., nn.Module]) -> jax.Array:
    check_images("resnet18", images)
    if self.stem not in ("cifar", "imagenet"):
      raise ValueError(f"resnet18: stem: expected 'cifar' or 'imagenet', found {self.stem!r}")
    size, stride = (3, 1) if self.stem == "cifar" else (7, 2)
    x = nn.relu(norm(name="bn1")(_conv(self.channels, size, stride, "conv1")(images)))
    if self.stem == "imagenet":
      x = max_pool(x, (3, 3), (2, 2), padding=[(1, 1), (1, 1)])
    return x


def resnet18(channels: int = 64, stem: str = "cifar") -> ResNet:
  """ResNet-18: four stages of two basic blocks.

  Args:
    channels: of the first stage.
    stem: "cifar" or "imagenet".
  """
  return ResNet(blocks=(2, 2, 2, 2), channels=channels, stem=stem)
