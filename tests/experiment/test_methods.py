"""Every balancing method trains from a config."""

import math

import pytest

from mtl_jax import balancing
from mtl_jax.experiment import loop
from tests.experiment.conftest import make, records

REQUIRED = {"fixed": {"balancer.weights": {"a": 1.0, "b": 0.5}},
            "pivrg": {"balancer.scores": {"a": 2.0, "b": -1.0}}}
QUICK = ("mgda",)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
    for name in balancing.METHODS])
def test_trains(name, tmp_path):
  experiment = make(**{"balancer.name": name, "train.steps": 3, "train.log_every_steps": 1,
                       "train.evaluate_every_steps": 3, **REQUIRED.get(name, {})})
  loop.train(experiment, tmp_path)
  lines = records(tmp_path)
  numbers = [value for line in lines for value in line.values() if isinstance(value, (int, float))]
  assert all(map(math.isfinite, numbers))
  steps = [line for line in lines if line["split"] == "train"]
  assert [line["step"] for line in steps] == [1, 2, 3]
  for line in steps:
    assert {"a/weight", "b/weight", "gradient_norm"} <= line.keys()
    assert ("cosine" in line) == ("gramian" in experiment.balancer.needs)


def test_diagnosed_steps_are_logged(tmp_path):
  """Equal weights look at no gradient, and yet the records tell how the tasks' gradients lie."""
  experiment = make(**{"balancer.name": "equal", "train.steps": 4, "train.log_every_steps": 1,
                       "train.evaluate_every_steps": 4, "train.diagnose_every_steps": 2})
  loop.train(experiment, tmp_path)
  steps = [line for line in records(tmp_path) if line["split"] == "train"]
  assert [("cosine" in line, "a/gradient_norm" in line) for line in steps] == [
      (False, False), (True, True)] * 2
