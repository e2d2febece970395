"""Config files, and the command-line overrides of their fields."""

import ast
from collections.abc import Iterator, Sequence
import contextlib
import importlib.util
import inspect
import pathlib
import traceback
from typing import Any

from ml_collections import ConfigDict

from mtl_jax import balancing
from mtl_jax.errors import UserError
from mtl_jax.experiment import sections
from mtl_jax.experiment.fields import SECTIONS, UNITS
from mtl_jax.models import HEADS, SHARINGS, TRUNKS
from mtl_jax.training.optimizer import OPTIMIZERS, SCHEDULES


def load(flag: str, overrides: Sequence[str] = ()) -> ConfigDict:
  """Reads `path.py[:arg]` and applies `--config.a.b=v` overrides.

  Raises:
    UserError: for a file that is missing, empty or broken, and for an override that no section
      could hold.
  """
  path, _, argument = flag.partition(":")
  config = _get_config(pathlib.Path(path))(argument)
  if not isinstance(config, ConfigDict):
    raise UserError(f"{path}: expected get_config to return a ConfigDict, "
                    f"found {type(config).__name__}")
  config = ConfigDict(config.to_dict())
  parsed = [_parse(text) for text in overrides]
  for fields, value in parsed:
    _clear_other_units(config, fields, [other for other, _ in parsed])
    _clear_other_arguments(config, fields, value)
  for fields, value in parsed:
    _set(config, fields, value)
  return config


def _get_config(path: pathlib.Path):
  if not path.is_file():
    raise UserError(f"--config: expected a Python file with get_config(arg), found no file {path}")
  spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path.resolve())
  if spec is None:
    raise UserError(f"--config: expected a Python file with get_config(arg), found {path}")
  module = importlib.util.module_from_spec(spec)
  with _one_line(path):
    spec.loader.exec_module(module)
  if not callable(getattr(module, "get_config", None)):
    raise UserError(f"{path}: expected a function get_config(arg), found none")

  def get_config(argument: str) -> Any:
    with _one_line(path):
      try:
        return module.get_config(argument)
      except ValueError as error:
        raise UserError(f"{path}:{argument}: {error}") from error
  return get_config


@contextlib.contextmanager
def _one_line(path: pathlib.Path) -> Iterator[None]:
  """Tells in one line whatever a user's file may raise."""
  try:
    yield
  except UserError:
    raise
  except (Exception, SystemExit) as error:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename == str(path.resolve())]
    line = frames[-1].lineno if frames else getattr(error, "lineno", None)
    where = f"{path}, line {line}" if line else f"{path}"
    raise UserError(f"{where}: {type(error).__name__}: {error}") from error


def _parse(text: str) -> tuple[tuple[str, ...], str]:
  """Splits "--config.a.b=v" into its fields and its text."""
  name, equals, value = text.removeprefix("--config.").partition("=")
  fields = tuple(name.split("."))
  if not equals or not all(fields):
    raise UserError(f"{text}: expected --config.<field>=<value>")
  if fields[0] not in SECTIONS:
    raise UserError(f"config.{fields[0]}: no such field; {sections.nearest(fields[0], SECTIONS)}")
  return fields, value


def _clear_other_units(config: ConfigDict, fields: tuple[str, ...],
                       overridden: Sequence[tuple[str, ...]]) -> None:
  """A duration given on the command line takes the place of the file's, whatever its unit."""
  *parents, last = fields
  unit = next((unit for unit in UNITS if last.endswith(unit)), None)
  section = config
  for parent in parents:
    section = section.get(parent) if isinstance(section, ConfigDict) else None
  if unit is None or not isinstance(section, ConfigDict):
    return
  for other in UNITS:
    sibling = last.removesuffix(unit) + other
    if sibling in section and (*parents, sibling) not in overridden:
      del section[sibling]


def _clear_other_arguments(config: ConfigDict, fields: tuple[str, ...], name: str) -> None:
  """Another name on the command line drops the file's arguments that only the old one takes."""
  tables = {"trunk": TRUNKS, "sharing": SHARINGS, "balancer": balancing.METHODS,
            "optimizer": OPTIMIZERS, "schedule": SCHEDULES, "head": HEADS}
  table = tables.get(fields[-2]) if len(fields) > 1 and fields[-1] == "name" else None
  section = config
  for parent in fields[:-1]:
    section = section.get(parent) if isinstance(section, ConfigDict) else None
  if table is None or name not in table or not isinstance(section, ConfigDict):
    return
  if section.get("name") in table:
    old, new = (inspect.signature(table[key]).parameters for key in (section.name, name))
    for argument in set(old) - set(new):
      if argument in section:
        del section[argument]


def _set(config: ConfigDict, fields: tuple[str, ...], text: str) -> None:
  section = config
  for depth, field in enumerate(fields[:-1]):
    if field not in section:
      section[field] = ConfigDict()
    section = section[field]
    if not isinstance(section, ConfigDict):
      raise UserError(f"config.{'.'.join(fields)}: config.{'.'.join(fields[:depth + 1])} is a "
                      f"value, not a section; found {section!r}")
  old = section.get(fields[-1])
  if isinstance(old, ConfigDict):
    raise UserError(f"config.{'.'.join(fields)}: expected one of its fields, "
                    f"{', '.join(old)}; found {text!r} for the whole section")
  with section.ignore_type():
    section[fields[-1]] = text if isinstance(old, str) else _literal(text)


def _literal(text: str) -> Any:
  """The Python value that a text spells, or the text itself.

  >>> [_literal(x) for x in ("1e-3", "true", "None", "0.9,0.99", "adam")]
  [0.001, True, None, (0.9, 0.99), 'adam']
  """
  if text.lower() in ("true", "false", "none"):
    text = text.capitalize()
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text
