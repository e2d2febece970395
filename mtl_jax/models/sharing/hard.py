"""Hard sharing: one trunk for all tasks (Caruana, Machine Learning 1997)."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models.calling import call_module


class Hard(nn.Module):
  """One trunk through which all streams go, in one concatenated batch.

  Attributes:
    trunk: module from images to features.
  """

  trunk: nn.Module
  one_representation = True  # tasks of one stream read the same features

  def __call__(self, images: Mapping[str, jax.Array], streams: Mapping[str, str],
               train: bool) -> dict[str, jax.Array]:
    """Features of each task.

    Args:
      images: by stream, [B_s, H, W, C]; streams of one image shape share a pass of the trunk.
      streams: the stream of each task.
      train: whether the pass is one of training.
    """
    features = {}
    for shape in dict.fromkeys(x.shape[1:] for x in images.values()):
      group = [stream for stream, x in images.items() if x.shape[1:] == shape]
      together = call_module(self.trunk, jnp.concatenate([images[s] for s in group]), train)
      ends, start = [], 0
      for stream in group:
        start += images[stream].shape[0]
        ends.append(start)
      features |= dict(zip(group, jnp.split(together, ends[:-1])))
    return {task: features[stream] for task, stream in streams.items()}

  def owner(self, path: tuple[str, ...]) -> str | None:
    """Which task alone owns the parameter at `path`: none, all is shared."""
    del path
    return None
