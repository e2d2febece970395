"""Config sections: `name` plus the keyword arguments of the factory of that name.

The factory's signature is the one home of the defaults. A section is completed from it, so that a
run folder records every value, and whatever does not fit is an error that names the nearest fit.
"""

from collections.abc import Callable, Mapping, Sequence
import difflib
import inspect
import math
import types
import typing
from typing import Any

from mtl_jax.errors import UserError

_NOT_ARGUMENTS = ("self", "parent", "name")  # linen's own fields among them


def nearest(found: str, known: Sequence[str]) -> str:
  """The known names closest to what was found, in words."""
  if not known:
    return "it takes none"
  close = difflib.get_close_matches(found, known, n=3, cutoff=0.5)
  hint = f"; did you mean {' or '.join(close)}?" if close else ""
  return f"expected one of {', '.join(known)}{hint}"


def complete(where: str, section: Mapping[str, Any], table: Mapping[str, Callable[..., Any]],
             given: Sequence[str] = (), also: Sequence[str] = ()) -> dict[str, Any]:
  """A section with all its arguments, checked against the factory that it names.

  Args:
    where: the section's place, such as "config.balancer", for messages.
    section: with "name" and arguments.
    table: factories by name.
    given: arguments that the program provides, never the config.
    also: fields that the section may hold besides the factory's arguments; kept as they are.

  Raises:
    UserError: for a missing or unknown name, an unknown argument or a value of the wrong type.
  """
  if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
    raise UserError(f"{where}: expected a section with a name, {nearest('', list(table))}; "
                    f"found {section!r}")
  name = section["name"]
  if name not in table:
    raise UserError(f"{where}.name: {nearest(name, list(table))}; found {name!r}")
  arguments = {key: value for key, value in section.items() if key not in ("name", *also)}
  kept = {key: section[key] for key in also if key in section}
  return {"name": name, **arguments_of(where, table[name], arguments, given, also), **kept}


def word_or_section(where: str, found: str | Mapping[str, Any],
                    table: Mapping[str, Callable[..., Any]]) -> str | dict[str, Any]:
  """A completed section from a word or a section; a word where its factory takes no argument.

  >>> word_or_section("config.x", "dict", {"dict": lambda size=3: size, "none": lambda: None})
  {'name': 'dict', 'size': 3}
  >>> word_or_section("config.x", {"name": "none"}, {"none": lambda: None})
  'none'
  """
  section = complete(where, {"name": found} if isinstance(found, str) else found, table)
  return section if len(section) > 1 else section["name"]


def arguments_of(where: str, factory: Callable[..., Any], found: Mapping[str, Any],
                 given: Sequence[str] = (), also: Sequence[str] = ()) -> dict[str, Any]:
  """All arguments of a factory: those found, coerced to their types, and the defaults.

  An argument without a default that was not found is None.
  """
  parameters = {name: parameter for name, parameter in inspect.signature(factory).parameters.items()
                if name not in _NOT_ARGUMENTS and name not in given
                and parameter.kind is not inspect.Parameter.VAR_KEYWORD}
  target = factory.__init__ if inspect.isclass(factory) else factory
  try:
    hints = typing.get_type_hints(target)
  except (NameError, TypeError):
    hints = {}
  for name in found:
    if name not in parameters:
      raise UserError(f"{where}.{name}: no such field; "
                      f"{nearest(name, sorted([*parameters, *also]))}")
  result = {}
  for name, parameter in parameters.items():
    if name in found:
      result[name] = coerce(f"{where}.{name}", found[name], hints.get(name, Any))
    elif parameter.default is inspect.Parameter.empty:
      result[name] = None
    elif _is_plain(parameter.default):
      result[name] = parameter.default
  return result


def _is_plain(value: Any) -> bool:
  if isinstance(value, (tuple, list)):
    return all(_is_plain(x) for x in value)
  return value is None or isinstance(value, (bool, int, float, str))


def coerce(where: str, value: Any, hint: Any) -> Any:
  """The value as the type that an annotation asks for.

  Whole floats become integers where those are wanted, integers floats, lists tuples, and
  comma-separated words tuples of words.

  >>> coerce("config.train.steps", 1e3, int), coerce("config.data.augmentation", "crop,flip",
  ...                                                tuple[str, ...])
  (1000, ('crop', 'flip'))

  Raises:
    UserError: where it does not fit.
  """
  fitted, ok = _fit(value, hint)
  if not ok:
    raise UserError(f"{where}: expected {_words(hint)}, found {value!r}")
  return fitted


def _fit(value: Any, hint: Any) -> tuple[Any, bool]:
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    exact = [option for option in args if isinstance(option, type) and type(value) is option]
    fits = (_fit(value, option) for option in (*exact, *args))
    return next((fit for fit in fits if fit[1]), (value, False))
  if origin is not None and issubclass(origin, Sequence):
    items = value.split(",") if isinstance(value, str) and args[:1] == (str,) else value
    if isinstance(items, (int, float)) and not isinstance(items, bool):
      items = (items,)
    if isinstance(items, str) or not isinstance(items, Sequence):
      return value, False
    fits = [_fit(item, args[0]) for item in items]
    return tuple(fit for fit, _ in fits), all(ok for _, ok in fits)
  if origin is not None and issubclass(origin, Mapping):
    return value, isinstance(value, Mapping)
  if hint in (None, type(None)):
    return value, value is None
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if hint is int:
    whole = is_number and math.isfinite(value) and float(value).is_integer()
    return (int(value), True) if whole else (value, False)
  if hint is float:
    fits = is_number and math.isfinite(value)
    return (float(value), True) if fits else (value, False)
  if hint in (str, bool):
    return value, isinstance(value, hint)
  return value, True


def _words(hint: Any) -> str:
  names = {int: "a whole number", float: "a number", str: "a word", bool: "true or false",
           type(None): "None"}
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    return " or ".join(dict.fromkeys(_words(option) for option in typing.get_args(hint)))
  origin = typing.get_origin(hint)
  if origin is not None and issubclass(origin, Mapping):
    return "a section"
  if origin is not None and issubclass(origin, Sequence):
    return f"{_words(typing.get_args(hint)[0]).removeprefix('a ')}s, separated by commas"
  return names.get(hint) or f"a value like {getattr(hint, '__name__', hint)}"


def check_given(where: str, section: Mapping[str, Any],
                table: Mapping[str, Callable[..., Any]]) -> None:
  """Raises UserError where a completed section lacks what its factory has no default for."""
  for name, parameter in inspect.signature(table[section["name"]]).parameters.items():
    if parameter.default is inspect.Parameter.empty and section.get(name, ...) is None:
      raise UserError(f"{where}.{name}: expected a value, found none")


def check_sizes(where: str, arguments: Mapping[str, Any]) -> None:
  """Raises UserError where an integer, alone or in a tuple, is not a size: at least 1."""
  for name, value in arguments.items():
    for item in value if isinstance(value, tuple) else (value,):
      if type(item) is int and item < 1:
        raise UserError(f"{where}.{name}: expected a size of at least 1, found {value!r}")


def make(where: str, section: Mapping[str, Any], table: Mapping[str, Callable[..., Any]],
         **given: Any) -> Any:
  """Calls the factory of a completed section; its ValueError becomes a UserError."""
  arguments = {key: value for key, value in section.items() if key != "name"}
  try:
    return table[section["name"]](**arguments, **given)
  except ValueError as error:
    raise UserError(f"{where}: {error}") from error
  except TypeError as error:
    reason = str(error).splitlines()[0]
    raise UserError(f"{where}: expected arguments that {section['name']} takes, found: {reason}"
                    ) from error
