"""Runs in which tasks take turns: exact on resume, with either data engine."""

import pytest

from mtl_jax.errors import UserError
from mtl_jax.experiment import loop
from tests.experiment.conftest import final_checksums, make, records
from tests.experiment.test_resume import run_with_deaths

DEATHS = [("step", 4), ("save", 1), ("step", 3)]


@pytest.mark.parametrize("fields", [
    pytest.param({"schedule.name": "alternating", "data.engine": "resident",
                  "train.steps_per_call": 3}, id="resident-alternating"),
    pytest.param({"schedule.name": "sampled", "schedule.temperature": 2.0, "data.engine": "grain",
                  "balancer.name": "mgda"}, id="grain-sampled"),
    pytest.param({"schedule.name": "curriculum", "schedule.start": {"b": 0.4},
                  "schedule.easy_first": 0.8, "schedule.weights": {"a": {
                      "name": "linear_schedule", "init_value": 0.5, "end_value": 1.0,
                      "transition_steps": 6}}}, id="curriculum"),
])
@pytest.mark.slow
def test_deaths_change_nothing(tmp_path, monkeypatch, fields):
  loop.train(make(**fields), tmp_path / "whole")
  run_with_deaths(make(**fields), tmp_path / "broken", monkeypatch, DEATHS)
  assert final_checksums(tmp_path / "whole") == final_checksums(tmp_path / "broken")
  assert records(tmp_path / "whole") == records(tmp_path / "broken")


def test_both_engines_read_what_the_schedule_says(tmp_path):
  experiment = make(**{"schedule.name": "alternating", "schedule.steps": 2,
                       "train.log_every_steps": 1, "data.engine": "grain"})
  assert [experiment.streams_at(step) for step in range(5)] == [
      ("cifar10",), ("cifar10",), ("cifar100",), ("cifar100",), ("cifar10",)]
  assert experiment.steps_per_epoch == 2 * make().steps_per_epoch
  loop.train(experiment, tmp_path)
  lines = [line for line in records(tmp_path) if line["split"] == "train"]
  assert [line["a/loss"] is None for line in lines] == [i // 2 % 2 == 1 for i in range(12)]
  assert [line["b/loss"] is None for line in lines] == [i // 2 % 2 == 0 for i in range(12)]


@pytest.mark.parametrize("fields,message", [
    ({"schedule.name": "altrenating"}, "config.schedule.name: .*did you mean alternating"),
    ({"schedule.name": "alternating", "schedule.by": "batch"}, "config.schedule: by: expected"),
    ({"schedule.name": "joint", "schedule.by": "task"}, "config.schedule.by: no such field"),
    ({"schedule.name": "curriculum", "schedule.start": {"z": 0.5}},
     "config.schedule: start.z: expected one of a, b"),
])
def test_mistakes_are_named(fields, message):
  with pytest.raises(UserError, match=message):
    make(**fields)
