"""Imports point down, and `import mtl_jax` stays light."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "mtl_jax"

# What each room may see besides itself, errors and randomness.
ALLOWED = {
    "tasks": set(),
    "models": set(),
    "balancing": set(),
    "testing": {"balancing"},
    "data": set(),
    "training": {"tasks", "models", "balancing", "data"},
    "experiment": {"tasks", "models", "balancing", "data", "training"},
}
ANYWHERE = {"errors", "randomness"}
HEAVY = ("matplotlib", "tensorflow_datasets", "orbax", "tensorboardX", "sklearn", "PIL", "grain",
         "requests", "ml_collections", "tensorflow", "pycocotools", "safetensors")


def imported(path: pathlib.Path) -> set[str]:
  """Rooms of the package that a file imports, by any form of import."""
  rooms = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mtl_jax":
      parts = node.module.split(".")
      rooms |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    elif isinstance(node, ast.Import):
      rooms |= {alias.name.split(".")[1] for alias in node.names
                if alias.name.startswith("mtl_jax.")}
  return rooms


@pytest.mark.parametrize("room", sorted(p.name for p in PACKAGE.iterdir() if p.is_dir()
                                        and p.name != "__pycache__"))
def test_imports_point_down(room):
  for path in (PACKAGE / room).rglob("*.py"):
    assert imported(path) <= ALLOWED[room] | ANYWHERE | {room}, path


def test_launch_sees_the_experiment_only():
  assert imported(PACKAGE.parent / "launch.py") <= {"errors", "experiment", "analysis", "serving"}
  assert len((PACKAGE.parent / "launch.py").read_text().splitlines()) < 100


def test_only_the_experiment_and_sources_touch_files_clocks_and_the_network():
  effects = {"os", "pathlib", "time", "datetime", "socket", "requests", "shutil", "subprocess"}
  readers = {PACKAGE / "data" / f"{name}.py" for name in (
      "celeba", "cifar", "cityscapes", "coco", "folders", "idx", "image_files", "images",
      "label_table", "multi_fashion", "npy_folders", "nyuv2", "records", "tfds")}
  for room in ("tasks", "models", "balancing", "data", "training"):
    for path in set((PACKAGE / room).rglob("*.py")) - readers:
      for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                 else [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
        assert not effects & {name.split(".")[0] for name in names}, path


def loaded_by(code, names):
  """Those of the modules that a fresh interpreter has loaded after the code."""
  code = f"{code}\nimport sys; print(*[m for m in {names} if m in sys.modules])"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                        cwd=PACKAGE.parent)
  return done.stdout.split()


def test_importing_the_package_loads_nothing_heavy():
  assert loaded_by("import mtl_jax", HEAVY) == []


def test_a_mistyped_argument_is_answered_before_jax_is_loaded():
  assert loaded_by("import launch; assert launch.main(['--confg=x.py']) == 2", ["jax"]) == []


def test_a_new_run_steps_before_orbax_is_loaded(tmp_path):
  code = ("import pathlib; from mtl_jax.experiment.checkpoint import Checkpoints; "
          f"assert Checkpoints(pathlib.Path({str(tmp_path / 'new')!r})).steps() == set()")
  assert loaded_by(code, ["orbax.checkpoint"]) == []
