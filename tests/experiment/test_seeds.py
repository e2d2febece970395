"""Several seeds in one program: each as if alone, whatever happens on the way."""

import contextlib
import json
import os
import statistics
import threading

import jax
import numpy as np
import pytest

from mtl_jax import balancing
from mtl_jax.data import sources
from mtl_jax.data.source import ArrayExamples, Label, Source, Subset, Unlabelled
from mtl_jax.data.streams import resident_batch
from mtl_jax.data.views import view_of, viewed_batch
from mtl_jax.errors import UserError
from mtl_jax.experiment import fields, loop, seeds, seeds_stepper
from mtl_jax.experiment.cores import cores
from mtl_jax.experiment.run import Run
from mtl_jax.randomness import purpose_key
from mtl_jax.testing import jacobians
from mtl_jax.training import sharding
from tests.balancing.rows import ROWS
from tests.experiment.conftest import final_checksums, make, records, tiny_config, tiny_source
from tests.experiment.test_resume import Killed

CHANGES = {"seed": 3, "balancer.name": "graddrop", "data.drop_labels": 0.2, "train.steps": 6,
           "train.evaluate_every_steps": 2, "train.log_every_steps": 1}
TOGETHER = {**CHANGES, "seeds": 2}


def complete(**changes):
  return fields.complete(tiny_config(**changes))


def numbers(line):
  return {name: value for name, value in line.items() if isinstance(value, float)}


def assert_alike(found, expected):
  """Records of the same steps with the same fields and, to float tolerance, numbers."""
  assert [line.keys() for line in found] == [line.keys() for line in expected]
  for one, other in zip(found, expected):
    assert one["step"] == other["step"] and one["split"] == other["split"]
    assert numbers(one) == pytest.approx(numbers(other), rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("vectorized, steps_per_call", [
    pytest.param(False, None, id="in-turn", marks=pytest.mark.slow),
    pytest.param(True, 2, id="vectorized", marks=pytest.mark.slow)])
def test_each_seed_is_as_if_alone(tmp_path, monkeypatch, vectorized, steps_per_call):
  changes = {"train.steps_per_call": steps_per_call}
  monkeypatch.setattr(seeds_stepper, "vectorized", lambda: vectorized)
  summary = seeds.train(complete(**TOGETHER, **changes), tmp_path / "all")
  assert summary == json.loads((tmp_path / "all" / "summary.json").read_text())
  ends = []
  for seed in (3, 4):
    alone, one = tmp_path / str(seed), tmp_path / "all" / f"seed{seed}"
    experiment = make(**{**CHANGES, **changes, "seed": seed})
    ends.append(loop.train(experiment, alone))
    assert_alike(records(one), records(alone))
    assert (one / "config.json").read_text() == (alone / "config.json").read_text()
    names = lambda folder: {p.name.split(".")[0] for p in folder.iterdir()}
    assert names(one) == names(alone) >= {"checkpoints", "config", "events", "metrics", "summary"}
    loop.evaluate(experiment, one)  # raises where a number differs
  assert summary["seeds"] == [3, 4]
  for split in ("validation", "test"):
    for name, found in summary[split].items():
      values = [end[split][name] for end in ends]
      assert found["values"] == pytest.approx(values, rel=2e-3)
      assert found["mean"] == pytest.approx(np.mean(values), rel=2e-3)
      assert found["std"] == pytest.approx(statistics.stdev(found["values"]))
  assert len(set(summary["test"]["a/loss"]["values"])) == 2


@pytest.mark.parametrize("devices, called_from", [(1, [0, 1, 0]), (8, [0, 0, 0])], ids=str)
def test_in_turn_two_cores_take_two_seeds_steps_at_a_time(monkeypatch, devices, called_from):
  """One device's, once they are compiled: of several devices they could wait for each other."""
  threads = {}

  def compile_steps(*_):
    def run(state, data):
      threads[state] = threading.get_ident()
      return state + 1, -state
    return run
  monkeypatch.setattr(seeds_stepper, "sharded_resident_steps", compile_steps)
  monkeypatch.setattr(seeds_stepper, "cores", lambda: 2)
  experiments = [make(seed=seed) for seed in range(3)]
  with contextlib.ExitStack() as stack:
    steps = seeds_stepper.seeds_steps(experiments, sharding.data_mesh(jax.devices()[:devices]),
                                      stack)
    assert steps([10, 20, 30], 1) == ([11, 21, 31], [-10, -20, -30])
    assert steps([11, 21, 31], 1) == ([12, 22, 32], [-11, -21, -31])
  assert [threads[state] for state in (10, 20, 30)] == [threading.get_ident()] * 3
  found = [threads[state] for state in (11, 21, 31)]
  assert [found.index(thread) for thread in found] == called_from
  assert threading.get_ident() not in found


def test_cores_are_those_that_the_process_may_use(monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
  monkeypatch.setattr(os, "cpu_count", lambda: 64)
  assert cores() == 1
  monkeypatch.delattr(os, "sched_getaffinity")
  assert cores() == 64


DEATHS = [  # the place, and at which of the two seeds' calls in turn
    ("save", 2),  # of step 2: the first seed has it, the second has none
    ("save", 4),  # of step 4: the first seed is ahead
    ("step", 1),
    ("validate", 2),
    ("finish", 2),  # the first seed is finished
]


@pytest.mark.slow
def test_deaths_change_nothing(tmp_path, monkeypatch, capsys):
  config = complete(**TOGETHER)
  whole = seeds.train(config, tmp_path / "whole")
  for place, count in DEATHS:
    calls = []

    def dying(real, place=place, count=count, calls=calls):
      def wrapped(*args):
        calls.append(1)
        if len(calls) == count:
          raise Killed(place)
        return real(*args)
      return wrapped

    with monkeypatch.context() as patch:
      if place == "step":
        stepper = loop.stepper
        patch.setattr(loop, "stepper", lambda *args: dying(stepper(*args)))
      else:
        patch.setattr(Run, place, dying(getattr(Run, place)))
      with pytest.raises(Killed):
        seeds.train(config, tmp_path / "broken")
  assert seeds.train(config, tmp_path / "broken") == whole
  assert "seed3 holds a finished run" in capsys.readouterr().out
  for seed in ("seed3", "seed4"):
    assert records(tmp_path / "whole" / seed) == records(tmp_path / "broken" / seed)
    assert final_checksums(tmp_path / "whole" / seed) == final_checksums(tmp_path / "broken" / seed)
  assert seeds.train(config, tmp_path / "broken") == whole
  assert "holds finished runs" in capsys.readouterr().out
  seeds.evaluate(config, tmp_path / "whole")


@pytest.mark.slow
def test_a_step_that_one_seed_lacks_is_done_again_by_all(tmp_path, capsys):
  """Whatever is damaged or gone of one seed, all go on from the newest step left in common."""
  config = complete(**TOGETHER)
  whole = seeds.train(config, tmp_path)
  before = [records(tmp_path / seed) for seed in ("seed3", "seed4")]
  for folder in (tmp_path, tmp_path / "seed3", tmp_path / "seed4"):
    (folder / "summary.json").unlink()
  (tmp_path / "seed4" / "checkpoints" / "6" / "record" / "metadata").write_text("")
  assert seeds.train(config, tmp_path) == whole
  out = capsys.readouterr().out
  assert "checkpoint 6 is damaged" in out and "continuing from step 4" in out
  assert [records(tmp_path / seed) for seed in ("seed3", "seed4")] == before

  for folder in (tmp_path, tmp_path / "seed3", tmp_path / "seed4"):
    (folder / "summary.json").unlink()
  for path in (tmp_path / "seed3" / "checkpoints").iterdir():
    path.rename(path.with_name(f"damaged-{path.name}"))
  with pytest.raises(UserError, match="expected a checkpoint of one step in each"):
    seeds.train(config, tmp_path)


@pytest.mark.parametrize("changes, message", [
    ({"seeds": 0}, "config.seeds: expected a size of at least 1, found 0"),
    ({"seeds": -2}, "config.seeds: expected a size of at least 1, found -2"),
    ({"seeds": 1.5}, "config.seeds: expected a whole number, found 1.5"),
    ({"seeds": 2, "seed": 2**32 - 1}, "config.seed: expected 0 … 2\\*\\*32 - 2, found"),
    ({"seeds": 2, "data.folds": 3}, "config.seeds: expected 1 with all folds in turn, found 2"),
    ({"seeds": 2, "data.engine": "grain"}, r"config.seeds: expected 1 with data from the host"),
])
def test_mistakes(changes, message, tmp_path):
  with pytest.raises(UserError, match=message) as error:
    seeds.train(complete(**changes), tmp_path)
  assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_diverging_seed_is_named(tmp_path):
  config = complete(**{"seeds": 2, "optimizer.name": "sgd", "optimizer.learning_rate": 1e12})
  with pytest.raises(UserError, match=r"seed [01], step \d+: .*task "):
    seeds.train(config, tmp_path)


def test_weights_that_do_not_fit_leave_the_folders_to_another_config(tmp_path):
  config = complete(**{"seeds": 2, "init_from.path": str(tmp_path / "nowhere")})
  with pytest.raises(UserError, match="config.init_from.path"):
    seeds.train(config, tmp_path / "all")
  assert not list((tmp_path / "all").rglob("config.json"))


@pytest.mark.slow
def test_tasks_that_scale_their_labels_are_each_seeds_own(tmp_path, monkeypatch):
  """The mean of numbers differs between the seeds' training splits, and so do their programs."""
  def numbered(dir, download=True):
    source = tiny_source("cifar10")
    of = lambda split: ArrayExamples({
        "image": source.splits[split].columns["image"],
        "age": source.splits[split].columns["label"].astype(np.float32) * 10})
    return Source("tiny", {"train": of("train"), "test": of("test")}, {"age": Label("number")})

  monkeypatch.setitem(sources.SOURCES, "cifar10", numbered)
  changes = {"tasks.a": {"name": "regression", "stream": "cifar10", "label": "age",
                         "head": {"name": "linear"}},
             "train.steps": 2, "train.evaluate_every_steps": 2, "train.log_every_steps": 1}
  monkeypatch.setattr(seeds_stepper, "vectorized", lambda: True)
  seeds.train(complete(**changes, seeds=2), tmp_path / "all")
  experiment = make(**changes, seed=1)
  loop.train(experiment, tmp_path / "alone")
  assert_alike(records(tmp_path / "all" / "seed1"), records(tmp_path / "alone"))
  loop.evaluate(experiment, tmp_path / "all" / "seed1")


def test_views_give_the_batches_of_the_splits():
  rng = np.random.default_rng(0)
  whole = ArrayExamples({"image": rng.integers(0, 255, (20, 2, 2, 3)).astype(np.uint8),
                         "label": np.arange(20, dtype=np.int32),
                         "numbers": rng.normal(size=(20, 3)).astype(np.float32)})
  examples = Unlabelled(Subset(whole, rng.permutation(20)[:14]),
                        {"label": rng.random(14) < 0.3, "numbers": rng.random(14) < 0.3})
  examples = Subset(examples, np.arange(12)[::-1])
  found, view = view_of(examples)
  assert found is whole and len(view.rows) == 12
  seed, turns = np.uint32(5), {"s": np.int32(3)}
  expected = resident_batch({"s": jax.device_put(dict(examples.arrays()))}, 8, seed, turns)
  batch = viewed_batch({"s": jax.device_put(dict(whole.arrays()))},
                       {"s": jax.device_put(view)}, 8, seed, turns)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), batch, expected)
  assert (batch["s"]["label"] == -1).any() and np.isnan(batch["s"]["numbers"]).any()


@pytest.mark.parametrize("row", [row for row in ROWS if row.draws],
                         ids=lambda row: f"{row.name}-{row.build(3).name}")
def test_seeds_draw_their_own_numbers(row):
  """Vectorized over seeds, a method that draws decides as each seed alone does."""
  jacobian = jax.numpy.asarray(jacobians.conflicting())
  decide = lambda seed: balancing.aggregate(row.build(3), jacobian,
                                            key=purpose_key(seed, "balancer", 0))[0]
  together = jax.vmap(decide)(np.arange(8, dtype=np.uint32))
  np.testing.assert_allclose(together[5], decide(np.uint32(5)), rtol=1e-5, atol=1e-6)
  assert np.ptp(together, axis=0).max() > 1e-3


@pytest.mark.slow
def test_eight_devices_train_the_seeds_of_one(tmp_path, monkeypatch):
  """The batch of every seed is split over the devices."""
  monkeypatch.setattr(seeds_stepper, "vectorized", lambda: True)
  config = complete(**{**TOGETHER, "train.steps": 2})
  ends = {}
  for count in (1, 8):
    monkeypatch.setattr(loop, "data_mesh",
                        lambda count=count: sharding.data_mesh(jax.devices()[:count]))
    ends[count] = seeds.train(config, tmp_path / str(count))["test"]
  for name, found in ends[1].items():
    assert ends[8][name]["values"] == pytest.approx(found["values"], rel=1e-3)
