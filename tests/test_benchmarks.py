"""The benchmarks still fit what they measure."""

import argparse
import importlib.util
import pathlib

import jax
import pytest

from mtl_jax import balancing
from mtl_jax.experiment import build, fields
from tests.experiment.conftest import tiny_config, tiny_source

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"


def load(name):
  spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("own_streams", [False, True])
def test_every_variant_of_the_step_traces(own_streams):
  """Each balancer with each engine that the benchmark gives it, without computing."""
  step = load("step")
  found = step.variants(2, own_streams)
  assert {balancer.name for balancer, _ in found} == set(balancing.METHODS)
  args = argparse.Namespace(tasks=2, batch=8, own_streams=own_streams, trunk="cnn")
  for balancer, engine in found:
    if balancer.name in ("equal", "pivrg", "graddrop", "moco"):  # one of each kind of need
      run, state, batch = step.build(args, balancer, engine)
      _, logs = jax.eval_shape(run, state, batch)
      assert logs["weights"].shape == (2,)


def test_the_bare_step_beside_the_loop_trains_on_a_batch_of_the_experiment():
  config = tiny_config()
  given = {stream: tiny_source(stream) for stream in config.data.streams}
  experiment = build.build(fields.complete(config), given)
  assert load("loop").bare_rate(experiment, steps=1) > 0
