"""Sharing: modules from the streams' images to one feature a task, around a trunk.

A sharing module names, by `owner(path)`, the task that alone owns a parameter; what nobody owns is
shared, and balancing acts on that. It is called `(images, streams, train)`, and with `maps=True`
where a head reads the maps of the trunk's stages.
"""

import flax.linen as nn

from mtl_jax.models.calling import stage_place
from mtl_jax.models.sharing.hard import Hard
from mtl_jax.models.sharing.independent import Independent


def hard(trunk: nn.Module, tasks: tuple[str, ...], branch_at: str | None = None) -> Hard:
  """One trunk for all tasks, or up to a stage from which each has its own.

  Args:
    trunk: module from images to features.
    tasks: names of the tasks.
    branch_at: the last stage that all tasks share; all of them where left out.

  Raises:
    ValueError: where the trunk has no such stage.
  """
  if branch_at is not None:
    stage_place(trunk, branch_at, "branch_at")
  return Hard(trunk, tasks, branch_at)


def independent(trunk: nn.Module, tasks: tuple[str, ...]) -> Independent:
  """One trunk a task."""
  return Independent(trunk, tasks)


SHARINGS = {
    "hard": hard,
    "independent": independent,
}
