"""Hard sharing: one trunk for all tasks (Caruana, Machine Learning 1997)."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from mtl_jax.models.calling import call_trunk
from mtl_jax.models.sharing.together import together


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
    features = together(lambda x: call_trunk(self.trunk, x, train, maps), images)
    return {task: features[stream] for task, stream in streams.items()}

  def owner(self, path: tuple[str, ...]) -> str | None:
    """Which task alone owns the parameter at `path`: none, all is shared."""
    del path
    return None
