"""Sharing: modules from the streams' images to one feature a task, around a trunk.

A sharing module names, by `owner(path)`, the task that alone owns a parameter; what nobody owns is
shared, and balancing acts on that. It is called `(images, streams, train)`, and with `maps=True`
where a head reads the maps of the trunk's stages.
"""

import flax.linen as nn

from mtl_jax.models.sharing.hard import Hard
from mtl_jax.models.sharing.independent import Independent


def hard(trunk: nn.Module, tasks: tuple[str, ...]) -> Hard:
  """One trunk for all tasks."""
  del tasks
  return Hard(trunk)


def independent(trunk: nn.Module, tasks: tuple[str, ...]) -> Independent:
  """One trunk a task."""
  return Independent(trunk, tasks)


SHARINGS = {
    "hard": hard,
    "independent": independent,
}
