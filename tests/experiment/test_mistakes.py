"""What users get wrong: exit code 2, at most three lines, no traceback, nothing lost."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from mtl_jax.data import sources
from mtl_jax.data.source import ArrayExamples, Label, Source
from mtl_jax.errors import MissingData
from tests.experiment.conftest import tiny_source

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import launch  # noqa: E402

CONFIG = f"--config={ROOT / 'configs' / 'cifar_mtl.py'}"

MISTAKES = [
    ([], "the following arguments are required: --config"),
    (["--config"], "expected one argument"),
    ([CONFIG, "--confg.x=1"], "unrecognized arguments: --confg.x=1"),
    ([CONFIG, "--mode=trian"], "found 'trian'; expected --config=FILE"),
    (["--config=nowhere.py"], "found no file nowhere.py"),
    (["--config=empty.py"], "empty.py: expected a function get_config(arg), found none"),
    (["--config=broken.py"], "broken.py, line 2: NameError: name 'nothing' is not defined"),
    (["--config=syntax.py"], "syntax.py, line 1: SyntaxError"),
    (["--config=wrong.py"], "expected get_config to return a ConfigDict, found int"),
    (["--config=old.py"], "old.py: TypeError: get_config() takes 0 positional arguments"),
    (["--config=exits.py"], "exits.py, line 2: SystemExit"),
    (["--config=keyed.py"], "keyed.py, line 2: KeyError"),
    ([CONFIG + ":coarse,tasks=cifar10"], "expected coarse or tasks=…, found both"),
    ([CONFIG + ":tasks=cifar10+cifar10"], "each once, found 'cifar10'"),
    ([CONFIG, "--config.optimizer.b1=abc"], "config.optimizer: expected arguments that optax's adam"),
    ([CONFIG, "--config.optimizer.name=sgd", "--config.optimizer.momentum=x"], "optax's sgd takes"),
    ([CONFIG, "--config.optimizer.schedule.final=-3"], "final: expected a fraction of the peak"),
    ([CONFIG, "--config.optimizer.schedule.name=steps", "--config.optimizer.schedule.at=50,75"],
     "at: expected fractions of the run between 0 and 1, found (50.0, 75.0)"),
    ([CONFIG, "--config.optimizer.learning_rate=1e999"], "learning_rate: expected a number"),
    ([CONFIG, "--config.optimizer.schedule.warmup_epochs=-1"], "expected a number >= 0"),
    ([CONFIG, "--config.penalties=3"], "config.penalties: expected fields l1, l2, found 3"),
    ([CONFIG, "--config.tasks.cifar10.head.name=mlp", "--config.tasks.cifar10.head.dropout=2"],
     "mlp: dropout: expected a rate in [0, 1), found 2.0"),
    ([CONFIG, "--config.sharing.trunk=3"], "config.sharing.trunk: no such field; expected one of branch_at"),
    ([CONFIG, "--config.trunk.channels=a,b"], "expected whole numbers, separated by commas"),
    ([CONFIG, "--config.data.engine=grain", "--config.train.steps_per_call=2"],
     "config.train.steps_per_call: expected 1 or None with data from the host"),
    ([CONFIG, "--config.data.streams.more.name=cifar10"], "found that none reads more"),
    ([CONFIG + ":nonsense"], "expected coarse, resnet18, independent or tasks=A[+B…], "
                             "found 'nonsense'"),
    ([CONFIG + ":tasks=cifar11"], "tasks: expected some of cifar10+cifar100+cifar100_coarse, each once, "
                                  "found 'cifar11'"),
    ([CONFIG, "--config.optimzer.name=adam"], "config.optimzer: no such field; expected one of "),
    ([CONFIG, "--config.optimzer.name=adam"], "did you mean optimizer?"),
    ([CONFIG, "--config.optimizer.lerning_rate=1"], "did you mean learning_rate"),
    ([CONFIG, "--config.balancer.name=pcgrd"], "config.balancer.name: expected one of "),
    ([CONFIG, "--config.balancer.name=pcgrd"], "did you mean pcgrad"),
    ([CONFIG, "--config.balancer.name=mgda", "--config.balancer.c=1"], "config.balancer.c: no such"),
    ([CONFIG, "--config.balancer.name=mgda", "--config.balancer.normalization=l3"], "found 'l3'"),
    ([CONFIG, "--config.balancer.name=fixed"], "config.balancer"),
    ([CONFIG, "--config.balancer.name=fixed", "--config.balancer.weights=1,2,3"],
     "config.balancer: fixed: weights"),
    ([CONFIG, "--config.balancer.name=fixed", "--config.balancer.weights.cifar10=1"],
     "expected one value for each of cifar10, cifar100; found cifar10"),
    ([CONFIG, "--config.trunk.name=resnt"], "config.trunk.name: expected one of cnn, mlp, resnet, "),
    ([CONFIG, "--config.trunk.width=0"], "config.trunk.width: expected a size of at least 1"),
    ([CONFIG, "--config.trunk.width=big"], "config.trunk.width: expected a whole number, found 'big'"),
    ([CONFIG, "--config.sharing.name=mixed"], "config.sharing.name: expected one of hard, independent"),
    ([CONFIG, "--config.sharing.branch_at=conv9"], "config.sharing: branch_at: expected one of ['conv1'"),
    ([CONFIG, "--config.optimizer.name=adamm"], "did you mean adam or "),
    ([CONFIG, "--config.optimizer.learning_rate=-1"], "expected a number > 0, found -1.0"),
    ([CONFIG, "--config.optimizer.learning_rate=fast"], "expected a number or None, found 'fast'"),
    ([CONFIG, "--config.optimizer.schedule.name=linear"], "expected one of constant, cosine, steps"),
    ([CONFIG, "--config.optimizer.weight_decay=-1"], "weight_decay: expected >= 0, found -1.0"),
    ([CONFIG, "--config.penalties.l3=1"], "config.penalties.l3: no such field"),
    ([CONFIG, "--config.train.epochs=abc"], "config.train.epochs: expected a number or None"),
    ([CONFIG, "--config.train.epochs=-1"], "config.train.epochs: expected a number > 0, found -1.0"),
    ([CONFIG, "--config.train.steps=0"], "config.train.steps: expected a size of at least 1"),
    ([CONFIG, "--config.train.steps=5", "--config.train.epochs=1"],
     "expected exactly one of steps, epochs, examples; found steps and epochs"),
    ([CONFIG, "--config.train.precision=bfloat"],
     "config.train.precision: expected one of float32, bfloat16; did you mean bfloat16"),
    ([CONFIG, "--config.train.gradients=magic"],
     "config.train.gradients.name: expected one of exact, features, matrix_free, sketched"),
    ([CONFIG, "--config.train.gradients=matrix_free", "--config.balancer.name=pcgrad"],
     "config.train.gradients: pcgrad does not work from products with the Gramian; use 'exact', "),
    ([CONFIG, "--config.train.gradients=features", "--config.balancer.name=graddrop"],
     "graddrop returns a direction"),
    ([CONFIG, "--config.seed=-1"], "config.seed: expected 0 …"),
    ([CONFIG, "--config.data.batch_size=0"], "config.data.batch_size: expected a size of at least 1"),
    ([CONFIG, "--config.data.batch_size=-8"], "config.data.batch_size: expected a size of at least 1"),
    ([CONFIG, "--config.data.batch_size=12"], "multiple of the 8 devices, found 12; the nearest is "
                                              "8 or 16"),
    ([CONFIG, "--config.data.missing=maybe"], "expected one of auto, error, sample"),
    ([CONFIG, "--config.data.engine=gran"], "did you mean grain?"),
    ([CONFIG, "--config.data.augmentation=flop"], "did you mean flip or crop?"),
    ([CONFIG, "--config.data.validation=1.5"], "expected a fraction between 0 and 1"),
    ([CONFIG, "--config.data.streams.cifar10.name=cifar"], "did you mean cifar10"),
    ([CONFIG, "--config.data=3"], "for the whole section"),
    ([CONFIG, "--config.seed.x=3"], "config.seed is a value, not a section"),
    ([CONFIG, "--config.seed"], "expected --config.<field>=<value>"),
    ([CONFIG, "--config.tasks.cifar10.label=labl"], "config.tasks.cifar10.label: expected one of "),
    ([CONFIG, "--config.tasks.cifar10.stream=nowhere"], "config.tasks.cifar10.stream: expected one"),
    ([CONFIG, "--config.tasks.cifar10.head.name=None"], "config.tasks.cifar10.head.name: expected"),
    ([CONFIG, "--config.tasks.cifar10.num_classes=3"], "label: expected labels 0 … 2"),
    ([CONFIG, "--config.tasks.cifar10.num_classes=3", "--config.data.engine=grain"],
     "label: expected labels 0 … 2"),
    ([CONFIG, "--config.tasks.new.name=classification"], "config.tasks.new.stream: expected one of"),
    ([CONFIG, "--config.tasks.new.name=classification", "--config.tasks.new.stream=cifar10"],
     "config.tasks.new.head: expected a head such as {'name': 'linear'}, found none"),
    ([CONFIG, "--mode=evaluate", "--workdir=nothing"], "expected the folder of a run, found none"),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
  """A working directory with some broken config files."""
  monkeypatch.chdir(tmp_path)
  for name, text in (("empty.py", ""), ("broken.py", "x = 1\nnothing\n"), ("syntax.py", "def (\n"),
                     ("wrong.py", "def get_config(arg):\n  return 3\n"),
                     ("old.py", "def get_config():\n  return 3\n"),
                     ("exits.py", "def get_config(arg):\n  raise SystemExit(0)\n"),
                     ("keyed.py", "def get_config(arg):\n  return {}[arg]\n")):
    (tmp_path / name).write_text(text)
  # The real mesh: eight devices.
  from mtl_jax.experiment import loop
  from mtl_jax.training import sharding
  monkeypatch.setattr(loop, "data_mesh", sharding.data_mesh)
  return tmp_path


def assert_told(capsys, argv, message):
  assert launch.main(argv) == 2
  err = capsys.readouterr().err
  assert message in err, err
  assert err.startswith("error: ") and len(err.strip().splitlines()) <= 3, err


@pytest.mark.parametrize("argv, message", MISTAKES,
                         ids=[" ".join(a[-1:] or ["nothing"]).split("/")[-1] for a, _ in MISTAKES])
def test_mistakes_on_the_command_line(here, capsys, argv, message):
  assert_told(capsys, argv, message)
  assert not (here / "runs").exists() or "label: expected labels" in message


def test_an_image_of_the_wrong_shape(here, capsys, monkeypatch):
  def source(shape, dtype=np.uint8):
    columns = {"image": np.zeros((40, *shape), dtype), "label": np.zeros(40, np.int32)}
    return Source("bad", {"train": ArrayExamples(columns), "test": ArrayExamples(columns)},
                  {"label": Label("class", 4)})
  for shape, dtype, message in (
      ((8, 8), np.uint8, "of float32; found [8, 8] of uint8"),
      ((8, 8, 3), np.float64, "or numbers of float32; found [8, 8, 3] of float64"),
      ((2, 2, 3), np.uint8, "config.trunk: cnn: images: expected at least 4 pixels a side"),
  ):
    monkeypatch.setitem(sources.SOURCES, "cifar10",
                        lambda dir, download=True, s=shape, d=dtype: source(s, d))
    assert_told(capsys, [CONFIG + ":tasks=cifar10"], message)


def test_missing_data_is_an_error_where_asked_and_on_accelerators(here, capsys, monkeypatch):
  def absent(dir, download=True):
    raise MissingData("cifar10: expected it under data, found nothing; prepare it")
  monkeypatch.setattr(sources, "SOURCES", {"cifar10": absent, "cifar100": absent})
  assert_told(capsys, [CONFIG, "--config.data.missing=error"], "prepare it")
  import jax
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert_told(capsys, [CONFIG, "--config.data.missing=auto"], "prepare it")
  monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  assert_told(capsys, [CONFIG, "--config.data.missing=auto"], "prepare it")


def test_the_sample_says_so_everywhere(here, capsys, monkeypatch):
  def absent(dir, download=True):
    raise MissingData("nothing")
  monkeypatch.setattr(sources, "SOURCES", {"cifar10": absent})
  monkeypatch.setattr(sources, "sample", lambda name: tiny_source(name, origin="sample"))
  argv = [CONFIG + ":tasks=cifar10", "--workdir=run", "--config.train.steps=2",
          "--config.data.batch_size=8", "--config.train.log_every_steps=1"]
  assert launch.main(argv) == 0
  assert capsys.readouterr().out.count("SAMPLE DATA") == 2  # banner and table
  run = here / "run"
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  assert len(lines) == 4 and all(line["data"] == "sample" for line in lines)
  assert json.loads((run / "summary.json").read_text())["data"] == {"cifar10": "sample"}
  record = json.loads((run / "checkpoints/2/record/metadata").read_text())
  record = json.loads(record["text"])["record"]
  assert record["data"] == {"cifar10": "sample"}
  monkeypatch.setattr(sources, "SOURCES", {
      "cifar10": lambda dir, download: tiny_source("cifar10")})
  assert_told(capsys, argv, "data.cifar10: 'sample' there, 'tiny' here")


def test_evaluating_an_unfinished_run(here, capsys):
  (here / "run").mkdir()
  argv = [CONFIG + ":tasks=cifar10", "--workdir=run", "--config.train.steps=2",
          "--config.data.batch_size=8"]
  assert launch.main(argv) == 0
  (here / "run" / "summary.json").unlink()
  assert_told(capsys, [*argv, "--mode=evaluate"], "expected a finished run, found no summary.json")


def test_no_permission_to_write(here, capsys, monkeypatch):
  """A file stands where the folder should be: refused for every user, root too."""
  (here / "file").write_text("precious")
  assert_told(capsys, [CONFIG, "--workdir=file/run"], "expected a folder that can be written")
  assert (here / "file").read_text() == "precious"
  if os.geteuid():
    (here / "locked").mkdir(mode=0o500)
    assert_told(capsys, [CONFIG, "--workdir=locked/run"], "Permission denied")


def test_a_real_process_prints_no_traceback(here):
  done = subprocess.run([sys.executable, ROOT / "launch.py", CONFIG, "--config.optimzer.name=adam"],
                        capture_output=True, text=True, timeout=120)
  assert done.returncode == 2
  assert done.stderr.startswith("error: config.optimzer: no such field")
  assert len(done.stderr.strip().splitlines()) <= 3


def test_a_bad_label_in_any_split_is_known_before_training(here, capsys, monkeypatch):
  source = tiny_source("cifar10")
  bad = {**source.splits["test"].columns, "label": source.splits["test"].columns["label"] + 3}
  changed = dataclasses.replace(source, splits={**source.splits, "test": ArrayExamples(bad)})
  monkeypatch.setitem(sources.SOURCES, "cifar10", lambda dir, download=True: changed)
  argv = [CONFIG + ":tasks=cifar10", "--workdir=run", "--config.train.steps=2",
          "--config.data.batch_size=8"]
  assert_told(capsys, argv, "test: stream 'cifar10': label: expected labels 0 … 3")
  assert not (here / "run").exists()
  assert_told(capsys, [*argv, "--config.data.engine=grain"], "test: stream 'cifar10': label:")
  without = dataclasses.replace(source, splits={"train": source.splits["train"]})
  monkeypatch.setitem(sources.SOURCES, "cifar10", lambda dir, download=True: without)
  assert_told(capsys, argv, "found no test split")


def test_another_name_drops_what_only_the_old_one_takes(here):
  from mtl_jax.experiment import config, fields
  flag = CONFIG.removeprefix("--config=") + ":resnet18"
  found = fields.complete(config.load(flag, ["--config.optimizer.name=adam",
                                             "--config.optimizer.schedule.name=constant"]))
  assert found.optimizer.name == "adam" and "momentum" not in found.optimizer
  assert found.optimizer.weight_decay == 5e-4 and found.optimizer.schedule.warmup_epochs == 5


def test_weights_by_task_reach_their_tasks(here):
  from mtl_jax.experiment import build, config, fields
  flag = CONFIG.removeprefix("--config=")
  overrides = ["--config.balancer.name=fixed", "--config.balancer.weights.cifar100=3",
               "--config.balancer.weights.cifar10=0.5", "--config.data.augmentation=crop,flip"]
  complete = fields.complete(config.load(flag, overrides))
  assert complete.balancer.weights.to_dict() == {"cifar10": 0.5, "cifar100": 3.0}
  assert complete.data.augmentation == ("crop", "flip")
  experiment = build.build(complete)
  from mtl_jax import balancing
  import jax.numpy as jnp
  d, _ = balancing.aggregate(experiment.balancer, jnp.eye(2))
  assert dict(zip((t.name for t in experiment.tasks), d.tolist())) == {"cifar10": 0.5,
                                                                       "cifar100": 3.0}


def test_running_out_of_memory_is_said(here, capsys, monkeypatch):
  import jax
  from mtl_jax.experiment import loop
  def exhausted(*args):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
  monkeypatch.setattr(loop, "stepper", lambda *args: exhausted)
  assert_told(capsys, [CONFIG, "--workdir=run", "--config.data.batch_size=8"],
              "the device ran out of memory: RESOURCE_EXHAUSTED")
