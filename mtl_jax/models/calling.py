"""How a model calls the modules that users bring."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


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


def stage_names(trunk: nn.Module, where: str = "") -> tuple[str, ...]:
  """The names of a trunk's stages in order.

  Args:
    trunk: module from images to features.
    where: what asks, for the message; the trunk where left out.

  Raises:
    ValueError: where the trunk names no stages.
  """
  if not hasattr(type(trunk), "stage"):
    kind = type(trunk).__name__
    raise ValueError(f"{where or kind}: expected a trunk that names its stages, found {kind}; see "
                     "models.Trunk")
  return tuple(trunk.stages)


def stage_place(trunk: nn.Module, name: str, argument: str) -> int:
  """The place of a stage among the trunk's stages.

  Raises:
    ValueError: where there is none of that name; it names the argument that asked for it.
  """
  stages = stage_names(trunk)
  if name not in stages:
    raise ValueError(f"{argument}: expected one of {list(stages)}, found {name!r}")
  return stages.index(name)


def block_names(trunk: nn.Module, stage: str) -> tuple[str, ...]:
  """The names of a stage's blocks in order; of a trunk that names none, the stage itself."""
  return trunk.blocks_of(stage) if hasattr(type(trunk), "blocks_of") else (stage,)


def call_stages(trunk: nn.Module, names: Sequence[str], x: jax.Array,
                train: bool) -> OrderedDict[str, jax.Array]:
  """What each of some successive stages gives, from what the stage before them gave."""
  maps = OrderedDict()  # jax sorts the keys of a plain dict
  for name in names:
    maps[name] = x = trunk.stage(name, x, train)
  return maps


def call_together(run: Callable[[jax.Array], Any],
                  images: Mapping[str, jax.Array]) -> dict[str, Any]:
  """Runs streams of one shape as one concatenated batch.

  Args:
    run: from images [B, …] to arrays [B, …] of any structure.
    images: by stream, [B_s, …].

  Returns:
    What `run` gives of each stream, [B_s, …].

  >>> images = {"x": jnp.ones((2, 3)), "y": 2 * jnp.ones((1, 3)), "z": jnp.ones((1, 5))}
  >>> {stream: x.tolist() for stream, x in call_together(lambda x: x.sum(axis=1), images).items()}
  {'x': [3.0, 3.0], 'y': [6.0], 'z': [5.0]}
  """
  results = {}
  for shape in dict.fromkeys(x.shape[1:] for x in images.values()):
    group = [stream for stream, x in images.items() if x.shape[1:] == shape]
    together = run(jnp.concatenate([images[stream] for stream in group]))
    ends, start = [], 0
    for stream in group:
      start += images[stream].shape[0]
      ends.append(start)
    leaves, structure = jax.tree.flatten(together)
    parts = zip(*(jnp.split(leaf, ends[:-1]) for leaf in leaves))
    results |= {stream: jax.tree.unflatten(structure, part)
                for stream, part in zip(group, parts)}
  return results


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
