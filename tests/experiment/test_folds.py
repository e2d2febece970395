"""Cross-validation: every example is held out once, a stopped one continues, and the numbers add up."""

import json
import statistics

import numpy as np
import pytest

from mtl_jax.data.source import column
from mtl_jax.data.splits import with_fold
from mtl_jax.errors import UserError
from mtl_jax.experiment import build, fields, folds, loop
from tests.experiment.conftest import tiny_config, tiny_source

CHANGES = {"train.steps": 4, "train.evaluate_every_steps": 2, "data.folds": 3}


def test_every_example_is_held_out_once():
  source = tiny_source("cifar10")
  images = column(source.splits["train"], "image").reshape(48, -1)
  held_out = []
  for fold in range(5):
    splits = with_fold(source, 5, fold, seed=3).splits
    train, test = (column(splits[name], "image").reshape(-1, 192) for name in ("train", "test"))
    assert len(train) + len(test) == 48 and len(test) in (9, 10)
    assert not {x.tobytes() for x in train} & {x.tobytes() for x in test}
    held_out.append(test)
  order = lambda rows: sorted(row.tobytes() for row in rows)
  assert order(np.concatenate(held_out)) == order(images)


@pytest.mark.slow
def test_folds_continue_and_are_summed_up(tmp_path, monkeypatch):
  config = fields.complete(tiny_config(**CHANGES))
  whole = folds.train(config, tmp_path / "whole")
  trained, stop = [], loop.train

  def interrupted(experiment, workdir):
    trained.append(workdir.name)
    if len(trained) == 2:
      raise loop.Interrupted(15)
    return stop(experiment, workdir)

  monkeypatch.setattr(loop, "train", interrupted)
  with pytest.raises(loop.Interrupted):
    folds.train(config, tmp_path / "halves")
  monkeypatch.setattr(loop, "train", stop)
  again = folds.train(config, tmp_path / "halves")
  assert again == whole == json.loads((tmp_path / "whole" / "summary.json").read_text())
  for name, found in whole["test"].items():
    values = [json.loads((tmp_path / "whole" / f"fold{i}" / "summary.json").read_text())
              ["test"][name] for i in range(3)]
    assert found["values"] == values and len(set(values)) > 1
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["std"] == pytest.approx(statistics.stdev(values))
  folds.evaluate(config, tmp_path / "whole")  # raises where the numbers differ


@pytest.mark.slow
def test_the_folder_of_another_cross_validation_is_refused(tmp_path):
  folds.train(fields.complete(tiny_config(**CHANGES)), tmp_path)
  other = fields.complete(tiny_config(**{**CHANGES, "data.folds": 2}))
  with pytest.raises(UserError, match="config.data.folds: 3 there, 2 here"):
    folds.train(other, tmp_path)


@pytest.mark.parametrize("changes, message", [
    ({"data.folds": 1}, "config.data.folds: expected at least 2, found 1"),
    ({"data.folds": 3, "data.fold": 3}, "config.data.fold: expected one of 0 … "),
    ({"data.fold": 0}, "config.data.fold: expected one of 0 … "),
    ({"data.folds": 49, "data.fold": 0}, "config.data.folds: expected 2 to 48"),
])
def test_mistakes(changes, message):
  with pytest.raises(UserError, match=message):
    build.build(fields.complete(tiny_config(**changes)))
