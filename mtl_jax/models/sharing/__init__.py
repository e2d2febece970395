"""Sharing: modules from the streams' images to one feature a task, around a trunk.

A sharing module names, by `owner(path)`, the task that alone owns a parameter; what nobody owns is
shared, and balancing acts on that. It is called `(images, streams, train)`, and with `maps=True`
where a head reads the maps of the trunk's stages. One that adds terms to the loss gives them by
`penalties(params)`, a pure function of its own parameters: `{name: []}`; those that depend on the
batch it sows, in training, in the collection "penalties" under their names (`gates.sow_entropy`).
"""

import flax.linen as nn

from mtl_jax.models.calling import stage_place
from mtl_jax.models.sharing.adapters import Adapters
from mtl_jax.models.sharing.adashare import AdaShare
from mtl_jax.models.sharing.cgc import CGC
from mtl_jax.models.sharing.columns import check_columns
from mtl_jax.models.sharing.cross_stitch import CrossStitch
from mtl_jax.models.sharing.dselect_k import DSelectK
from mtl_jax.models.sharing.film import FiLM
from mtl_jax.models.sharing.hard import Hard
from mtl_jax.models.sharing.independent import Independent
from mtl_jax.models.sharing.learned_branching import LearnedBranching
from mtl_jax.models.sharing.lora import LoRA
from mtl_jax.models.sharing.mmoe import MMoE
from mtl_jax.models.sharing.mtan import MTAN, check_mtan
from mtl_jax.models.sharing.nddr import NDDR
from mtl_jax.models.sharing.ple import PLE
from mtl_jax.models.sharing.soft import DISTANCES, Soft
from mtl_jax.models.sharing.task_norm import TaskNorm


def hard(trunk: nn.Module, tasks: tuple[str, ...], branch_at: str | None = None) -> Hard:
  """One trunk for all tasks, or up to a stage from which each has its own.

  Args:
    trunk: module from images to features.
    tasks: names of the tasks.
    branch_at: the last stage that all tasks share; all of them where left out.

  Raises:
    ValueError: where the trunk has no such stage.
  """
  if branch_at is not None:
    stage_place(trunk, branch_at, "branch_at")
  return Hard(trunk, tasks, branch_at)


def independent(trunk: nn.Module, tasks: tuple[str, ...]) -> Independent:
  """One trunk a task."""
  return Independent(trunk, tasks)


def cross_stitch(trunk: nn.Module, tasks: tuple[str, ...], own_share: float = 0.9,
                 per_channel: bool = False,
                 units_at: tuple[str, ...] | None = None) -> CrossStitch:
  """One trunk a task, mixed linearly between stages (Misra et al., CVPR 2016).

  Args:
    trunk: module that names its stages.
    tasks: names of the tasks.
    own_share: of a task's own maps in its mixture at the start, in (0, 1].
    per_channel: whether every channel is mixed in a way of its own.
    units_at: stages after which tasks mix; all but the last where left out.

  Raises:
    ValueError: where the trunk has no such stages, or the share is out of range.
  """
  return check_columns(CrossStitch(trunk, tasks, units_at, own_share, per_channel))


def nddr(trunk: nn.Module, tasks: tuple[str, ...], own_share: float = 0.9,
         units_at: tuple[str, ...] | None = None) -> NDDR:
  """One trunk a task, fused between stages by 1x1 convolutions (Gao et al., CVPR 2019).

  Args:
    trunk: module that names its stages.
    tasks: names of the tasks.
    own_share: weight of a task's own channels at the start, in (0, 1].
    units_at: stages after which tasks are fused; all but the last where left out.

  Raises:
    ValueError: where the trunk has no such stages, or the share is out of range.
  """
  return check_columns(NDDR(trunk, tasks, units_at, own_share))


def mtan(trunk: nn.Module, tasks: tuple[str, ...], reduction: int = 1) -> MTAN:
  """One trunk, on whose maps every task lays masks of its own (Liu et al., CVPR 2019).

  Args:
    trunk: module that names its stages.
    tasks: names of the tasks.
    reduction: the masks' hidden channels are those of the stage over this.

  Raises:
    ValueError: where the trunk has nothing to mask, or `reduction` is no size.
  """
  return check_mtan(MTAN(trunk, tasks, reduction))


def soft(trunk: nn.Module, tasks: tuple[str, ...], distance: str = "mean",
         strength: float = 1e-3) -> Soft:
  """One trunk a task, pulled together by a penalty (Duong et al., ACL 2015).

  Args:
    trunk: module from images to features.
    tasks: names of the tasks.
    distance: "mean", "consecutive" or "trace_norm".
    strength: λ, from 0 on; at 0 trunks are independent.

  Raises:
    ValueError: for an unknown distance or a strength out of range.
  """
  if distance not in DISTANCES:
    raise ValueError(f"distance: expected one of {list(DISTANCES)}, found {distance!r}")
  if not strength >= 0:
    raise ValueError(f"strength: expected a number from 0 on, found {strength}")
  return Soft(trunk, tasks, distance, strength)


def learned_branching(trunk: nn.Module, tasks: tuple[str, ...], temperature: float = 1.0,
                      units_at: tuple[str, ...] | None = None) -> LearnedBranching:
  """One trunk a task, each learning which to go on from (Guo et al., ICML 2020).

  Args:
    trunk: module that names its stages.
    tasks: names of the tasks.
    temperature: of the softmax through which choices are learned, above 0.
    units_at: stages after which tasks choose; all but the last where left out.

  Raises:
    ValueError: where the trunk has no such stages, or the temperature is out of range.
  """
  return check_columns(LearnedBranching(trunk, tasks, units_at, temperature))


SHARINGS = {
    "hard": hard,
    "independent": independent,
    "cross_stitch": cross_stitch,
    "nddr": nddr,
    "mtan": mtan,
    "soft": soft,
    "learned_branching": learned_branching,
    "adashare": AdaShare,
    "mmoe": MMoE,
    "cgc": CGC,
    "ple": PLE,
    "dselect_k": DSelectK,
    "film": FiLM,
    "adapters": Adapters,
    "lora": LoRA,
    "task_norm": TaskNorm,
}
