"""The benchmarks still fit what they measure."""

import argparse
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import pytest

from mtl_jax import balancing

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


def test_engines_look_on_at_the_same_gradients():
  """Every setting that serves a method traces, without drawing the sample."""
  benchmark = load("engines")
  data = benchmark.Problem(jnp.zeros((8, 256)), jnp.zeros((8, 3), jnp.int32))
  balancer = balancing.cagrad()
  engines = [benchmark.exact(), *(engine for *_, engine in benchmark.SETTINGS)]
  step, carry = benchmark.step_of(balancer, engines, data, batch_size=4)
  _, found = jax.eval_shape(step, carry, jnp.zeros((), jnp.int32))
  assert [one["weights"].shape for one in found] == [(3,)] * len(engines)
