"""What gates among experts read, and how they mix."""

from collections.abc import Sequence
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models.operators import Conv

GATE_INPUTS = ("stem", "pixels")
_WIDTH = 16  # of the stem
_GRID = 4  # cells a side that pixels are pooled to


class GateInput(nn.Module):
  """A few numbers [B, D] an example, on which gates decide.

  Attributes:
    reads: "stem", one 3x3 convolution of stride 2 with ReLU, averaged over space (a dense layer
      where the inputs are no images), which all tasks share; or "pixels", the images pooled to
      4x4 cells (other inputs as they are), without parameters.

  >>> images = jnp.ones((2, 8, 6, 3))
  >>> for reads in GATE_INPUTS:
  ...   print(GateInput(reads).init_with_output(jax.random.key(0), images)[0].shape)
  (2, 16)
  (2, 48)
  """

  reads: str = "stem"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Numbers [B, D] of images [B, H, W, C] or other inputs [B, …]."""
    is_image = x.ndim == 4
    if self.reads == "stem":
      if is_image:
        return nn.relu(Conv(_WIDTH, (3, 3), (2, 2), name="stem")(x)).mean(axis=(1, 2))
      return nn.relu(nn.Dense(_WIDTH, name="stem")(x.reshape(x.shape[0], -1)))
    if is_image:
      x = jax.image.resize(x, (x.shape[0], _GRID, _GRID, x.shape[3]), "linear")
    return x.reshape(x.shape[0], -1)


def softmax_gate(logits: jax.Array) -> jax.Array:
  """Weights [B, E] of the experts, in float32 whatever the dtype of the logits [B, E]."""
  return nn.softmax(logits.astype(jnp.float32), axis=-1)


def entropy(shares: jax.Array) -> jax.Array:
  """Sum of the entropies in nats of distributions along the last axis; zero shares add nothing.

  >>> [round(float(entropy(jnp.array(x))), 4) for x in ([0.5, 0.5, 0.0], [0.25] * 4)]
  [0.6931, 1.3863]
  """
  safe = jnp.where(shares > 0, shares, 1.0)
  return -jnp.sum(safe * jnp.log(safe))


def sow_entropy(module: nn.Module, name: str, strength: float, shares: jax.Array,
                train: bool) -> None:
  """Adds to a penalty of this pass, in training: `strength` times the entropy an example has.

  Args:
    module: whose pass it is.
    name: of the penalty, in the collection "penalties", whence the training step takes it.
    strength: at 0 nothing is added, nor computed.
    shares: [B, …, E], distributions along the last axis; their entropies are averaged over the
      batch, and summed over what lies between.
    train: whether the pass is one of training.
  """
  if strength and train and not module.is_initializing():
    module.sow("penalties", name, strength * entropy(shares) / shares.shape[0])


def mix(weights: jax.Array, outputs: Sequence[Any]) -> Any:
  """The weighted sum of the experts' outputs, example by example.

  Args:
    weights: [B, E].
    outputs: of each of the E experts, [B, …] or a pytree of such, as of maps.

  >>> mix(jnp.array([[0.25, 0.75]]), [jnp.array([[4.0]]), jnp.array([[8.0]])]).tolist()
  [[7.0]]
  """
  def mixed(*leaves: jax.Array) -> jax.Array:
    axes = tuple(range(1, leaves[0].ndim))
    return functools.reduce(jnp.add, (
        leaf * jnp.expand_dims(weights[:, i], axes).astype(leaf.dtype)
        for i, leaf in enumerate(leaves)))
  return jax.tree.map(mixed, *outputs)


def check_gate_input(where: str, reads: str, known: Sequence[str] = GATE_INPUTS) -> None:
  """Raises ValueError where gates are to read something unknown."""
  if reads not in known:
    raise ValueError(f"{where}: gate_input: expected one of {list(known)}, found {reads!r}")


def check_count(where: str, name: str, count: int, least: int = 1) -> None:
  """Raises ValueError where there are too few of something."""
  if count < least:
    raise ValueError(f"{where}: {name}: expected at least {least}, found {count}")
