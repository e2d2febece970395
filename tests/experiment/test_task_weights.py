"""The tasks' weights before any balancing: given, or by a rule."""

import numpy as np
import pytest

from mtl_jax.errors import UserError
from mtl_jax.experiment import loop
from mtl_jax.experiment.run import Run
from mtl_jax.training.task_weights import weigh
from tests.experiment.conftest import final_checksums, make, records


def weights_in(folder):
  return [(line["step"], line["a/task_weight"], line["b/task_weight"])
          for line in records(folder) if line["split"] == "train"]


@pytest.mark.slow
def test_given_weights_scale_the_losses(tmp_path):
  plain = make(**{"train.steps": 1})
  weighted = make(**{"train.steps": 1, "task_weights": {"a": 2.0, "b": 0.5}})
  batch = {stream: {name: values[:8] for name, values in examples.arrays().items()}
           for stream, examples in plain.examples("train").items()}
  (_, one), (_, two) = (e.train_step(e.create_state(0), batch) for e in (plain, weighted))
  np.testing.assert_allclose(two["losses"], np.array([2.0, 0.5]) * one["losses"], rtol=1e-6)


@pytest.mark.parametrize("power, expected", [
    (1.0, [0.5, 1.5]), (0.0, [1.0, 1.0]), (0.5, [2 / (1 + 3**0.5), 2 * 3**0.5 / (1 + 3**0.5)]),
    (-1.0, [1.5, 0.5])])
def test_weights_by_hand(power, expected):
  """One value three times the other, their powers brought to a mean of one."""
  np.testing.assert_allclose(weigh(np.array([100.0, 300.0]), power), expected)


def test_by_data_size(monkeypatch):
  """Stream b has a third of its labels missing: 43 - ⌊43 / 3⌋ … of equally many examples."""
  from mtl_jax.data import sources
  from mtl_jax.data.source import ArrayExamples
  from tests.experiment.conftest import tiny_source
  import dataclasses

  def halved(dir, download=True):
    source = tiny_source("cifar100")
    columns = dict(source.splits["train"].columns)
    columns["label"] = np.where(np.arange(48) % 2, -1, columns["label"]).astype(np.int32)
    return dataclasses.replace(source, splits={**source.splits, "train": ArrayExamples(columns)})
  monkeypatch.setitem(sources.SOURCES, "cifar100", halved)
  experiment = make(**{"task_weights": {"name": "data_size"}})
  labels = experiment.sources["cifar100"].splits["train"].column("label")
  sizes = np.array([len(labels), (labels >= 0).sum()])
  np.testing.assert_allclose(experiment.task_weights, sizes / sizes.mean())


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["complexity", "validation"])
def test_by_losses_and_the_same_after_an_interruption(rule, tmp_path, monkeypatch):
  """Stopped after the first evaluation, the run goes on with the weights that it had."""
  changes = {"task_weights": {"name": rule}, "train.log_every_steps": 1}
  loop.train(make(**changes), tmp_path / "whole")
  found = weights_in(tmp_path / "whole")
  lines = records(tmp_path / "whole")
  validation = {line["step"]: np.array([line["a/loss"], line["b/loss"]])
                for line in lines if line["split"] == "validation"}
  if rule == "complexity":
    expected = [weigh(validation[0], -1.0)] * 12
  else:
    expected = [weigh(validation[step] / validation[0], 1.0) for step in [0] * 5 + [5] * 5 + [10] * 2]
  np.testing.assert_allclose([weights[1:] for weights in found], expected, rtol=1e-6)

  saves = Run.save

  def stop_once(run):
    saves(run)
    monkeypatch.setattr(Run, "save", saves)
    run.checkpoints.wait()
    raise loop.Interrupted(15)
  monkeypatch.setattr(Run, "save", stop_once)
  with pytest.raises(loop.Interrupted):
    loop.train(make(**changes), tmp_path / "halves")
  loop.train(make(**changes), tmp_path / "halves")
  assert records(tmp_path / "halves") == lines
  assert final_checksums(tmp_path / "halves") == final_checksums(tmp_path / "whole")


@pytest.mark.parametrize("value, message", [
    (3, "expected one weight for each of a, b, or a section with a name, expected one of data_size"),
    ({"a": 1.0}, "config.task_weights: expected one value for each of a, b; found a"),
    ({"a": 1.0, "b": 0.0}, "config.task_weights.b: expected a number > 0, found 0.0"),
    ({"name": "size"}, "config.task_weights.name: expected one of data_size"),
    ({"name": "data_size", "power": "x"}, "config.task_weights.power: expected a number"),
])
def test_mistakes(value, message):
  with pytest.raises(UserError, match=message):
    make(task_weights=value)
