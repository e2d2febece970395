"""Parameters that stand still or learn at a rate of their own, by patterns of their paths."""

from collections.abc import Collection, Iterable, Mapping, Sequence
import fnmatch
import math
from typing import Any, TypeVar

from flax.traverse_util import flatten_dict
import jax

Path = tuple[str, ...]
Leaf = TypeVar("Leaf")


def matches(pattern: str, path: Path) -> bool:
  """Whether a pattern says a parameter's path.

  "trunk" says all that is no head, "heads" all that is; any other pattern is names with "*" and
  "?", joined by "/", and says every path that holds such names one after the other.

  >>> path = ("sharing", "trunk", "layer1_0", "bn1", "scale")
  >>> patterns = ("trunk", "layer1_*", "bn?/scale", "trunk/bn1", "heads")
  >>> [matches(pattern, path) for pattern in patterns]
  [True, True, True, False, False]
  """
  if pattern in ("trunk", "heads"):
    return path[0].startswith("heads_") == (pattern == "heads")
  names = pattern.split("/")
  return any(all(map(fnmatch.fnmatchcase, path[i:], names))
             for i in range(len(path) - len(names) + 1))


def hold(params: Mapping[Path, Leaf], frozen: Sequence[str]) -> dict[Path, Leaf]:
  """The parameters by path, those that a pattern says cut off from every gradient."""
  return {path: jax.lax.stop_gradient(x) if any(matches(pattern, path) for pattern in frozen) else x
          for path, x in params.items()}


def kept(new: Any, old: Any, paths: Collection[Path]) -> Any:
  """A tree as it is now, but what belongs to some parameters as it was.

  Args:
    new: of parameters, or a state in which trees of the parameters' structure lie, as an
      optimizer's.
    old: of the same structure.
    paths: of those parameters.

  >>> kept({"mu": {"a": 1, "b": 2}, "count": 9}, {"mu": {"a": 0, "b": 0}, "count": 8}, [("b",)])
  {'count': 9, 'mu': {'a': 1, 'b': 0}}
  """
  wanted, lengths = set(paths), {len(path) for path in paths}

  def pick(place: Any, now: Any, before: Any) -> Any:
    keys = tuple(key.key for key in place if isinstance(key, jax.tree_util.DictKey))
    return before if any(keys[-length:] in wanted for length in lengths) else now
  return jax.tree_util.tree_map_with_path(pick, new, old)


def factors(params: Any, freeze: Sequence[str] = (),
            learning_rate_scale: Mapping[str, float] | None = None) -> dict[Path, float]:
  """By what the learning rate of each parameter is multiplied, 0 where it stands still.

  >>> factors({"sharing": {"trunk": 1}, "heads_a": {"kernel": 2, "bias": 3}}, ("bias",),
  ...         {"trunk": 0.1})
  {('sharing', 'trunk'): 0.1, ('heads_a', 'kernel'): 1.0, ('heads_a', 'bias'): 0.0}

  Args:
    params: of the model.
    freeze: patterns, see `matches`.
    learning_rate_scale: factor by pattern; where several match, their product.

  Raises:
    ValueError: for a pattern that says no parameter, a factor that is not above 0, and where
      nothing would move.
  """
  scale, paths = learning_rate_scale or {}, list(flatten_dict(params))
  check_patterns("freeze", freeze, paths)
  check_patterns("learning_rate_scale", scale, paths)
  for pattern, factor in scale.items():
    if not 0 < factor < math.inf:
      raise ValueError(f"learning_rate_scale.{pattern}: expected a number > 0, found {factor}; "
                       f"freeze={pattern} keeps parameters where they are")
  result = {path: 0.0 if any(matches(pattern, path) for pattern in freeze)
            else math.prod(f for pattern, f in scale.items() if matches(pattern, path)) * 1.0
            for path in paths}
  if not any(result.values()):
    raise ValueError(f"freeze: expected parameters that still move, found that {', '.join(freeze)} "
                     "say them all")
  return result


def check_patterns(where: str, patterns: Iterable[str], paths: Sequence[Path]) -> None:
  """Raises ValueError for a pattern that says none of the paths."""
  for pattern in patterns:
    if not any(matches(pattern, path) for path in paths):
      tops = dict.fromkeys("/".join(path[:2]) for path in paths)
      raise ValueError(f"{where}: expected trunk, heads or names on the path of a parameter, such "
                       f"as {', '.join(list(tops)[:3])}; found {pattern!r}, which says none")
