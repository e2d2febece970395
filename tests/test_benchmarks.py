"""The benchmarks still fit what they measure."""

import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

from mtl_jax import balancing
from mtl_jax.experiment import build, fields
from tests.experiment.conftest import tiny_config, tiny_source

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"


def load(name):
  """A benchmark's module; they import one another as scripts do, from their own folder."""
  if str(FOLDER) not in sys.path:
    sys.path.append(str(FOLDER))
  return importlib.import_module(name)


@pytest.mark.parametrize("own_streams", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_variant_of_the_step_traces(own_streams):
  """Each balancer with each engine that the benchmark gives it, without computing."""
  step = load("step")
  found = step.variants(2, own_streams)
  assert {balancer.name for balancer, _ in found} == set(balancing.METHODS)
  for balancer, engine in found:
    if balancer.name in ("equal", "pivrg", "graddrop", "moco"):  # one of each kind of need
      run, state, batch = step.build(balancer, engine, num_tasks=2, batch_size=8,
                                     own_streams=own_streams)
      _, logs = jax.eval_shape(run, state, batch)
      assert logs["weights"].shape == (2,)


def test_medians_take_turns_and_stop_in_time():
  timing, order = load("timing"), []

  def sample(name, values):
    values = iter(values)

    def seconds():
      order.append(name)
      return next(values)
    return seconds
  samples = {"a": sample("a", [3.0, 1.0, 2.0]), "b": sample("b", [9.0, 7.0, 8.0])}
  assert timing.medians(samples, 3) == {"a": 2.0, "b": 8.0}
  assert order == ["a", "b"] * 3
  order.clear()
  samples = {"a": sample("a", [3.0, 1.0, 2.0]), "slow": sample("slow", [9.0])}
  assert timing.medians(samples, 3, once=["slow"]) == {"a": 2.0, "slow": 9.0}
  assert order == ["a", "slow", "a", "a"]
  assert timing.medians({"a": sample("a", [5.0, 1.0])}, 2, longest=-1.0) == {"a": 5.0}
  order.clear()
  samples = {"a": sample("a", [3.0, 1.0, 1.0, 1.0]), "b": sample("b", [9.0, 7.0]),
             "c": sample("c", [4.0, 6.0])}
  assert timing.medians(samples, 2, base="a") == {"a": 1.0, "b": 8.0, "c": 5.0}
  assert order == ["a", "b", "a", "c"] * 2


def test_a_sample_counts_all_its_steps():
  def step(state, batch):
    return state + batch, state
  sample, logs = load("timing").sample_of(jax.jit(step), jax.numpy.int32(1), jax.numpy.int32(2),
                                          steps=4)
  assert int(logs) == 1 and sample() > 0


@pytest.mark.parametrize("key, tasks, value, accelerator, verdict", [
    ("equal/torch", 2, 1.25, False, "met"),
    ("equal/torch", 2, 1.25, True, "missed"),
    ("exact/equal", 2, 1.6, False, "met"),
    ("exact/equal", 9, 6.4, False, "missed"),
    ("features/equal", 40, 1.2, True, "missed"),
])
def test_targets(key, tasks, value, accelerator, verdict):
  run, measurements = load("run"), load("measurements")
  line = run.judged(measurements.Figure(key, "", value, {}, tasks), accelerator)
  assert line["verdict"] == verdict


def test_a_missing_peer_is_said():
  """The figure is there, without a value, and the process is never started."""
  peers = load("peers").Peers("false", 1, pathlib.Path())
  assert peers.add("equal", 1) == "not installed"
  measurements = load("measurements")
  figure = measurements.figure_of("equal/torch", "", {"ours": 1.0}, None, "ours", {"num_tasks": 2})
  line = load("run").judged(figure, False)
  assert line["value"] is None and line["verdict"] == "not installed"
  assert line["milliseconds"] == {"ours": 1000.0}
  peers.close()


@pytest.mark.slow
def test_the_bare_step_beside_the_loop_trains_on_a_batch_of_the_experiment():
  config = tiny_config()
  given = {stream: tiny_source(stream) for stream in config.data.streams}
  experiment = build.build(fields.complete(config), given)
  assert load("loop").bare_rate(experiment, steps=1) > 0


def test_engines_look_on_at_the_same_gradients():
  """Every setting that serves a method traces, without drawing the sample."""
  benchmark = load("engines")
  data = benchmark.Problem(jnp.zeros((8, 256)), jnp.zeros((8, 3), jnp.int32))
  balancer = balancing.cagrad()
  engines = [benchmark.exact(), *(engine for *_, engine in benchmark.SETTINGS)]
  step, carry = benchmark.step_of(balancer, engines, data, batch_size=4)
  _, found = jax.eval_shape(step, carry, jnp.zeros((), jnp.int32))
  assert [one["weights"].shape for one in found] == [(3,)] * len(engines)
