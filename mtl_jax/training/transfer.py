"""Found variables in place of a fresh model's, and an account of what fitted."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mtl_jax.training.parameter_groups import Path, check_patterns, matches

TRUNK = ("sharing", "trunk")  # where the only trunk of a model is


class Account(NamedTuple):
  """What became of the variables, each by (collection, module, …, leaf).

  Attributes:
    matched: of the model, taken from what was found.
    unused: found, of no use to the model or not asked for.
    random: of the model, as fresh as before.
  """

  matched: tuple[Path, ...]
  unused: tuple[Path, ...]
  random: tuple[Path, ...]


def merge(fresh: Mapping[Path, Any], found: Mapping[Path, Any], *, skip: Sequence[str] = ()
          ) -> tuple[dict[Path, Any], Account]:
  """The fresh variables with those found in their places.

  A variable is taken where its path is the same. Where the model has the trunk under other names
  than "sharing/trunk", or several of them, as one a task, each is given the found one.

  >>> trunk = {("params", "sharing", "trunk", "kernel"): np.ones(2)}
  >>> fresh = {("params", "sharing", "trunks_a", "kernel"): np.zeros(2),
  ...          ("params", "heads_a", "kernel"): np.zeros(3)}
  >>> merged, account = merge(fresh, trunk)
  >>> [x.tolist() for x in merged.values()], account.random
  ([[1.0, 1.0], [0.0, 0.0, 0.0]], (('params', 'heads_a', 'kernel'),))

  Args:
    fresh: arrays, or their shapes, by (collection, module, …, leaf).
    found: arrays, likewise.
    skip: patterns (see `parameter_groups.matches`) of what stays fresh.

  Returns:
    Arrays of the fresh ones' dtypes in place of what matched, all else as it was; and the account.

  Raises:
    ValueError: where nothing matches, where shapes differ or numbers are not floating-point, where
      a module (a trunk, a head) is found in part, and for a pattern that says nothing.
  """
  check_patterns("skip", skip, [path[1:] for path in fresh])
  kept = {path for path in fresh if any(matches(pattern, path[1:]) for pattern in skip)}
  sources = {path: source for path, source in _sources(fresh, found, kept).items()
             if path not in kept}
  if not sources:
    wanted = [path for path in fresh if path not in kept]
    raise ValueError(f"expected variables of this model, such as {some(wanted)}; found "
                     f"{some(found)}, none of which fits\nis config.trunk what these were "
                     "trained with?")
  _check_whole(fresh, sources, kept)
  for path, source in sources.items():
    if not jnp.issubdtype(found[source].dtype, jnp.floating):
      raise ValueError(f"{'/'.join(path[1:])}: expected floating-point numbers, found "
                       f"{found[source].dtype}\n{_advice(path)}")
    if tuple(found[source].shape) != tuple(fresh[path].shape):
      raise ValueError(f"{'/'.join(path[1:])}: expected shape {list(fresh[path].shape)} as the "
                       f"config says, found {list(found[source].shape)}\n{_advice(path)}")
  merged = {path: np.asarray(found[sources[path]]).astype(x.dtype) if path in sources else x
            for path, x in fresh.items()}
  used = set(sources.values())
  return merged, Account(tuple(sources), tuple(path for path in found if path not in used),
                         tuple(path for path in fresh if path not in sources))


def module_of(path: Path) -> Path:
  """The trunk, head or other child of the model to which a variable belongs.

  >>> module_of(("params", "sharing", "trunk", "kernel")), module_of(("params", "heads_a", "bias"))
  (('sharing', 'trunk'), ('heads_a',))
  """
  return path[1:3] if path[1] == "sharing" else path[1:2]


def _sources(fresh: Mapping[Path, Any], found: Mapping[Path, Any],
             kept: set[Path]) -> dict[Path, Path]:
  """Where what each path of the model takes is found."""
  result = {path: path for path in fresh if path in found}
  modules = dict.fromkeys(module_of(path) for path in fresh if path[1] == "sharing")
  there = set(map(module_of, found))
  for module in (module for module in modules if module not in there):
    copies = {path: (path[0], *TRUNK, *path[3:]) for path in fresh if module_of(path) == module}
    if all(source in found for path, source in copies.items() if path not in kept):
      result |= {path: source for path, source in copies.items() if source in found}
  return result


def _check_whole(fresh: Mapping[Path, Any], sources: Mapping[Path, Path], kept: set[Path]) -> None:
  for module in dict.fromkeys(map(module_of, sources)):
    lacks = [path for path in fresh
             if module_of(path) == module and path not in sources and path not in kept]
    if lacks:
      raise ValueError(f"{'/'.join(module)}: expected all of its variables, found none for "
                       f"{some(lacks)}\n{_advice(lacks[0])}")


def _advice(path: Path) -> str:
  """What to do where a variable does not fit."""
  if path[1] == "sharing":
    return ("set config.trunk to what the weights were trained with, or leave it fresh with "
            f"config.init_from.skip={'/'.join(path[1:-1])}")
  task = path[1].removeprefix("heads_")
  return f"leave this head fresh with config.init_from.except_heads={task}"


def some(paths: Collection[Path]) -> str:
  """The first names, without their collections, and how many more there are.

  >>> some([("params", "bias"), ("params", "dense", "kernel")])
  'bias, dense/kernel'
  """
  names = ["/".join(path[1:]) for path in paths]
  return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
