"""Hard sharing: one trunk for all tasks, up to a point from which each may have its own."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from mtl_jax.models.calling import (call_stages, call_together, call_trunk, stage_names,
                                    stage_place)


class Hard(nn.Module):
  """One trunk through which all streams go, in one concatenated batch.

  With a branch point its later stages are copied, one branch a task.

  Attributes:
    trunk: module from images to features.
    tasks: names of the tasks; needed for branches only.
    branch_at: the last stage that all tasks share; all of them where left out.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import models
  >>> sharing = Hard(models.CNN(channels=(4, 4), width=8), ("a", "b"), branch_at="conv2")
  >>> images, streams = {"x": jnp.zeros((1, 8, 8, 3))}, {"a": "x", "b": "x"}
  >>> variables = jax.eval_shape(lambda: sharing.init(jax.random.key(0), images, streams, False))
  >>> {name: sorted(part) for name, part in sorted(variables["params"].items())}
  {'branches_a': ['dense'], 'branches_b': ['dense'], 'trunk': ['conv1', 'conv2']}

  Reference:
    Caruana: Multitask Learning. Machine Learning 28, 1997.
  """

  trunk: nn.Module
  tasks: Sequence[str] = ()
  branch_at: str | None = None

  def setup(self):
    if self._branches():
      if not self.tasks:
        raise ValueError("branch_at: expected the names of the tasks that branch, found none")
      self.branches = {task: self.trunk.clone(parent=None, name=None) for task in self.tasks}

  def _branches(self) -> bool:
    return self.branch_at is not None and self.branch_at != stage_names(self.trunk)[-1]

  @property
  def one_representation(self) -> bool:
    """Whether tasks of one stream read the very same features."""
    return not self._branches()

  def __call__(self, images: Mapping[str, jax.Array], streams: Mapping[str, str],
               train: bool, maps: bool = False) -> dict[str, Any]:
    """Features [B_s, F] of each task, or its maps.

    Args:
      images: by stream, [B_s, H, W, C] or [B_s, D]; streams of one shape share a pass of the
        trunk.
      streams: the stream of each task.
      train: whether the pass is one of training.
      maps: whether to give `{stage: [B_s, …], …, "features": [B_s, F]}` instead of the features.

    Raises:
      ValueError: where the trunk has no stage `branch_at`.
    """
    if not self._branches():
      features = call_together(lambda x: call_trunk(self.trunk, x, train, maps), images)
      return {task: features[stream] for task, stream in streams.items()}
    cut = stage_place(self.trunk, self.branch_at, "branch_at") + 1
    early, late = self.trunk.stages[:cut], self.trunk.stages[cut:]
    shared = call_together(lambda x: call_stages(self.trunk, early, x, train), images)
    results = {}
    for task, stream in streams.items():
      own = call_stages(self.branches[task], late, shared[stream][early[-1]], train)
      results[task] = (OrderedDict([*shared[stream].items(), *own.items()]) if maps
                       else own[late[-1]])
    return results

  def owner(self, path: tuple[str, ...]) -> str | None:
    """Which task alone owns the parameter at `path`: that of its branch; the trunk is shared."""
    return path[0].removeprefix("branches_") if path[0].startswith("branches_") else None
