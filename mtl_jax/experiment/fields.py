"""A config with every field at its value, and what does not fit the others."""

from collections.abc import Mapping
import math
from typing import Any

from ml_collections import ConfigDict

from mtl_jax import balancing
from mtl_jax.data import sources
from mtl_jax.errors import UserError
from mtl_jax.experiment import sections
from mtl_jax.experiment.plain_sections import DataSection, InitFromSection, TrainSection
from mtl_jax.models import HEADS, SHARINGS, TRUNKS
from mtl_jax.tasks import KINDS
from mtl_jax.training.engines import ENGINES
from mtl_jax.training.optimizer import MASKS, OPTIMIZERS, SCHEDULES, optimizer
from mtl_jax.training.penalties import PENALTIES
from mtl_jax.training.precision import PRECISIONS
from mtl_jax.training.schedules import SCHEDULES as TASK_SCHEDULES
from mtl_jax.training.task_weights import RULES

SECTIONS = ("seed", "seeds", "data", "tasks", "task_weights", "trunk", "sharing", "balancer",
            "optimizer", "penalties", "schedule", "train", "init_from")

UNITS = ("steps", "epochs", "examples")


def complete(config: ConfigDict) -> ConfigDict:
  """The config with every field that its factories take, all checked.

  Raises:
    UserError: for what is missing, unknown or of the wrong type.
  """
  found = config.to_dict()
  for field in found:
    if field not in SECTIONS:
      raise UserError(f"config.{field}: no such field; {sections.nearest(field, SECTIONS)}")
  for field in ("data", "tasks", "trunk", "optimizer", "train"):
    if not isinstance(found.get(field), Mapping) or not found[field]:
      raise UserError(f"config.{field}: expected a section, found {found.get(field)!r}")
  result = {
      "seed": sections.coerce("config.seed", found.get("seed", 0), int),
      "seeds": sections.coerce("config.seeds", found.get("seeds", 1), int),
      "data": _data(found["data"]),
      "trunk": sections.complete("config.trunk", found["trunk"], TRUNKS),
      "sharing": sections.complete("config.sharing", found.get("sharing", {"name": "hard"}),
                                   SHARINGS, given=("trunk", "tasks")),
      "balancer": _balancer(found.get("balancer", {"name": "equal"}), found["tasks"]),
      "optimizer": _optimizer(found["optimizer"]),
      "penalties": _penalties(found.get("penalties", {})),
      "schedule": sections.complete("config.schedule", found.get("schedule", {"name": "joint"}),
                                    TASK_SCHEDULES, given=("tasks", "streams", "sizes")),
      "train": sections.arguments_of("config.train", TrainSection, found["train"]),
  }
  result["tasks"] = {name: _task(name, task, result["data"]["streams"])
                     for name, task in found["tasks"].items()}
  result["task_weights"] = _task_weights(found.get("task_weights"), found["tasks"])
  result["init_from"] = _init_from(found.get("init_from"), found["tasks"])
  sections.check_sizes("config.trunk", result["trunk"])
  sections.check_sizes("config.train", result["train"])
  result["train"]["gradients"] = sections.word_or_section(
      "config.train.gradients", result["train"]["gradients"], ENGINES)
  precision = result["train"]["precision"]
  if precision not in PRECISIONS:
    raise UserError(f"config.train.precision: {sections.nearest(precision, PRECISIONS)}; "
                    f"found {precision!r}")
  sections.check_sizes("config", {"seeds": result["seeds"]})
  if not 0 <= result["seed"] <= 2 ** 32 - result["seeds"]:
    raise UserError(f"config.seed: expected 0 … 2**32 - {result['seeds']}, found {result['seed']}")
  if result["seeds"] > 1 and result["data"]["folds"] and result["data"]["fold"] is None:
    raise UserError(f"config.seeds: expected 1 with all folds in turn, found {result['seeds']}; "
                    "set config.data.fold to train several seeds on one fold")
  for prefix in ("", "evaluate_every_"):
    _check_one_unit("config.train", result["train"], prefix, needed=not prefix)
  return ConfigDict(result)


def _data(found: Mapping[str, Any]) -> dict[str, Any]:
  data = sections.arguments_of("config.data", DataSection, found)
  sections.check_sizes("config.data", {key: data[key] for key in data if key != "fold"})
  _check_folds(data["folds"], data["fold"])
  for field, known in (("missing", ("auto", "error", "sample")),
                       ("engine", ("auto", "resident", "grain"))):
    if data[field] not in known:
      raise UserError(f"config.data.{field}: {sections.nearest(data[field], known)}; "
                      f"found {data[field]!r}")
  if not 0 < data["validation"] < 1:
    raise UserError(f"config.data.validation: expected a fraction between 0 and 1, "
                    f"found {data['validation']!r}")
  if not 0 <= data["drop_labels"] < 1:
    raise UserError(f"config.data.drop_labels: expected a fraction from 0 on and below 1, "
                    f"found {data['drop_labels']!r}")
  if not data["streams"]:
    raise UserError("config.data.streams: expected at least one stream, found none")
  data["streams"] = {
      stream: sections.complete(f"config.data.streams.{stream}", section, sources.SOURCES,
                                given=("dir", "download"), also=("augmentation",))
      for stream, section in data["streams"].items()}
  for stream, section in data["streams"].items():
    sections.check_given(f"config.data.streams.{stream}", section, sources.SOURCES)
    if "augmentation" in section:
      section["augmentation"] = sections.coerce(f"config.data.streams.{stream}.augmentation",
                                                section["augmentation"], tuple[str, ...])
  return data


def _check_folds(folds: int | None, fold: int | None) -> None:
  if folds == 1:
    raise UserError("config.data.folds: expected at least 2, found 1")
  if fold is not None and not (folds and 0 <= fold < folds):
    raise UserError(f"config.data.fold: expected one of 0 … config.data.folds - 1, found {fold} of "
                    f"{folds}")


def _task_weights(found: Any, tasks: Mapping[str, Any]) -> dict[str, Any] | None:
  where = "config.task_weights"
  if found is None:
    return None
  if not isinstance(found, Mapping):
    raise UserError(f"{where}: expected one weight for each of {', '.join(tasks)}, or a section "
                    f"with a name, {sections.nearest('', list(RULES))}; found {found!r}")
  if "name" in found:
    return sections.complete(where, found, RULES)
  weights = dict(zip(tasks, _as_tuples("config", {"task_weights": found}, tasks)["task_weights"]))
  for task, weight in weights.items():
    weights[task] = sections.coerce(f"{where}.{task}", weight, float)
    if not weights[task] > 0:
      raise UserError(f"{where}.{task}: expected a number > 0, found {weight!r}")
  return weights


def _optimizer(found: Mapping[str, Any]) -> dict[str, Any]:
  where = "config.optimizer"
  ours = sections.arguments_of(where, optimizer, {}, given=("learning_rate",))
  completed = sections.complete(where, found, OPTIMIZERS, given=("learning_rate", *MASKS),
                                also=("learning_rate", "schedule", *ours))
  completed |= sections.arguments_of(where, optimizer,
                                     {key: found[key] for key in ours if key in found})
  completed["learning_rate"] = sections.coerce(f"{where}.learning_rate",
                                               found.get("learning_rate"), float | None)
  if completed["learning_rate"] is None or not completed["learning_rate"] > 0:
    raise UserError(f"{where}.learning_rate: expected a number > 0, "
                    f"found {completed['learning_rate']!r}")
  schedule = found.get("schedule") or {"name": "constant"}
  warmups = [f"warmup_{unit}" for unit in UNITS]
  schedule = sections.complete(f"{where}.schedule", schedule, SCHEDULES,
                               given=("learning_rate", "num_steps", "warmup"), also=warmups)
  for name in warmups:
    schedule[name] = sections.coerce(f"{where}.schedule.{name}", schedule.get(name), float | None)
  _check_one_unit(f"{where}.schedule", schedule, "warmup_", needed=False)
  return {**completed, "schedule": schedule}


def _penalties(found: Any) -> dict[str, float]:
  if not isinstance(found, Mapping):
    raise UserError(f"config.penalties: expected fields {', '.join(PENALTIES)}, found {found!r}")
  for name, strength in found.items():
    if name not in PENALTIES:
      raise UserError(f"config.penalties.{name}: no such field; "
                      f"{sections.nearest(name, list(PENALTIES))}")
    if not sections.coerce(f"config.penalties.{name}", strength, float) >= 0:
      raise UserError(f"config.penalties.{name}: expected a number >= 0, found {strength!r}")
  return {name: float(strength) for name, strength in found.items()}


def _init_from(found: Any, tasks: Mapping[str, Any]) -> dict[str, Any] | None:
  where = "config.init_from"
  if found is None:
    return None
  if not isinstance(found, Mapping) or not found.get("path"):
    raise UserError(f"{where}: expected a section with a path, found {found!r}")
  section = sections.arguments_of(where, InitFromSection, found)
  if section["part"] not in ("trunk", "all"):
    raise UserError(f"{where}.part: {sections.nearest(section['part'], ('trunk', 'all'))}; "
                    f"found {section['part']!r}")
  for task in section["except_heads"]:
    if task not in tasks or section["part"] == "trunk":
      known = sections.nearest(task, list(tasks)) + ", with part=all"
      raise UserError(f"{where}.except_heads: {known}; found {task!r}, with "
                      f"part={section['part']}")
  section["learning_rate_scale"] = {
      pattern: sections.coerce(f"{where}.learning_rate_scale.{pattern}", factor, float)
      for pattern, factor in (section["learning_rate_scale"] or {}).items()}
  return section


def _task(name: str, found: Mapping[str, Any], streams: Mapping[str, Any]) -> dict[str, Any]:
  where = f"config.tasks.{name}"
  task = sections.complete(where, found, KINDS, also=("head",))
  task.pop("head", None)
  task["stream"] = task["stream"] or name
  if task["stream"] not in streams:
    raise UserError(f"{where}.stream: {sections.nearest(task['stream'], list(streams))}; "
                    f"found {task['stream']!r}")
  if not found.get("head"):
    raise UserError(f"{where}.head: expected a head such as {{'name': 'linear'}}, found none")
  task["head"] = sections.complete(f"{where}.head", found["head"], HEADS,
                                   given=("num_outputs", "size"))
  sections.check_sizes(f"{where}.head", task["head"])
  return task


def _balancer(found: Any, tasks: Mapping[str, Any]) -> dict[str, Any]:
  where = "config.balancer"
  as_tuples = _as_tuples(where, found, tasks)
  name = found.get("name") if isinstance(found, Mapping) else None
  wrappers = balancing.wrapper_fields(name) if name in balancing.METHODS else ()
  completed = sections.complete(where, as_tuples, balancing.METHODS, also=wrappers)
  options = sections.arguments_of(where, balancing.wrappers.Options,
                                  {key: found[key] for key in wrappers if key in found})
  by_task = {key: dict(zip(tasks, completed[key])) for key, value in found.items()
             if isinstance(value, Mapping)}
  return {**completed, **by_task, **{key: options[key] for key in wrappers}}


def _as_tuples(where: str, section: Any, tasks: Mapping[str, Any]) -> Any:
  """A section with every `{task: value}` among its arguments as a tuple in the tasks' order."""
  if not isinstance(section, Mapping):
    return section
  result = dict(section)
  for name, value in section.items():
    if isinstance(value, Mapping):
      if set(value) != set(tasks):
        raise UserError(f"{where}.{name}: expected one value for each of {', '.join(tasks)}; "
                        f"found {', '.join(value) or 'none'}")
      result[name] = tuple(value[task] for task in tasks)
  return result


def _check_one_unit(where: str, section: Mapping[str, Any], prefix: str, needed: bool) -> None:
  present = [prefix + unit for unit in UNITS if section.get(prefix + unit) is not None]
  names = ", ".join(prefix + unit for unit in UNITS)
  if len(present) > 1 or (needed and not present):
    raise UserError(f"{where}: expected exactly one of {names}; "
                    f"found {' and '.join(present) or 'none'}")
  for name in present:
    may_be_zero = prefix == "warmup_"
    if section[name] < 0 or (section[name] == 0 and not may_be_zero):
      raise UserError(f"{where}.{name}: expected a number {'>=' if may_be_zero else '>'} 0, "
                      f"found {section[name]!r}")


def duration_steps(section: Mapping[str, Any], prefix: str, *, batch_size: int,
                   steps_per_epoch: int, default: int) -> int:
  """A duration in optimizer steps, from whichever unit it is given in; at least 1.

  >>> duration_steps({"epochs": 2.5}, "", batch_size=4, steps_per_epoch=10, default=0)
  25
  >>> duration_steps({"examples": 9}, "", batch_size=4, steps_per_epoch=10, default=0)
  3
  """
  in_steps = {"steps": round, "epochs": lambda value: round(value * steps_per_epoch),
              "examples": lambda value: math.ceil(value / batch_size)}
  for unit, convert in in_steps.items():
    value = section.get(prefix + unit)
    if value is not None:
      return max(convert(value), 1 if value else 0)
  return default
