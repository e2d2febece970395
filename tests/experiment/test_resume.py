"""Interrupted equals uninterrupted, bit for bit."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import time

import jax
import pytest

from mtl_jax.errors import UserError
from mtl_jax.experiment import evaluation, loop, stepper
from mtl_jax.experiment.checkpoint import Checkpoints
from mtl_jax.experiment.run import Run
from mtl_jax.training.sharding import data_mesh
from tests.experiment.conftest import final_checksums, make, records, tiny_source


class Killed(BaseException):
  """Stands for a death that nothing in the program catches."""


def run_with_deaths(experiment, folder, monkeypatch, deaths):
  """Launches again and again; the n-th launch dies at the n-th of the given places."""
  for place, count in deaths:
    with monkeypatch.context() as patch:
      seen = []
      def dying(real, place=place, count=count):
        def wrapped(*args, **kwargs):
          seen.append(1)
          if len(seen) == count:
            raise Killed(place)
          return real(*args, **kwargs)
        return wrapped
      if place == "step":
        real = loop.stepper
        patch.setattr(loop, "stepper", lambda *args: dying(real(*args)))
      elif place == "evaluation":
        patch.setattr("mtl_jax.experiment.run.score", dying(evaluation.score))
      elif place == "save":
        patch.setattr(Checkpoints, "save", dying(Checkpoints.save))
      elif place == "after save":
        real = Checkpoints.save
        patch.setattr(Checkpoints, "save",
                      lambda *args: (real(*args), dying(lambda: None)())[0])
      elif place == "end":
        patch.setattr(Run, "finish", dying(Run.finish))
      with pytest.raises(Killed):
        loop.train(experiment, folder)
  return loop.train(experiment, folder)


DEATHS = [("step", 4), ("evaluation", 1), ("save", 1), ("after save", 1), ("step", 3),
          ("evaluation", 2), ("end", 1)]


@pytest.mark.parametrize("fields", [
    pytest.param({"balancer.name": "uncertainty", "data.engine": "resident"},
                 id="resident-uncertainty", marks=pytest.mark.slow),
    pytest.param({"balancer.name": "mgda", "train.precision": "bfloat16"}, id="bfloat16-mgda",
                 marks=pytest.mark.slow),
    pytest.param({"balancer.name": "graddrop", "data.engine": "grain"}, id="grain-graddrop"),
    pytest.param({"sharing": {"name": "adashare"}, "trunk": {"name": "mlp", "widths": (8, 8)}},
                 id="adashare", marks=pytest.mark.slow),
    pytest.param({"sharing": {"name": "mmoe", "experts": 2, "gate_entropy": 0.1},
                  "trunk": {"name": "mlp", "widths": (8, 8)}},
                 id="mmoe-gate_entropy", marks=pytest.mark.slow),
])
def test_deaths_change_nothing(tmp_path, monkeypatch, fields):
  whole = loop.train(make(**fields), tmp_path / "whole")
  broken = run_with_deaths(make(**fields), tmp_path / "broken", monkeypatch, DEATHS)
  assert final_checksums(tmp_path / "whole") == final_checksums(tmp_path / "broken")
  assert records(tmp_path / "whole") == records(tmp_path / "broken")
  times = ("wall_seconds",)
  assert ({k: v for k, v in whole.items() if k not in times}
          == {k: v for k, v in broken.items() if k not in times})


def test_records_hold_what_is_documented(tmp_path):
  summary = loop.train(make(**{"balancer.name": "pcgrad"}), tmp_path)
  lines = records(tmp_path)
  assert [(r["step"], r["split"]) for r in lines] == [
      (2, "train"), (4, "train"), (5, "validation"), (6, "train"), (8, "train"), (10, "train"),
      (10, "validation"), (12, "train"), (12, "validation"), (summary["best_step"], "test")]
  assert {"step", "epoch", "split", "data", "a/loss", "a/accuracy", "a/weight", "b/gradient_norm",
          "conflict", "cosine", "gradient_norm"} <= set(lines[0])
  assert lines[0]["data"] == "tiny" and lines[0]["epoch"] == pytest.approx(2 / 5)
  assert set(summary) == {"data", "test", "validation", "best_step", "steps", "wall_seconds",
                          "versions", "devices"}
  assert summary["data"] == {"cifar10": "tiny", "cifar100": "tiny"}
  assert {k: lines[-1][k] for k in summary["test"]} == summary["test"]
  assert {p.name for p in tmp_path.iterdir() if "tfevents" not in p.name} == {
      "config.json", "metrics.jsonl", "summary.json", "checkpoints"}
  best = max((r for r in lines if r["split"] == "validation"),
             key=lambda r: r["a/accuracy"] + r["b/accuracy"])
  assert {k: best[k] for k in summary["validation"]} == summary["validation"]


def test_training_learns_and_evaluation_reproduces(tmp_path, capsys):
  experiment = make(**{"train.steps": 80, "train.evaluate_every_steps": 40})
  summary = loop.train(experiment, tmp_path)
  assert summary["test"]["a/accuracy"] > 0.8 and summary["test"]["b/accuracy"] > 0.5
  found = loop.evaluate(experiment, tmp_path)
  assert found == {"validation": summary["validation"], "test": summary["test"]}
  assert "reproduced exactly" in capsys.readouterr().out
  before = (tmp_path / "metrics.jsonl").read_bytes()
  assert loop.train(experiment, tmp_path) == summary  # a finished run is left as it is
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("number", [
    signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signals_save_first(tmp_path, monkeypatch, number):
  experiment, real = make(), loop.stepper
  def stepper(*args):
    step, seen = real(*args), []
    def wrapped(state, count):
      seen.append(1)
      if len(seen) == 3:
        os.kill(os.getpid(), number)
      return step(state, count)
    return wrapped
  with monkeypatch.context() as patch:
    patch.setattr(loop, "stepper", stepper)
    with pytest.raises(loop.Interrupted) as stopped:
      loop.train(experiment, tmp_path / "stopped")
  assert stopped.value.args == (number,)
  assert (tmp_path / "stopped" / "checkpoints" / "3").is_dir()
  loop.train(experiment, tmp_path / "stopped")
  loop.train(experiment, tmp_path / "whole")
  assert records(tmp_path / "stopped") == records(tmp_path / "whole")
  assert final_checksums(tmp_path / "stopped") == final_checksums(tmp_path / "whole")


def test_another_config_or_other_data_is_refused(tmp_path, monkeypatch):
  loop.train(make(), tmp_path)
  before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
  with pytest.raises(UserError, match="config.optimizer.learning_rate: 0.01 there, 0.02 here"):
    loop.train(make(**{"optimizer.learning_rate": 0.02}), tmp_path)
  from mtl_jax.data import sources
  monkeypatch.setitem(sources.SOURCES, "cifar10",
                      lambda dir, download=True: tiny_source("cifar10", origin="sample"))
  with pytest.raises(UserError, match="data.cifar10: 'tiny' there, 'sample' here"):
    loop.train(make(), tmp_path)
  assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_diverging_run_names_task_step_and_checkpoint(tmp_path):
  experiment = make(**{"optimizer.name": "sgd", "optimizer.learning_rate": 1e12,
                       "train.evaluate_every_steps": 1})
  with pytest.raises(UserError, match=r"step \d+: .*task .*(last good checkpoint|no checkpoint)"):
    loop.train(experiment, tmp_path)


def test_the_host_does_nothing_to_the_logs_of_a_step(monkeypatch):
  """An operation on them would make each call wait for its step on CPUs."""
  experiment, logs = make(**{"data.engine": "grain"}), object()
  step = lambda state, batch: (state, logs)
  monkeypatch.setattr(stepper, "sharded_step", lambda *_: step)
  mesh, state = data_mesh(), experiment.first_state()
  with contextlib.ExitStack() as stack:
    _, found = stepper.stepper([experiment], mesh, state, stack)([state], 1)
  assert found[0] is logs


@pytest.mark.slow
def test_many_steps_in_a_call_keep_their_records(tmp_path):
  loop.train(make(), tmp_path / "one")
  loop.train(make(**{"train.steps_per_call": 4}), tmp_path / "four")
  one, four = records(tmp_path / "one"), records(tmp_path / "four")
  assert [r["step"] for r in one] == [r["step"] for r in four]
  for a, b in zip(one, four):
    numbers = {k: v for k, v in a.items() if isinstance(v, float)}
    assert numbers == pytest.approx({k: b[k] for k in numbers}, rel=1e-3)


@pytest.mark.slow
def test_eight_devices_give_the_same_metrics_and_each_others_checkpoints(tmp_path, monkeypatch):
  from mtl_jax.training import sharding
  meshes = {n: sharding.data_mesh(jax.devices()[:n]) for n in (1, 8)}
  ends = {}
  for n in (1, 8):
    monkeypatch.setattr(loop, "data_mesh", lambda n=n: meshes[n])
    ends[n] = loop.train(make(), tmp_path / str(n))
  for split in ("validation", "test"):
    assert ends[1][split] == pytest.approx(ends[8][split], rel=1e-4)
  for here, there in ((1, 8), (8, 1)):  # each restores the other's, checksums and all
    path = tmp_path / str(there) / "checkpoints"
    with contextlib.closing(Checkpoints(path)) as checkpoints:
      state = checkpoints.restore(12, loop._abstract_state(make(), meshes[here]))
    assert len(state.params["heads_a"]["dense"]["kernel"].devices()) == here


def test_two_runs_in_one_folder_are_refused(tmp_path):
  loop.train(make(), tmp_path)
  with open(tmp_path / "config.json", "rb") as other:
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="expected one run at a time"):
      loop.train(make(), tmp_path)


def test_numbers_that_differ_are_an_error(tmp_path):
  loop.train(make(), tmp_path)
  summary = json.loads((tmp_path / "summary.json").read_text())
  summary["test"]["a/loss"] += 1e-6
  (tmp_path / "summary.json").write_text(json.dumps(summary))
  with pytest.raises(UserError, match="1 numbers differ from those of the run, such as test a/loss"):
    loop.evaluate(make(), tmp_path)


def test_a_damaged_best_gives_way_to_the_newest_with_a_warning(tmp_path, monkeypatch, capsys):
  scores = iter([0.9, 0.1, 0.2])
  monkeypatch.setattr("mtl_jax.experiment.run.score", lambda *args: next(scores))
  loop.train(make(), tmp_path)
  (tmp_path / "summary.json").unlink()
  shutil.rmtree(tmp_path / "checkpoints" / "5" / "state")
  summary = loop.train(make(), tmp_path)
  assert summary["best_step"] == 12 and "using checkpoint 12" in capsys.readouterr().out
  validation = [r for r in records(tmp_path) if r["split"] == "validation"][-1]
  assert {k: validation[k] for k in summary["validation"]} == summary["validation"]


def test_logs_are_read_while_the_next_call_runs(tmp_path, monkeypatch):
  happened, make_steps, log, validate = [], loop.stepper, Run.log, Run.validate

  def stepper(*args):
    steps = make_steps(*args)
    return lambda *given: happened.append("call") or steps(*given)

  monkeypatch.setattr(loop, "stepper", stepper)
  monkeypatch.setattr(Run, "log", lambda *args: happened.append("log") or log(*args))
  monkeypatch.setattr(Run, "validate", lambda run: happened.append("validate") or validate(run))
  loop.train(make(**{"train.steps": 5, "train.evaluate_every_steps": 3}), tmp_path)
  assert " ".join(happened) == "call call log call log log validate call call log log validate"


def test_no_rate_is_above_that_of_calls_that_return_when_done(tmp_path, monkeypatch):
  make_steps = loop.stepper

  def stepper(*args):
    steps = make_steps(*args)
    return lambda *given: time.sleep(0.05) or jax.block_until_ready(steps(*given))

  monkeypatch.setattr(loop, "stepper", stepper)
  loop.train(make(**{"train.steps": 6, "train.evaluate_every_steps": 3,
                     "train.log_every_steps": 1}), tmp_path)
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  rates = [line["examples_per_second"] for line in lines if line["split"] == "train"]
  assert len(rates) == 6 and max(rates) <= 2 * 8 / 0.05  # examples of two streams a call


@pytest.mark.slow
def test_rates_are_those_of_whole_calls(tmp_path):
  loop.train(make(**{"train.steps_per_call": 4, "train.log_every_steps": 1}), tmp_path)
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  rates = [r["examples_per_second"] for r in lines if r["split"] == "train"]
  calls = [rates[:4], rates[4:5], rates[5:8], rates[8:10], rates[10:]]  # evaluation at 5, 10, 12
  assert all(len(set(call)) == 1 for call in calls)
