"""Sharing: modules from the streams' images to one feature a task, around a trunk.

A sharing module names, by `owner(path)`, the task that alone owns a parameter; what nobody owns is
shared, and balancing acts on that. It is called `(images, streams, train)`, and with `maps=True`
where a head reads the maps of the trunk's stages.
"""

import flax.linen as nn

from mtl_jax.models.sharing.adapters import Adapters
from mtl_jax.models.sharing.cgc import CGC
from mtl_jax.models.sharing.dselect_k import DSelectK
from mtl_jax.models.sharing.film import FiLM
from mtl_jax.models.sharing.hard import Hard
from mtl_jax.models.sharing.independent import Independent
from mtl_jax.models.sharing.lora import LoRA
from mtl_jax.models.sharing.mmoe import MMoE
from mtl_jax.models.sharing.ple import PLE
from mtl_jax.models.sharing.task_norm import TaskNorm


def hard(trunk: nn.Module, tasks: tuple[str, ...]) -> Hard:
  """One trunk for all tasks."""
  del tasks
  return Hard(trunk)


def independent(trunk: nn.Module, tasks: tuple[str, ...]) -> Independent:
  """One trunk a task."""
  return Independent(trunk, tasks)


SHARINGS = {
    "hard": hard,
    "independent": independent,
    "mmoe": MMoE,
    "cgc": CGC,
    "ple": PLE,
    "dselect_k": DSelectK,
    "film": FiLM,
    "adapters": Adapters,
    "lora": LoRA,
    "task_norm": TaskNorm,
}
