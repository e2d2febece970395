"""Learned branching: at every stage each task picks the trunk that it goes on from."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models.sharing.columns import Columns


class BranchingUnit(nn.Module):
  """Each of T columns goes on from one of T parents: T arrays [B, …, C] -> T of the same shape.

  Row `i` of the parameter `logits` [T, T] says how likely column `i` is to take parent `j`. In
  training parents are drawn, one draw for the whole batch, from the random stream "dropout"; the
  gradient passes as if the draw were the softmax of the perturbed logits. At evaluation every
  column takes its most likely parent, the first among equals.

  Attributes:
    temperature: of that softmax.

  >>> columns = [jnp.array([[4., 0.]]), jnp.array([[0., 8.]])]
  >>> logits = jnp.array([[0., 1.], [0., 2.]])
  >>> mixed = BranchingUnit().apply({"params": {"logits": logits}}, columns, False)
  >>> [x.tolist() for x in mixed]
  [[[0.0, 8.0]], [[0.0, 8.0]]]
  """

  temperature: float = 1.0

  @nn.compact
  def __call__(self, columns: Sequence[jax.Array], train: bool) -> list[jax.Array]:
    """The parents' arrays."""
    count = len(columns)
    logits = self.param("logits", nn.initializers.zeros, (count, count)).astype(jnp.float32)
    if train:
      logits = logits + jax.random.gumbel(self.make_rng("dropout"), logits.shape, logits.dtype)
    choice = jax.nn.one_hot(logits.argmax(axis=-1), count, dtype=logits.dtype)
    if train:  # the draw going forward, the softmax going back
      soft = nn.softmax(logits / self.temperature)
      choice = choice + soft - jax.lax.stop_gradient(soft)
    return list(jnp.einsum("ij,j...->i...", choice.astype(columns[0].dtype), jnp.stack(columns)))


class LearnedBranching(Columns):
  """One trunk a task, between whose stages each task learns which trunk to go on from.

  Tasks that pick the same parents share a path, so what is learned is a tree, or several: where
  all pick one, hard sharing up to the last choice; where each picks its own, independent trunks.
  All columns are computed, at evaluation, too.

  Attributes:
    temperature: of the softmax through which choices are learned.

  Shared, and so balanced, are all choices and what of the trunks precedes the last one.

  >>> from mtl_jax import models
  >>> sharing = LearnedBranching(models.CNN(channels=(4, 4), width=8), ("a", "b"))
  >>> images, streams = {"x": jnp.zeros((1, 8, 8, 3))}, {"a": "x", "b": "x"}
  >>> shapes = jax.eval_shape(lambda: sharing.init(jax.random.key(0), images, streams, False))
  >>> sorted(shapes["params"])
  ['branches_a', 'branches_b', 'trunks_a', 'trunks_b', 'units_conv1', 'units_conv2']

  Reference:
    Guo, Lee, Ulbricht: Learning to Branch for Multi-Task Learning. ICML 2020, arXiv:2006.01895.

  Differences:
    The temperature stays; since draws are one-hot it only shapes the gradient. There is no phase
    of warming up, nor one that prunes what nobody picked and trains the rest anew. Every layer has
    T nodes. Where several streams are read, each image takes the paths of its own tasks. LibMTL,
    which lowers the temperature over the epochs and averages all parents at first, draws at
    evaluation, too; we take the most likely.
  """

  temperature: float = 1.0

  def unit(self) -> nn.Module:
    """A choice of parents."""
    return BranchingUnit(self.temperature)
