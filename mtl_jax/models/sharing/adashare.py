"""AdaShare: one trunk, of which each task learns which blocks to skip."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models.calling import block_names, call_together, stage_names


class Policy(nn.Module):
  """A task's choice between keeping and skipping each block.

  The parameter of a block is the log odds of keeping it. In training choices are drawn, one draw
  for the whole batch, from the random stream "dropout"; the gradient passes as if the draw were
  the sigmoid of the perturbed log odds, which is the Gumbel-softmax of two choices. At evaluation
  what is at least as likely to be kept as skipped is kept.

  Attributes:
    keep: how likely a block is kept at the start.
    temperature: of that sigmoid.

  >>> params = {"block1": jnp.array(-0.1), "block2": jnp.array(0.0)}
  >>> for block in params:
  ...   print(Policy().apply({"params": params}, block, jnp.ones(1), 3 * jnp.ones(1), False))
  [1.]
  [3.]
  """

  keep: float = 0.5
  temperature: float = 1.0

  @nn.compact
  def __call__(self, block: str, skipped: jax.Array, kept: jax.Array, train: bool) -> jax.Array:
    """What leaves a block, of what entered it and what it gave, both [B, …]."""
    odds = self.param(block, nn.initializers.constant(math.log(self.keep / (1 - self.keep))), ())
    if not train:
      return jnp.where(odds >= 0, kept, skipped)
    odds = odds + jax.random.logistic(self.make_rng("dropout"), odds.shape, odds.dtype)
    soft = nn.sigmoid(odds / self.temperature)
    # The draw going forward, exactly; the sigmoid going back.
    gate = (odds >= 0).astype(odds.dtype) + (soft - jax.lax.stop_gradient(soft))
    gate = gate.astype(kept.dtype)
    return gate * kept + (1 - gate) * skipped


class AdaShare(nn.Module):
  """One trunk, through which each task goes a way of its own: it may skip blocks.

  Blocks that may be skipped are those that give what has the shape of what they are given, save
  the first, which reads the inputs: the residual blocks of `resnet18` within a resolution, the
  blocks of `vit`, layers of `mlp` as wide as those before them. The others are in every task's
  way. The trunk is shared; a policy belongs to its task. Where nothing is skipped it is `Hard`.

  From the first such block on each task goes through the trunk on its own, all in one batch, so
  that BatchNorm normalises with the statistics of all tasks, and its running ones move once.
  Skipped blocks are computed, too, at evaluation as well.

  Attributes:
    trunk: module that names its stages, and possibly blocks within them.
    tasks: names of the T tasks.
    keep: how likely a task keeps a block at the start, in (0, 1); near one, training starts as
      hard sharing.
    temperature: of the sigmoid through which policies are learned.
    sparsity: strength of the penalty "sparsity", `Σ_t Σ_l log α_tl` of how likely task t keeps
      block l.
    sharing: strength of the penalty "sharing", `Σ_{s<t} Σ_l (L − l)/L |α_sl − α_tl|` over pairs of
      tasks and the L blocks, numbered from 0: policies that differ early cost more.

  >>> from mtl_jax import models
  >>> sharing = AdaShare(models.MLPTrunk(widths=(4, 4, 3)), ("a", "b"), keep=0.5, sparsity=1.0,
  ...                    sharing=1.0)
  >>> images, streams = {"x": jnp.zeros((1, 5))}, {"a": "x", "b": "x"}
  >>> params = sharing.init(jax.random.key(0), images, streams, False)["params"]
  >>> params["policies_a"]
  {'hidden2': Array(0., dtype=float32)}
  >>> {name: round(float(x), 3) for name, x in sharing.penalties(params).items()}  # 2 log ½
  {'sparsity': -1.386, 'sharing': 0.0}

  Reference:
    Sun, Panda, Feris, Saenko: AdaShare: Learning What to Share for Efficient Deep Multi-Task
    Learning. NeurIPS 2020, arXiv:1911.12423.

  Differences:
    The paper first shares all blocks, then learns policies of the last blocks first, lowers the
    temperature, updates weights and policies in turn, and in the end trains the network that was
    found anew. Here all is learned at once: `keep` stands for the start, the temperature stays,
    and only shapes the gradient, since draws are zero or one. The paper has two logits a choice,
    whose gradients are opposite; their difference is our log odds. It also lets tasks skip blocks
    that change the shape, of which their 1x1 shortcuts stay. The official code draws policies
    between zero and one by default, takes `−log(1 − α)`, averaged over blocks, for the sparsity,
    and differences of logits, with weights that grow with depth, for the sharing; strengths by
    default are those of its NYUv2 config. Raises ValueError for fields out of range, or a trunk
    of which nothing can be skipped.
  """

  trunk: nn.Module
  tasks: Sequence[str]
  keep: float = 0.9
  temperature: float = 1.0
  sparsity: float = 0.001
  sharing: float = 0.05
  one_representation = False

  def __post_init__(self):
    stage_names(self.trunk, "adashare")
    if not 0 < self.keep < 1:
      raise ValueError(f"adashare: keep: expected a number in (0, 1), found {self.keep}")
    if not self.temperature > 0:
      raise ValueError(f"adashare: temperature: expected a number > 0, found {self.temperature}")
    for name in ("sparsity", "sharing"):
      if not getattr(self, name) >= 0:
        raise ValueError(f"adashare: {name}: expected a number >= 0, found {getattr(self, name)}")
    super().__post_init__()

  def setup(self):
    self.policies = {task: Policy(self.keep, self.temperature) for task in self.tasks}

  def __call__(self, images: Mapping[str, jax.Array], streams: Mapping[str, str],
               train: bool, maps: bool = False) -> dict[str, Any]:
    """Features of each task, or its maps; arguments as in `Hard`."""
    found = {task: OrderedDict() for task in streams}
    inputs, source = images, streams
    for stage in self.trunk.stages:
      for block in block_names(self.trunk, stage):
        given = call_together(lambda x: self.trunk.stage(block, x, train), inputs)  # noqa: B023
        if inputs is images or any(given[key].shape != x.shape for key, x in inputs.items()):
          inputs = given
          continue
        inputs = {task: self.policies[task](block, inputs[key], given[key], train)
                  for task, key in source.items()}
        source = {task: task for task in streams}
      for task, key in source.items():
        found[task][stage] = inputs[key]
    if source is streams:
      raise ValueError("adashare: trunk: expected one with a block, after the first, that keeps "
                       f"the shape and so can be skipped, found {type(self.trunk).__name__} with "
                       f"stages {list(self.trunk.stages)}")
    return found if maps else {task: stages["features"] for task, stages in found.items()}

  def owner(self, path: tuple[str, ...]) -> str | None:
    """Which task alone owns the parameter at `path`: that of its policy; the trunk is shared."""
    return path[0].removeprefix("policies_") if path[0].startswith("policies_") else None

  def penalties(self, params: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What is added to the loss, by name; nothing of strength 0.

    Args:
      params: of this module.
    """
    policies = [params[f"policies_{task}"] for task in self.tasks]
    blocks = [block for stage in self.trunk.stages for block in block_names(self.trunk, stage)
              if block in policies[0]]
    odds = jnp.stack([jnp.stack([policy[block] for block in blocks]) for policy in policies])
    found = {}
    if self.sparsity:
      found["sparsity"] = self.sparsity * nn.log_sigmoid(odds).sum()
    if self.sharing:
      depth = 1 - jnp.arange(len(blocks), dtype=odds.dtype) / len(blocks)
      keep = nn.sigmoid(odds)  # [T, L]
      gaps = jnp.abs(keep[:, None] - keep[None]).sum(axis=(0, 1)) / 2  # of each pair once
      found["sharing"] = self.sharing * (gaps * depth).sum()
    return found
