"""What the README prints works as printed."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from mtl_jax.experiment import config

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LAUNCHES = re.findall(r"python launch\.py [^\n&]*configs/[^\n&`]*", README)


def test_the_paper_snippet_runs_as_printed():
  (snippet,) = SNIPPETS
  assert len(snippet.splitlines()) <= 25
  done = subprocess.run([sys.executable, "-W", "error", "-c", snippet], capture_output=True,
                        text=True, timeout=200)
  assert done.returncode == 0, done.stderr
  numbers = [float(x) for x in re.findall(r"-?\d+\.\d+|-?\d+\.", done.stdout)]
  assert len(numbers) == 4 and numbers[0] < 2.31 and numbers[1] < 0.7  # it has learnt


@pytest.mark.parametrize("line", [line for line in LAUNCHES if "[" not in line])
def test_every_launch_line_is_a_complete_config(line, monkeypatch):
  monkeypatch.chdir(ROOT)
  words = shlex.split(line)[2:]
  flag = next(w for w in words if w.startswith("--config=")).removeprefix("--config=")
  config.complete(config.load(flag, [w for w in words if w.startswith("--config.")]))


def test_the_readme_names_every_choice():
  from mtl_jax import balancing, models, tasks
  from mtl_jax.training.optimizer import SCHEDULES
  for table in (models.TRUNKS, models.HEADS, models.SHARINGS, balancing.METHODS, tasks.KINDS,
                SCHEDULES):
    for name in table:
      assert f"`{name}`" in README, name
