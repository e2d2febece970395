"""Columns: one trunk a task, side by side, whose activations are mixed on the way."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from mtl_jax.models.calling import call_stages, call_together, stage_names, stage_place


class Columns(nn.Module):
  """One trunk a task, with units between stages that mix what all of them gave.

  A subclass gives `unit()`, a new module called `(columns, train)` that takes a list of T arrays
  [B, …, C] to another. Every image goes through all columns up to the last unit, whatever its
  stream, since a task's features depend on all of them; from there on a task's own trunk goes on
  alone, which makes the rest of that trunk the task's own.

  Attributes:
    trunk: module that names its stages, copied for every task.
    tasks: names of the T tasks.
    units_at: stages after which units stand; all but the last where left out.
  """

  trunk: nn.Module
  tasks: Sequence[str]
  units_at: Sequence[str] | None = None
  one_representation = False

  def places(self) -> list[int]:
    """The places of the stages after which units stand.

    Raises:
      ValueError: where the trunk has no such stages, or no units are wanted.
    """
    stages = stage_names(self.trunk)
    names = stages[:-1] if self.units_at is None else self.units_at
    if not names:
      raise ValueError(f"units_at: expected at least one of the trunk's stages {list(stages)}, "
                       "after which tasks mix, found none; sharing 'independent' never mixes")
    return sorted({stage_place(self.trunk, name, "units_at") for name in names})

  def last_unit(self) -> str:
    """The stage after which the last unit stands."""
    return stage_names(self.trunk)[self.places()[-1]]

  def setup(self):
    stages, places = stage_names(self.trunk), self.places()
    copy = lambda: {task: self.trunk.clone(parent=None, name=None) for task in self.tasks}
    self.trunks = copy()  # the part of each that reaches several tasks
    self.branches = copy()  # the rest
    self.units = {stages[place]: self.unit() for place in places}

  def __call__(self, images: Mapping[str, jax.Array], streams: Mapping[str, str],
               train: bool, maps: bool = False) -> dict[str, Any]:
    """Features of each task, or its maps, mixed where units stand; arguments as in `Hard`."""
    stages, cut = stage_names(self.trunk), self.places()[-1] + 1
    mixed = call_together(lambda x: self._mix(stages[:cut], x, train), images)
    results = {}
    for task, stream in streams.items():
      early = mixed[stream][task]
      late = call_stages(self.branches[task], stages[cut:], early[stages[cut - 1]], train)
      own = OrderedDict([*early.items(), *late.items()])
      results[task] = own if maps else own[stages[-1]]
    return results

  def _mix(self, stages: Sequence[str], images: jax.Array,
           train: bool) -> dict[str, OrderedDict[str, jax.Array]]:
    """What each column gives after each stage and the unit that may follow it."""
    columns = [images] * len(self.tasks)
    maps = {task: OrderedDict() for task in self.tasks}
    for stage in stages:
      columns = [self.trunks[task].stage(stage, x, train) for task, x in zip(self.tasks, columns)]
      if stage in self.units:
        columns = self.units[stage](columns, train)
      for task, x in zip(self.tasks, columns):
        maps[task][stage] = x
    return maps

  def owner(self, path: tuple[str, ...]) -> str | None:
    """Which task alone owns the parameter at `path`: that of a trunk behind the last unit."""
    return path[0].removeprefix("branches_") if path[0].startswith("branches_") else None


def check_columns(sharing: Columns) -> Columns:
  """The same module; ValueError where its units, `own_share` or `temperature` do not fit."""
  sharing.places()
  if not 0 < getattr(sharing, "own_share", 1) <= 1:
    raise ValueError(f"own_share: expected a number in (0, 1], found {sharing.own_share}")
  if not getattr(sharing, "temperature", 1) > 0:
    raise ValueError(f"temperature: expected a number above 0, found {sharing.temperature}")
  return sharing


def others(share: float, num_tasks: int) -> float:
  """What each other task gets where a task's own share is given and all sum to one."""
  return (1 - share) / (num_tasks - 1) if num_tasks > 1 else 0.0
