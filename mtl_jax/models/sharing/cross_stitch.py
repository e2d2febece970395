"""Cross-stitch networks: one trunk a task, mixed linearly after every stage."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models.sharing.columns import Columns, others


class CrossStitchUnit(nn.Module):
  """`x̃_i = Σ_j α_ij x_j`: T arrays [B, …, C] -> T of the same shape.

  Attributes:
    own_share: of α on the diagonal at the start; the rest of each row is spread evenly.
    per_channel: whether every channel has an α of its own.

  >>> unit = CrossStitchUnit(own_share=0.75)
  >>> columns = [jnp.array([[4., 0.]]), jnp.array([[0., 8.]])]
  >>> mixed, _ = unit.init_with_output(jax.random.key(0), columns, False)
  >>> [x.tolist() for x in mixed]
  [[[3.0, 2.0]], [[1.0, 6.0]]]
  """

  own_share: float = 0.9
  per_channel: bool = False

  @nn.compact
  def __call__(self, columns: Sequence[jax.Array], train: bool) -> list[jax.Array]:
    """The mixtures, by a parameter `alpha` [T, T], or [T, T, C] per channel."""
    del train
    count, dtype = len(columns), columns[0].dtype
    other = others(self.own_share, count)

    def start(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
      del key
      square = jnp.full((count, count), other).at[jnp.diag_indices(count)].set(
          1 - (count - 1) * other)
      return jnp.broadcast_to(square.reshape(count, count, *(1,) * (len(shape) - 2)), shape)

    channels = (columns[0].shape[-1],) if self.per_channel else ()
    alpha = self.param("alpha", start, (count, count, *channels)).astype(dtype)
    rule = "ijc,j...c->i...c" if self.per_channel else "ij,j...->i..."
    return list(jnp.einsum(rule, alpha, jnp.stack(columns)))


class CrossStitch(Columns):
  """One trunk a task; after each stage every task gets a learned mixture of all tasks' maps.

  Attributes:
    own_share: α of a task's own maps at the start, in (0, 1]; 1 starts as independent trunks.
    per_channel: whether every channel has an α of its own.

  Shared, and so balanced, are all α and what of the trunks precedes the last unit.

  >>> from mtl_jax import models
  >>> sharing = CrossStitch(models.CNN(channels=(4, 4), width=8), ("a", "b"))
  >>> images, streams = {"x": jnp.zeros((1, 8, 8, 3))}, {"a": "x", "b": "x"}
  >>> shapes = jax.eval_shape(lambda: sharing.init(jax.random.key(0), images, streams, False))
  >>> sorted(shapes["params"])
  ['branches_a', 'branches_b', 'trunks_a', 'trunks_b', 'units_conv1', 'units_conv2']

  Reference:
    Misra, Shrivastava, Gupta, Hebert: Cross-stitch Networks for Multi-task Learning. CVPR 2016,
    arXiv:1604.03539.

  Differences:
    The paper has two tasks and one α a unit (its equations allow one a channel), starts at 0.9 and
    0.1 from trained single-task networks, and trains α at 100 to 1,000 times the learning rate;
    here any number of tasks, T - 1 others sharing the 0.1, from any start, at one rate.
    LibMTL starts with α all ones, so that activations grow by the factor T at every unit, and has
    units before the last three stages of a ResNet; for the latter say `units_at`.
  """

  own_share: float = 0.9
  per_channel: bool = False

  def unit(self) -> nn.Module:
    """A cross-stitch unit."""
    return CrossStitchUnit(self.own_share, self.per_channel)
