"""The model: a sharing architecture around a trunk, and one head a task."""

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax

from mtl_jax.models.calling import call_module, reads_maps


class MultiTaskModel(nn.Module):
  """Shared features, then one head a task.

  Attributes:
    sharing: from images to one feature a task, such as `Hard(trunk)`.
    heads: module of each task, from its features to its outputs; one with `reads = "maps"` gets the
      maps of the trunk's stages instead, `{stage: [B, h, w, c], …, "features": [B, F]}`.
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

  def features(self, batch: Mapping[str, Mapping[str, jax.Array]], train: bool = False,
               only: Collection[str] | None = None) -> dict[str, Any]:
    """Features [B, F] of each task, or of `only` some; the outputs of the sharing architecture.

    Where any head reads maps, those of each task in their place, the features among them.
    """
    streams = {task: (self.streams or {}).get(task, task) for task in self.heads
               if only is None or task in only}
    images = {stream: batch[stream]["image"] for stream in dict.fromkeys(streams.values())}
    if self._has_maps():
      maps = self.sharing(images, streams, train, maps=True)
      return {task: OrderedDict(stages) for task, stages in maps.items()}  # jax sorts plain dicts
    return self.sharing(images, streams, train)

  def outputs(self, features: Mapping[str, Any], train: bool = False) -> dict[str, Any]:
    """Outputs of each task's head from what `features` gave, of those tasks that it gave."""
    has_maps = self._has_maps()
    heads = {task: head for task, head in self.heads.items() if task in features}
    read = {task: features[task]["features"] if has_maps and not reads_maps(head)
            else features[task] for task, head in heads.items()}
    return {task: call_module(head, read[task], train) for task, head in heads.items()}

  def _has_maps(self) -> bool:
    return any(reads_maps(head) for head in self.heads.values())

  def __call__(self, batch: Mapping[str, Mapping[str, jax.Array]], train: bool = False,
               only: Collection[str] | None = None) -> dict[str, Any]:
    """Outputs of each task for a batch `{stream: {"image": [B, H, W, C] or [B, D], …}}`.

    Where `only` names tasks, of those alone; the streams that the others read are not looked at.
    """
    return self.outputs(self.features(batch, train, only), train)

  def owner(self, path: tuple[str, ...]) -> str | None:
    """Which task alone owns the parameter at `path`; None where it is shared."""
    if path[0] == "sharing":
      return self.sharing.owner(path[1:])
    return path[0].removeprefix("heads_")

  def penalties(self, params: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What the sharing architecture adds to the loss, `{name: []}`; most add nothing."""
    if not hasattr(type(self.sharing), "penalties"):
      return {}
    return self.sharing.penalties(params["sharing"])
