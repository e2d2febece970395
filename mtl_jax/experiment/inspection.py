"""What a model is made of: parameters and operations by part, and which task reads which part."""

from collections.abc import Callable, Mapping, Sequence
import os
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
from flax.traverse_util import flatten_dict
import jax

from mtl_jax.experiment.console import Console
from mtl_jax.experiment.experiment import Experiment
from mtl_jax.experiment.run_folder import writing
from mtl_jax.models import MultiTaskModel
from mtl_jax.models.calling import reads_maps


class Part(NamedTuple):
  """A row of the table.

  Attributes:
    name: in words.
    parameters: how many numbers are learned.
    flops: operations of a forward pass on one image of each stream that is read, as XLA counts
      them before it optimizes; None where they cannot be told apart from others.
  """

  name: str
  parameters: int
  flops: float | None


def inspect(experiment: Experiment, workdir: str | os.PathLike[str]) -> None:
  """Prints the table of the model's parts, and writes the map of tasks as `tasks.mmd` (Mermaid).

  Raises:
    UserError: for a folder that cannot be written.
  """
  model = experiment.model
  batch = {stream: {"image": jax.ShapeDtypeStruct((1, *shape), "float32")}
           for stream, shape in experiment.shapes.items()}
  variables = jax.eval_shape(lambda batch: model.init(jax.random.key(0), batch), batch)
  console = Console()
  console.data_banner(experiment.data)
  console.parts(parts_of(model, variables, batch))
  path = pathlib.Path(workdir).expanduser().resolve() / "tasks.mmd"
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(task_map(model, variables["params"], experiment.shapes), encoding="utf-8")
  console.say(f"which task reads what: {path}")


def parts_of(model: MultiTaskModel, variables: Any, batch: Any) -> list[Part]:
  """The rows of the table: what tasks share, what each owns, the whole, and each task alone.

  Args:
    model: the model.
    variables: of the model, or their shapes.
    batch: `{stream: {"image": [1, …]}}`, or their shapes.
  """
  sizes = {path: x.size for path, x in flatten_dict(variables["params"]).items()}
  head = lambda path: path[0] != "sharing"
  owner = model.owner

  def total(wanted: Callable[[tuple[str, ...]], bool]) -> int:
    return sum(size for path, size in sizes.items() if wanted(path))

  def head_flops(task: str) -> float:
    read = _read(model.heads[task], features[task])
    return _flops(_only(model, task), variables, {task: read}, "outputs")

  features = jax.eval_shape(lambda v, b: model.apply(v, b, method="features"), variables, batch)
  rows = [Part("shared by all or some tasks", total(lambda path: owner(path) is None), None)]
  rows += [Part(f"{task} alone, before its head", own, None) for task in model.heads
           if (own := total(lambda path, t=task: owner(path) == t and not head(path)))]
  rows.append(Part("features of all tasks", total(lambda path: not head(path)),
                   _flops(model, variables, batch, "features")))
  rows += [Part(f"head of {task}", total(lambda path, t=task: head(path) and owner(path) == t),
                head_flops(task)) for task in model.heads]
  rows.append(Part("whole model", total(lambda path: True), _flops(model, variables, batch)))
  rows += [Part(f"with {task} as its only task",
                total(lambda path, t=task: owner(path) in (None, t)),
                _flops(_only(model, task), variables, batch)) for task in model.heads]
  return rows


def _only(model: MultiTaskModel, task: str) -> MultiTaskModel:
  """The model without the other tasks."""
  return MultiTaskModel(model.sharing, {task: model.heads[task]},
                        {task: (model.streams or {}).get(task, task)})


def _read(head: nn.Module, features: Any) -> Any:
  """What a head alone reads, of what the model gives where another head reads maps."""
  has_maps = isinstance(features, Mapping)
  return features["features"] if has_maps and not reads_maps(head) else features


def _flops(model: MultiTaskModel, variables: Any, inputs: Any, method: str = "__call__") -> float:
  run = jax.jit(lambda v, x: model.apply(v, x, method=method))
  cost = run.lower(variables, inputs).cost_analysis() or {}
  return float(cost.get("flops", 0))


def task_map(model: MultiTaskModel, params: Any, shapes: Mapping[str, Sequence[int]]) -> str:
  """A Mermaid flowchart: streams, the parts of the sharing architecture, heads, tasks.

  Args:
    model: the model.
    params: its parameters, or their shapes.
    shapes: of one image of each stream.
  """
  streams = {task: (model.streams or {}).get(task, task) for task in model.heads}
  owners: dict[str, set[str | None]] = {}
  sizes: dict[str, int] = {}
  for path, x in flatten_dict(params).items():
    part = path[1] if path[0] == "sharing" else path[0]
    owners.setdefault(part, set()).add(model.owner(path))
    sizes[part] = sizes.get(part, 0) + x.size
  lines = ["flowchart LR"]
  lines += [f'  stream_{stream}[("{stream} {"x".join(map(str, shapes[stream]))}")]'
            for stream in dict.fromkeys(streams.values())]
  lines += [f'  {part}["{part}: {size:,}"]' for part, size in sizes.items()]
  for part in (part for part in sizes if not part.startswith("heads_")):
    readers = [task for task in streams if owners[part] & {None, task}]
    lines += [f"  stream_{stream} --> {part}"
              for stream in dict.fromkeys(streams[task] for task in readers)]
    lines += [f"  {part} --> heads_{task}" for task in readers if f"heads_{task}" in sizes]
  return "\n".join(lines) + "\n"
