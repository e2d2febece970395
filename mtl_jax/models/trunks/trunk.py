"""What all our trunks have in common: they go stage by stage."""

from collections import OrderedDict

import flax.linen as nn
import jax


class Trunk(nn.Module):
  """A trunk that names its stages, so that it can be left, mixed or branched between any two.

  A subclass gives `stages`, the names in order, of which the last is "features"; and
  `stage(name, x, train)`, from what the stage before gave (the first: from images) to what this
  one gives, the last one features [B, F]. Where `stage` is linen's `compact`, a stage that is
  never called has no parameters.

  >>> import jax.numpy as jnp
  >>> class Means(Trunk):
  ...   stages = ("double", "features")
  ...   def stage(self, name, x, train=False):
  ...     return 2 * x if name == "double" else x.mean(axis=(1, 2))
  >>> images = jnp.ones((1, 2, 2, 3))
  >>> Means().apply({}, images).tolist()
  [[2.0, 2.0, 2.0]]
  >>> {stage: x.shape for stage, x in Means().apply({}, images, method="maps").items()}
  {'double': (1, 2, 2, 3), 'features': (1, 3)}
  """

  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Features [B, F] of images [B, H, W, C]."""
    x = images
    for name in self.stages:
      x = self.stage(name, x, train)
    return x

  def maps(self, images: jax.Array, train: bool = False) -> OrderedDict[str, jax.Array]:
    """What every stage gives, `{stage: [B, h, w, c], …, "features": [B, F]}`, in their order."""
    maps, x = OrderedDict(), images  # jax sorts the keys of a plain dict
    for name in self.stages:
      maps[name] = x = self.stage(name, x, train)
    return maps

  def blocks_of(self, stage: str) -> tuple[str, ...]:
    """The names of a stage's blocks in order, each of which `stage` also runs on its own.

    A stage of one piece is its only block; a subclass whose stages have several names them here.
    """
    return (self.stages[self.place(stage)],)

  def place(self, name: str) -> int:
    """The place of a stage among the stages; ValueError where there is none of that name."""
    if name not in self.stages:
      raise ValueError(f"{type(self).__name__}: stage: expected one of {list(self.stages)}, "
                       f"found {name!r}")
    return self.stages.index(name)


def check_images(where: str, images: jax.Array) -> None:
  """Raises ValueError where these are no images [B, H, W, C].

  Args:
    where: the trunk, for the message.
    images: what it was given.
  """
  if images.ndim != 4:
    raise ValueError(f"{where}: images: expected [B, H, W, C], found {list(images.shape)}; the "
                     "trunk mlp takes any shape")
