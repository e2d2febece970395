"""What a fresh run starts from: random numbers, or the weights that `config.init_from` names."""

from collections.abc import Callable, Mapping, Sequence
import json
import pathlib
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from mtl_jax.errors import UserError
from mtl_jax.experiment.checkpoint import read_variables
from mtl_jax.experiment.console import Console
from mtl_jax.experiment.experiment import Experiment
from mtl_jax.experiment.torch_files import read_state_dict
from mtl_jax.models.torchvision import from_torchvision
from mtl_jax.training.parameter_groups import Path
from mtl_jax.training.sharding import create_sharded, replicated
from mtl_jax.training.transfer import TRUNK, Account, merge


def first_states(experiments: Sequence[Experiment], mesh: Mesh, console: Console) -> list[Any]:
  """The states at step 0 of experiments that differ in their seed alone, compiled once.

  The console is told once what `config.init_from` gave.

  Raises:
    UserError: for weights that cannot be read, or do not fit.
  """
  one = experiments[0]
  if len(experiments) == 1:
    return [first_state(one, mesh, console)]
  create = jax.jit(one.create_state, out_shardings=replicated(mesh))
  quiet = Console(quiet=True)
  return [first_state(experiment, mesh, console if experiment is one else quiet, create)
          for experiment in experiments]


def first_state(experiment: Experiment, mesh: Mesh, console: Console,
                compiled: Callable[[Any], Any] | None = None) -> Any:
  """The state at step 0, on the devices; the console is told what `config.init_from` gave.

  Args:
    experiment: what to run.
    mesh: of the devices.
    console: is told.
    compiled: makes the state of a seed, where an experiment of another seed has compiled it.

  Raises:
    UserError: for weights that cannot be read, or do not fit.
  """
  section = experiment.config.init_from
  if not section:
    return _fresh(experiment, mesh, compiled)
  origin, merged, account = _found(section, jax.eval_shape(experiment.first_state))
  console.transfer(origin, account)
  state = _fresh(experiment, mesh, compiled)
  fresh = _variables(state)
  merged |= {path: fresh[path] for path in account.random}
  variables = jax.device_put(unflatten_dict(merged), replicated(mesh))
  params = variables.pop("params")
  opt_state = jax.jit(experiment.optimizer.init, out_shardings=replicated(mesh))(params)
  return state.replace(params=params, model_state=variables, opt_state=opt_state)


def _fresh(experiment: Experiment, mesh: Mesh, compiled: Callable[[Any], Any] | None) -> Any:
  if compiled is None:
    return create_sharded(experiment.first_state, mesh)
  weights = np.asarray(experiment.task_weights, np.float32)
  return compiled(np.uint32(experiment.config.seed)).replace(
      task_weights=jax.device_put(weights, replicated(mesh)))


def _found(section: ConfigDict, shapes: Any) -> tuple[str, dict[Path, Any], Account]:
  """Where the variables come from, they and the shapes of those that stay random, the account."""
  origin, found = read(section.path)
  skip = section.skip + (("heads",) if section.part == "trunk" else
                         tuple(f"heads_{task}" for task in section.except_heads))
  try:
    return origin, *merge(_variables(shapes), found, skip=skip)
  except ValueError as error:
    raise UserError(f"config.init_from: {section.path}: {error}") from error


def _variables(state: Any) -> dict[Path, Any]:
  return flatten_dict({"params": state.params, **state.model_state})


def read(path: str) -> tuple[str, dict[Path, np.ndarray]]:
  """Variables by (collection, module, …, leaf), and in words what they were read from.

  Args:
    path: a run folder, a `.safetensors` file, or a `.pth` file of torchvision's names.

  Raises:
    UserError: for another file, or one that is damaged.
  """
  place = pathlib.Path(path).expanduser()
  if place.is_dir():
    return _run_folder(place)
  if not place.is_file():
    raise UserError("config.init_from.path: expected a run folder or a file, found none at "
                    f"{place}")
  if place.suffix == ".safetensors":
    return str(place), _from_names(place, _safetensors(place))
  if place.suffix in (".pth", ".pt"):
    return str(place), _from_names(place, read_state_dict(place))
  raise UserError("config.init_from.path: expected a run folder, a .safetensors or a .pth file, "
                  f"found {place}")


def _run_folder(place: pathlib.Path) -> tuple[str, dict[Path, np.ndarray]]:
  try:
    data = json.loads((place / "config.json").read_text(encoding="utf-8"))["data"]
    summary, step = place / "summary.json", None
    if summary.exists():
      step = json.loads(summary.read_text(encoding="utf-8"))["best_step"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f"config.init_from.path: expected a run folder, found {place} without a sound "
                    f"config.json and summary.json: {type(error).__name__}") from error
  step, found = read_variables(place.resolve() / "checkpoints", step)
  origin = f"{place}, checkpoint {step}, trained on {', '.join(dict.fromkeys(data.values()))}"
  return origin, flatten_dict({"params": found["params"], **found["model_state"]})


def _safetensors(place: pathlib.Path) -> dict[str, np.ndarray]:
  import safetensors.numpy
  try:
    return safetensors.numpy.load_file(place)
  except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
    raise UserError(f"{place}: expected tensors in the safetensors format, found: {error}"
                    ) from error


def _from_names(place: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> dict[Path, np.ndarray]:
  """Arrays under our paths, from names of ours or torchvision's."""
  if any("/" in name for name in arrays):
    bad = next((name for name in arrays if name.count("/") < 2), None)
    if bad is not None:
      raise UserError(f"{place}: expected names such as params/sharing/trunk/conv1/kernel, found "
                      f"{bad!r}")
    return {tuple(name.split("/")): x for name, x in arrays.items()}
  try:
    return {(path[0], *TRUNK, *path[1:]): x for path, x in from_torchvision(arrays).items()}
  except ValueError as error:
    raise UserError(f"{place}: {error}") from error
