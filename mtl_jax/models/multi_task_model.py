"""The model: a sharing architecture around a trunk, and one head a task."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from mtl_jax.models.calling import call_module


class MultiTaskModel(nn.Module):
  """Shared features, then one head a task.

  Attributes:
    sharing: from images to one feature a task, such as `Hard(trunk)`.
    heads: module of each task, from its features to its outputs.
    streams: the stream that each task reads; its own name where left out.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import models
  >>> model = models.MultiTaskModel(sharing=models.Hard(models.CNN(width=8)),
  ...                               heads={"digit": nn.Dense(10), "even": nn.Dense(2)},
  ...                               streams={"digit": "images", "even": "images"})
  >>> batch = {"images": {"image": jnp.zeros((4, 8, 8, 1))}}
  >>> variables = model.init(jax.random.key(0), batch)
  >>> {task: output.shape for task, output in model.apply(variables, batch).items()}
  {'digit': (4, 10), 'even': (4, 2)}
  """

  sharing: nn.Module
  heads: Mapping[str, nn.Module]
  streams: Mapping[str, str] | None = None

  def features(self, batch: Mapping[str, Mapping[str, jax.Array]],
               train: bool = False) -> dict[str, jax.Array]:
    """Features of each task, the outputs of the sharing architecture."""
    streams = {task: (self.streams or {}).get(task, task) for task in self.heads}
    images = {stream: batch[stream]["image"] for stream in dict.fromkeys(streams.values())}
    return self.sharing(images, streams, train)

  def outputs(self, features: Mapping[str, jax.Array], train: bool = False) -> dict[str, Any]:
    """Outputs of each task's head from its features."""
    return {task: call_module(head, features[task], train) for task, head in self.heads.items()}

  def __call__(self, batch: Mapping[str, Mapping[str, jax.Array]],
               train: bool = False) -> dict[str, Any]:
    """Outputs of each task for a batch `{stream: {"image": [B, H, W, C], …}}`."""
    return self.outputs(self.features(batch, train), train)

  def owner(self, path: tuple[str, ...]) -> str | None:
    """Which task alone owns the parameter at `path`; None where it is shared."""
    if path[0] == "sharing":
      return self.sharing.owner(path[1:])
    return path[0].removeprefix("heads_")
