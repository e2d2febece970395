"""From `config.tasks` to tasks: what the config leaves open is read from the data."""

from collections.abc import Mapping, Sequence
import inspect
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from mtl_jax.data.source import Examples, Label, Source, column
from mtl_jax.errors import UserError
from mtl_jax.experiment import sections
from mtl_jax.experiment.experiment import Experiment
from mtl_jax.tasks import KINDS, Task

LABEL_KINDS = {
    "classification": ("class",),
    "multilabel": ("binary",),
    "regression": ("number",),
    "boxes": ("box",),
    "detection": ("objects",),
    "segmentation": ("mask",),
    "depth": ("map",),
    "normals": ("normals",),
    "reconstruction": ("image", "map"),
    "identity": ("class",),
}


def label_of(source: Source, name: str) -> Label | None:
  """What the label of that name is; the image itself is one, too."""
  return Label("image") if name == "image" else source.labels.get(name)


def task_of(name: str, section: ConfigDict, source: Source) -> Task:
  """The task of a completed section.

  Raises:
    UserError: where the source has no such label, or the task cannot be learned from it.
  """
  where = f"config.tasks.{name}"
  arguments = {key: value for key, value in section.to_dict().items() if key != "head"}
  kind = arguments.pop("name")
  label = label_of(source, arguments["label"])
  if label is None:
    raise UserError(f"{where}.label: {sections.nearest(arguments['label'], sorted(source.labels))}; "
                    f"stream {section.stream!r} has no {arguments['label']!r}")
  if label.kind not in LABEL_KINDS[kind]:
    fitting = [other for other, kinds in LABEL_KINDS.items() if label.kind in kinds]
    raise UserError(f"{where}: expected a label of kind {' or '.join(LABEL_KINDS[kind])} for "
                    f"{kind}, found {arguments['label']!r} of kind {label.kind}; what learns it: "
                    f"{', '.join(fitting)}")
  wanted = {argument for argument in inspect.signature(KINDS[kind]).parameters
            if arguments.get(argument) in (None, ())}
  arguments |= facts(wanted, label, arguments["label"], source.splits["train"])
  try:
    return KINDS[kind](name, **arguments)
  except ValueError as error:
    raise UserError(f"config.tasks.{error}") from error


def facts(wanted: set[str], label: Label, name: str, train: Examples) -> dict[str, Any]:
  """What the data says of a label, of those arguments that are wanted.

  Args:
    wanted: names among num_classes, num_labels, size, num_channels, names, mean, std; others are
      left out.
    label: what the label is.
    name: of the label.
    train: the training examples; only they are read.
  """
  shape = np.shape(train[0][name])
  known = {"num_classes": label.num_classes, "names": tuple(label.names) or None}
  if label.kind == "binary":
    known["num_labels"] = shape[0]
  if label.kind == "number":
    known["size"] = shape[0] if shape else 1
  if label.kind in ("image", "map"):
    known["num_channels"] = shape[2] if len(shape) == 3 else 1
  if label.kind == "number" and wanted & {"mean", "std"}:
    values = column(train, name).astype(np.float64).reshape(len(train), -1)
    if np.isfinite(values).any(axis=0).all():
      std = np.nanstd(values, axis=0)
      known |= {"mean": tuple(np.nanmean(values, axis=0).tolist()),
                "std": tuple(np.where(std > 0, std, 1).tolist())}
  return {key: value for key, value in known.items() if key in wanted and value is not None}


def alike(experiments: Sequence[Experiment]) -> bool:
  """Whether one program serves experiments that differ in their seed alone.

  It does unless a task takes the mean and deviation of its labels from train, which is each seed's
  own. Whatever else differs is given to programs: state, data, the statistics of images.
  """
  first, *rest = (_scales(one.config.tasks, one.sources) for one in experiments)
  return all(one == first for one in rest)


def _scales(tasks: Mapping[str, ConfigDict],
            sources: Mapping[str, Source]) -> dict[str, dict[str, Any]]:
  """Mean and deviation of the labels of each task that reads them from train."""
  result = {}
  for name, section in tasks.items():
    source = sources[section.stream]
    wanted = {key for key in ("mean", "std") if section.get(key, ...) is None}
    if wanted:
      label = label_of(source, section.label)
      result[name] = facts(wanted, label, section.label, source.splits["train"])
  return result


def num_labelled(task: Task, examples: Examples) -> int:
  """How many examples carry a label of the task."""
  if task.label == "image":
    return len(examples)
  values = column(examples, task.label)
  there = ~np.isnan(values) if values.dtype.kind == "f" else values >= 0
  parts = there.reshape(len(values), -1)
  return int((parts.any(axis=1) if task.partial else parts.all(axis=1)).sum())


def head_arguments(task: Task, head: type, source: Source) -> Mapping[str, Any]:
  """What a head must be given besides its section: how many outputs, and of which size."""
  given = {"num_outputs": task.num_outputs}
  if "size" in inspect.signature(head).parameters:
    given["size"] = np.shape(source.splits["train"][0]["image"])[:2]
  return given
