"""What the README prints works as printed."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from mtl_jax.experiment import config, fields

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LAUNCHES = re.findall(r"python launch\.py [^\n&]*configs/[^\n&`]*", README)


def numbers_printed_by(snippet: str) -> list[float]:
  done = subprocess.run([sys.executable, "-W", "error", "-c", snippet], capture_output=True,
                        text=True, timeout=200)
  assert done.returncode == 0, done.stderr
  return [float(x) for x in re.findall(r"-?\d+\.\d+|-?\d+\.", done.stdout)]


def test_the_snippets_are_short():
  paper, balancer = (len(snippet.splitlines()) for snippet in SNIPPETS)
  assert paper <= 25 and balancer <= 30


def test_the_paper_snippet_runs_as_printed():
  numbers = numbers_printed_by(SNIPPETS[0])
  assert len(numbers) == 4 and numbers[0] < 2.31 and numbers[1] < 0.7  # it has learnt


def test_the_snippet_of_a_balancer_runs_as_printed():
  numbers = numbers_printed_by(SNIPPETS[1])
  # Weights √38 and √18 over their mean.
  assert len(numbers) == 3 and abs(numbers[0] - 0.1534) < 1e-3 and abs(numbers[1] - 2) < 1e-5


@pytest.mark.parametrize("line", [line for line in LAUNCHES if "[" not in line])
def test_every_launch_line_is_a_complete_config(line, monkeypatch):
  monkeypatch.chdir(ROOT)
  words = shlex.split(line)[2:]
  flag = next(w for w in words if w.startswith("--config=")).removeprefix("--config=")
  fields.complete(config.load(flag, [w for w in words if w.startswith("--config.")]))


def test_the_readme_names_every_choice():
  from mtl_jax import balancing, models, tasks
  from mtl_jax.data.augmentation import AUGMENTATIONS
  from mtl_jax.data.sources import SOURCES
  from mtl_jax.training.engines import ENGINES
  from mtl_jax.training.optimizer import SCHEDULES
  from mtl_jax.training.schedules import SCHEDULES as TASK_SCHEDULES
  for table in (models.TRUNKS, models.HEADS, models.SHARINGS, balancing.METHODS, tasks.KINDS,
                SCHEDULES, TASK_SCHEDULES, ENGINES, SOURCES):
    for name in table:
      assert f"`{name}`" in README, name
  for name in AUGMENTATIONS:
    assert f"`{name}:" in README, name
