"""Hard sharing: one trunk for all tasks (Caruana, Machine Learning 1997)."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models.calling import call_trunk


class Hard(nn.Module):
  """One trunk through which all streams go, in one concatenated batch.

  Attributes:
    trunk: module from images to features.
  """

  trunk: nn.Module
  one_representation = True  # tasks of one stream read the same features

  def __call__(self, images: Mapping[str, jax.Array], streams: Mapping[str, str],
               train: bool, maps: bool = False) -> dict[str, Any]:
    """Features [B_s, F] of each task, or its maps.

    Args:
      images: by stream, [B_s, H, W, C] or [B_s, D]; streams of one shape share a pass of the
        trunk.
      streams: the stream of each task.
      train: whether the pass is one of training.
      maps: whether to give `{stage: [B_s, …], …, "features": [B_s, F]}` instead of the features.
    """
    features = {}
    for shape in dict.fromkeys(x.shape[1:] for x in images.values()):
      group = [stream for stream, x in images.items() if x.shape[1:] == shape]
      together = call_trunk(self.trunk, jnp.concatenate([images[s] for s in group]), train, maps)
      ends, start = [], 0
      for stream in group:
        start += images[stream].shape[0]
        ends.append(start)
      leaves, structure = jax.tree.flatten(together)
      parts = zip(*(jnp.split(leaf, ends[:-1]) for leaf in leaves))
      features |= {stream: jax.tree.unflatten(structure, part)
                   for stream, part in zip(group, parts)}
    return {task: features[stream] for task, stream in streams.items()}

  def owner(self, path: tuple[str, ...]) -> str | None:
    """Which task alone owns the parameter at `path`: none, all is shared."""
    del path
    return None
