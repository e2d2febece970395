"""How a model calls the modules that users bring."""

from collections import OrderedDict
import inspect
from typing import Any

import flax.linen as nn
import jax


def call_module(module: nn.Module, inputs: Any, train: bool, method: str = "__call__") -> Any:
  """Calls a module, or another of its methods, handing `train` only to those that take it."""
  if "train" in inspect.signature(getattr(type(module), method)).parameters:
    return getattr(module, method)(inputs, train=train)
  return getattr(module, method)(inputs)


def call_trunk(trunk: nn.Module, images: jax.Array, train: bool, maps: bool) -> Any:
  """Features [B, F] of a trunk, or the maps of its stages in their order, which jax then keeps.

  Raises:
    ValueError: where maps are wanted of a trunk that names no stages.
  """
  if not maps:
    return call_module(trunk, images, train)
  if not hasattr(type(trunk), "maps"):
    raise ValueError(f"{type(trunk).__name__}: expected a trunk whose stages have maps, which a "
                     "head reads, found one that gives features alone; see models.Trunk")
  return OrderedDict(call_module(trunk, images, train, "maps"))


def reads_maps(head: nn.Module) -> bool:
  """Whether a head reads the maps of the trunk's stages; else it reads the features.

  Raises:
    ValueError: where its attribute `reads` says neither.
  """
  reads = getattr(head, "reads", "features")
  if reads not in ("features", "maps"):
    raise ValueError(f"{type(head).__name__}: reads: expected 'features' or 'maps', "
                     f"found {reads!r}")
  return reads == "maps"
