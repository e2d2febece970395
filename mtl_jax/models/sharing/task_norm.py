"""Normalisation of each task's own, in a trunk that is shared otherwise."""

from collections.abc import Mapping

import jax

from mtl_jax.models.sharing.own_passes import Flat, OwnPasses


class TaskNorm(OwnPasses):
  """Each task has the norm layers of the trunk for itself: scale, shift and running statistics.

  All else is shared. For tasks whose images come from different domains, which shared statistics
  would describe badly. Norm layers are those that have a parameter "scale", as linen's have, or
  keep "batch_stats".

  Attributes:
    trunk: module from images to features, with norm layers.
    tasks: names of the tasks.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import models
  >>> sharing = TaskNorm(models.ResNet(blocks=(), channels=4), ("a",))
  >>> variables = sharing.init(jax.random.key(0), {"s": jnp.ones((2, 4, 4, 3))}, {"a": "s"}, False)
  >>> jax.tree.map(jnp.shape, variables["params"]["own_a"])
  {'bn1': {'bias': (4,), 'scale': (4,)}}
  >>> sorted(variables["params"]["trunk"]), sorted(variables["batch_stats"]["own_a"]["bn1"])
  (['conv1'], ['mean', 'var'])

  Reference:
    Bilen, Vedaldi: Universal representations: The missing link between faces, text, planktons, and
    cat breeds. 2017, arXiv:1701.07275.

  Differences:
    Theirs are normalisations of domains, and ours of tasks: two tasks of one stream do not share
    them. Raises ValueError for a trunk without norm layers.
  """

  def divide(self, params: Flat, state: Flat, keys: Mapping[str, jax.Array]
             ) -> tuple[Flat, dict[str, Flat]]:
    """The parameters of norm layers for each task, the same at the start; all others shared."""
    norms = {path[:-1] for path in params if path[-1] == "scale"}
    norms |= {path[1:-1] for path in state if path[0] == "batch_stats"}
    if not norms:
      raise ValueError("task_norm: expected a trunk with norm layers, such as resnet18 or vit, "
                       "found one without")
    own = {path: x for path, x in params.items() if path[:-1] in norms}
    shared = {path: x for path, x in params.items() if path not in own}
    return shared, {task: own for task in keys}

  def join(self, shared: Flat, own: Flat) -> Flat:
    """The trunk's parameters with the task's norm layers."""
    return {**shared, **own}
