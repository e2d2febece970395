"""MTAN: one shared trunk, on whose maps every task lays masks of its own."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models.calling import call_stages, call_together, stage_names
from mtl_jax.models.operators import Conv

_norm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


class Attention(nn.Module):
  """A mask in (0, 1): two 1x1 convolutions with BatchNorm, the last one through a sigmoid.

  Attributes:
    channels: of the mask.
    hidden: channels between the convolutions.
  """

  channels: int
  hidden: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[B, …, C] -> [B, …, channels]."""
    norm = functools.partial(_norm, use_running_average=not train)
    x = nn.relu(norm(name="norm1")(nn.Dense(self.hidden, use_bias=False, name="conv1")(x)))
    return nn.sigmoid(norm(name="norm2")(nn.Dense(self.channels, use_bias=False, name="conv2")(x)))


class Refinement(nn.Module):
  """Takes attended maps to the size of the next stage: a 3x3 convolution, BatchNorm, ReLU."""

  @nn.compact
  def __call__(self, x: jax.Array, like: jax.Array, train: bool) -> jax.Array:
    """[B, h, w, C] -> the shape of `like`; a dense layer where that is a vector."""
    channels = like.shape[-1]
    if like.ndim == 2:
      layer = nn.Dense(channels, use_bias=False, name="conv")
    else:
      layer = Conv(channels, (3, 3), use_bias=False, name="conv")
    x = nn.relu(_norm(use_running_average=not train, name="norm")(layer(x)))
    return x if x.shape == like.shape else jax.image.resize(x, like.shape, "linear")


class TaskAttention(nn.Module):
  """All masks of one task.

  Attributes:
    reduction: the masks' hidden channels are those of the stage over this.
  """

  reduction: int

  @nn.compact
  def __call__(self, shared: Mapping[str, jax.Array], refinements: Mapping[str, Refinement],
               train: bool) -> OrderedDict[str, jax.Array]:
    """What the task keeps of each stage's maps, `{stage: [B, …, C]}`."""
    attended, before = OrderedDict(), None
    for stage, x in shared.items():
      seen = x if before is None else jnp.concatenate(
          [x, refinements[stage](before, x, train)], axis=-1)
      hidden = max(x.shape[-1] // self.reduction, 1)
      attended[stage] = before = x * Attention(x.shape[-1], hidden, name=stage)(seen, train)
    return attended


class MTAN(nn.Module):
  """One shared trunk; task `i` reads `â_i = a_i ⊙ p` of what each stage gives, `p`.

  Its mask looks at the stage and at what the task kept of the stage before: `a_i^1 = h_i(p^1)`,
  `a_i^j = h_i([p^j, f(â_i^{j-1})])`, where `h_i` is the task's own (two 1x1 convolutions) and `f`
  (a 3x3 convolution) is shared. The trunk's last stage, "features", has no mask: it reads each
  task's attended maps, so with all masks open this is hard sharing.

  Attributes:
    trunk: module that names its stages.
    tasks: names of the T tasks.
    reduction: the masks' hidden channels are those of the stage over this.

  Shared, and so balanced, are the trunk and the refinements `f`.

  >>> from mtl_jax import models
  >>> sharing = MTAN(models.CNN(channels=(4, 4), width=8), ("a", "b"))
  >>> images, streams = {"x": jnp.zeros((1, 8, 8, 3))}, {"a": "x", "b": "x"}
  >>> shapes = jax.eval_shape(lambda: sharing.init(jax.random.key(0), images, streams, False))
  >>> for name in sorted(shapes["params"]):
  ...   print(name, sharing.owner((name,)))
  attention_a a
  attention_b b
  refinement_conv2 None
  trunk None

  Reference:
    Liu, Johns, Davison: End-to-End Multi-Task Learning with Attention. CVPR 2019,
    arXiv:1803.10704.

  Differences:
    The paper's masks look at the middle of a block and mask its end; a trunk's stage is a whole
    here, so masks look at what they mask. The paper takes maps to the next size by max-pooling, we
    by linear interpolation, whatever the trunk's strides. Its networks have a decoder with masks;
    here dense heads read the attended maps. Convolutions before a norm have no bias. LibMTL's
    ResNet has a quarter of the channels in the masks where blocks are bottlenecks: `reduction=4`.
  """

  trunk: nn.Module
  tasks: Sequence[str]
  reduction: int = 1
  one_representation = False

  @nn.compact
  def __call__(self, images: Mapping[str, jax.Array], streams: Mapping[str, str],
               train: bool, maps: bool = False) -> dict[str, Any]:
    """Features of each task, or its maps, the attended ones; arguments as in `Hard`."""
    *early, last = stage_names(self.trunk)
    shared = call_together(lambda x: call_stages(self.trunk, early, x, train), images)
    refinements = {stage: Refinement(name=f"refinement_{stage}") for stage in early[1:]}
    results = {}
    for task, stream in streams.items():
      attention = TaskAttention(self.reduction, name=f"attention_{task}")
      attended = attention(shared[stream], refinements, train)
      attended[last] = self.trunk.stage(last, attended[early[-1]], train)
      results[task] = attended if maps else attended[last]
    return results

  def owner(self, path: tuple[str, ...]) -> str | None:
    """Which task alone owns the parameter at `path`: that of a mask; all else is shared."""
    return path[0].removeprefix("attention_") if path[0].startswith("attention_") else None


def check_mtan(sharing: MTAN) -> MTAN:
  """The same module; ValueError where there is nothing to mask or `reduction` is no size."""
  if len(stage_names(sharing.trunk)) < 2:
    raise ValueError(f"mtan: expected a trunk with a stage before {sharing.trunk.stages[-1]!r}, "
                     "on which to lay masks, found none")
  if sharing.reduction < 1:
    raise ValueError(f"reduction: expected a size of at least 1, found {sharing.reduction}")
  return sharing
