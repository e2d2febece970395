"""NDDR-CNN: one trunk a task, fused after every stage by a learned reduction of all channels."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models.sharing.columns import Columns, others


class NDDRUnit(nn.Module):
  """All tasks' channels, reduced for each task by a 1x1 convolution, BatchNorm and ReLU.

  Attributes:
    tasks: names of the T tasks.
    own_share: of the weight of a task's own channels at the start; the rest is spread evenly.

  >>> unit = NDDRUnit(("a", "b"), own_share=0.75)
  >>> columns = [jnp.array([[4., 0.]]), jnp.array([[0., 8.]])]
  >>> variables = unit.init(jax.random.key(0), columns, False)
  >>> variables["params"]["reduce_a"]["kernel"].tolist()
  [[0.75, 0.0], [0.0, 0.75], [0.25, 0.0], [0.0, 0.25]]
  >>> [x.round(2).tolist() for x in unit.apply(variables, columns, False)]
  [[[3.0, 2.0]], [[1.0, 6.0]]]
  """

  tasks: Sequence[str]
  own_share: float = 0.9

  @nn.compact
  def __call__(self, columns: Sequence[jax.Array], train: bool) -> list[jax.Array]:
    """T arrays [B, …, C] -> T of the same shape."""
    joined, channels = jnp.concatenate(columns, axis=-1), columns[0].shape[-1]
    other = others(self.own_share, len(columns))

    def start_of(own: int):
      shares = [1 - (len(columns) - 1) * other if i == own else other for i in range(len(columns))]
      return lambda key, shape, dtype: jnp.concatenate(
          [share * jnp.eye(channels, dtype=dtype) for share in shares])

    reduced = []
    for i, task in enumerate(self.tasks):
      x = nn.Dense(channels, use_bias=False, kernel_init=start_of(i),
                   name=f"reduce_{task}")(joined)
      reduced.append(nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.95,
                                          epsilon=1e-3, name=f"norm_{task}")(x)))
    return reduced


class NDDR(Columns):
  """One trunk a task; after each stage every task gets a reduction of all tasks' channels.

  Attributes:
    own_share: weight of a task's own channels at the start, in (0, 1]; with 1, and before the
      norms have seen a batch, trunks whose maps are not negative start as independent ones.

  Shared, and so balanced, are the units before the last one and what of the trunks precedes it.

  >>> from mtl_jax import models
  >>> sharing = NDDR(models.CNN(channels=(4, 4), width=8), ("a", "b"))
  >>> images, streams = {"x": jnp.zeros((1, 8, 8, 3))}, {"a": "x", "b": "x"}
  >>> shapes = jax.eval_shape(lambda: sharing.init(jax.random.key(0), images, streams, False))
  >>> unit = shapes["params"]["units_conv2"]
  >>> sorted(unit), unit["reduce_a"]["kernel"].shape
  (['norm_a', 'norm_b', 'reduce_a', 'reduce_b'], (8, 4))
  >>> sharing.owner(("units_conv1", "reduce_a", "kernel"))
  >>> sharing.owner(("units_conv2", "reduce_a", "kernel"))
  'a'

  Reference:
    Gao, Ma, Zhao, Liu, Yuille: NDDR-CNN: Layerwise Feature Fusing in Multi-Task CNNs by Neural
    Discriminative Dimensionality Reduction. CVPR 2019, arXiv:1801.08297.

  Differences:
    The paper has two tasks, starts at 0.9 and 0.1 from trained single-task networks, trains these
    units at 100 times the learning rate, and has a variant with shortcuts to the last layer; here
    any number of tasks, T - 1 others sharing the 0.1, from any start, at one rate, no shortcuts.
    The norm's momentum and epsilon are the official code's.
  """

  own_share: float = 0.9

  def unit(self) -> nn.Module:
    """An NDDR unit."""
    return NDDRUnit(self.tasks, self.own_share)

  def owner(self, path: tuple[str, ...]) -> str | None:
    """Which task alone owns the parameter at `path`: one behind the last mixture."""
    if path[0] == f"units_{self.last_unit()}":
      return path[1].partition("_")[2]
    return super().owner(path)
