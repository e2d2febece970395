"""Going through a trunk stage by stage, changed by each task in between."""

from collections import OrderedDict
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax

from mtl_jax.models.calling import call_together


def run_changed(trunk: nn.Module, images: Mapping[str, jax.Array], streams: Mapping[str, str],
                train: bool, change: Callable[[str, str, jax.Array], jax.Array]
                ) -> dict[str, OrderedDict[str, jax.Array]]:
  """What each stage gives for each task, changed by the task before it enters the next.

  The first stage sees each stream once, the later ones each task's own maps, all in one batch: so
  BatchNorm normalises with the statistics of all tasks, and its running ones move once.

  Args:
    trunk: module that names its stages.
    images: by stream, [B_s, …].
    streams: the stream of each task.
    train: whether the pass is one of training.
    change: `(task, stage, x) -> x`, of the same shape.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import models
  >>> class Doubling(models.Trunk):
  ...   stages = ("maps", "features")
  ...   def stage(self, name, x, train=False):
  ...     return 2 * x
  >>> found = run_changed(Doubling(), {"s": jnp.ones((1, 1))}, {"a": "s", "b": "s"}, False,
  ...                     lambda task, stage, x: x + 1 if task == "a" else x)
  >>> {task: [float(x[0, 0]) for x in stages.values()] for task, stages in found.items()}
  {'a': [3.0, 7.0], 'b': [2.0, 4.0]}
  """
  found = {task: OrderedDict() for task in streams}
  inputs, source = images, streams
  for stage in trunk.stages:
    given = call_together(lambda x: trunk.stage(stage, x, train), inputs)  # noqa: B023
    inputs = {task: change(task, stage, given[source[task]]) for task in streams}
    source = {task: task for task in streams}
    for task, x in inputs.items():
      found[task][stage] = x
  return found
