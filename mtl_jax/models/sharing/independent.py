"""No sharing: one trunk a task, the other end of the scale."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from mtl_jax.models.calling import call_trunk


class Independent(nn.Module):
  """One trunk a task, all of the same shape.

  Attributes:
    trunk: module from images to features, copied for every task.
    tasks: names of the tasks.
  """

  trunk: nn.Module
  tasks: Sequence[str]
  one_representation = False

  def setup(self):
    self.trunks = {task: self.trunk.clone(parent=None, name=None) for task in self.tasks}

  def __call__(self, images: Mapping[str, jax.Array], streams: Mapping[str, str],
               train: bool, maps: bool = False) -> dict[str, Any]:
    """Features of each task, or its maps, from its own trunk; arguments as in `Hard`."""
    return {task: call_trunk(self.trunks[task], images[stream], train, maps)
            for task, stream in streams.items()}

  def owner(self, path: tuple[str, ...]) -> str | None:
    """Which task alone owns the parameter at `path`: that of its trunk."""
    return path[0].removeprefix("trunks_")
