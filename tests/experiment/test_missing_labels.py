"""Labels that are missing here and there: the run trains, and its metrics are those of the rest."""

import dataclasses

import jax
import numpy as np
import pytest

from mtl_jax.data.source import ArrayExamples, Label, Source, column
from mtl_jax.errors import UserError
from mtl_jax.experiment import build, datasets, evaluation, fields, loop
from mtl_jax.training.sharding import data_mesh
from tests.experiment.conftest import make, records, tiny_config

KINDS = {
    "class": ("classification", Label("class", 3)),
    "flags": ("multilabel", Label("binary", names=("a", "b"))),
    "number": ("regression", Label("number")),
    "box": ("boxes", Label("box")),
    "objects": ("detection", Label("objects", 2)),
    "mask": ("segmentation", Label("mask", 3)),
    "map": ("depth", Label("map")),
    "normal": ("normals", Label("normals")),
}
HEADS = {"detection": "detection", "segmentation": "upsampling", "depth": "upsampling",
         "normals": "fpn"}


def columns(count: int, seed: int) -> dict[str, np.ndarray]:
  """Random images with a label of every kind."""
  rng = np.random.default_rng(seed)
  box = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1).reshape(count, 4)
  normal = rng.normal(size=(count, 8, 8, 3))
  return {
      "image": rng.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8),
      "class": rng.integers(0, 3, count).astype(np.int32),
      "flags": rng.integers(0, 2, (count, 2)).astype(np.int32),
      "number": rng.normal(5, 2, count).astype(np.float32),
      "box": box.astype(np.float32),
      "objects": np.concatenate([box, rng.integers(0, 2, (count, 1))], 1)[:, None].astype(
          np.float32),
      "mask": rng.integers(0, 3, (count, 8, 8)).astype(np.int32),
      "map": rng.uniform(1, 2, (count, 8, 8)).astype(np.float32),
      "normal": (normal / np.linalg.norm(normal, axis=-1, keepdims=True)).astype(np.float32),
  }


def source_of(train: dict, test: dict) -> Source:
  return Source("all kinds", {"train": ArrayExamples(train), "test": ArrayExamples(test)},
                {name: label for name, (_, label) in KINDS.items()})


def config_of(**changes):
  heads = {name: {"name": HEADS.get(kind, "linear")} for name, (kind, _) in KINDS.items()}
  for name in ("mask", "map", "normal", "objects"):
    heads[name]["channels"] = 8
  config = tiny_config(**{
      "train.steps": 2, "train.evaluate_every_steps": 2, "train.log_every_steps": 1,
      "data.batch_size": 8, "trunk.channels": (4,), **changes})
  config.data.streams = {"s": {"name": "cifar10"}}
  config.tasks = {name: {"name": kind, "stream": "s", "label": name, "head": heads[name]}
                  for name, (kind, _) in KINDS.items()}
  return fields.complete(config)


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.3])
def test_every_kind_of_task_trains_on_what_is_there(fraction, tmp_path):
  """30 % of each label of train is missing; test metrics are those of examples masked by hand."""
  test = columns(20, 1)
  gone = {name: np.random.default_rng(2).permutation(20) < 6 for name in KINDS}
  masked = {name: np.where(gone[name].reshape(-1, *(1,) * (values.ndim - 1)),
                           np.nan if values.dtype.kind == "f" else -1, values).astype(values.dtype)
            if name in gone else values for name, values in test.items()}
  experiment = build.build(config_of(**{"data.drop_labels": fraction}),
                           given={"s": source_of(columns(40, 0), masked)})
  train = experiment.sources["s"].splits["train"]
  for name in KINDS:
    values = column(train, name).reshape(len(train), -1)
    absent = np.isnan(values).all(1) if values.dtype.kind == "f" else (values < 0).all(1)
    assert absent.sum() == round(fraction * len(train)) == 11

  summary = loop.train(experiment, tmp_path)
  numbers = [value for line in records(tmp_path) for value in line.values()
             if isinstance(value, float)]
  assert np.isfinite(numbers).all()

  mesh = data_mesh(jax.devices()[:1])
  state = experiment.create_state(0)
  found = evaluation.evaluator(experiment, mesh)(state, "test")
  assert set(found) == set(summary["test"])
  for task in experiment.tasks:
    rest = {name: values[~gone[task.label]] for name, values in test.items()}
    left = dataclasses.replace(experiment, sources={"s": dataclasses.replace(
        experiment.sources["s"], splits={"test": ArrayExamples(rest)})})
    expected = evaluation.evaluator(left, mesh)(state, "test")
    for metric in task.all_metrics:
      name = f"{task.name}/{metric.name}"
      np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=name)


def test_a_fraction_of_each_label_is_dropped_on_its_own():
  config = config_of(**{"data.drop_labels": 0.25})
  source = datasets.load(config, {"s": source_of(columns(80, 0), columns(20, 1))})["s"]
  train = source.splits["train"]
  first, second = (column(train, name) for name in ("class", "number"))
  missing = np.stack([first < 0, np.isnan(second)])
  assert missing.sum(axis=1).tolist() == [18, 18] and 0 < (missing.all(axis=0)).sum() < 18
  for i in range(len(train)):
    assert train[i]["class"] == first[i] and np.isnan(train[i]["number"]) == np.isnan(second[i])
  assert not np.isnan(column(source.splits["test"], "number")).any()


@pytest.mark.parametrize("task", [
    {"name": "identity", "label": "class", "head": {"name": "normalized"}},
    pytest.param({"name": "reconstruction", "label": "image",
                  "head": {"name": "upsampling", "channels": 8}}, marks=pytest.mark.slow),
], ids=["identity", "reconstruction"])
def test_metrics_are_exact_however_a_split_is_cut(task):
  """20 examples in batches of 8, the last one padded, as in one of 20: metrics that are gathered,
  too, and those of the image itself, whose padding carries no missing label."""
  found = []
  for size in (8, 20):
    config = tiny_config(**{"data.batch_size": 8, "data.evaluation_batch_size": size})
    config.data.streams = {"s": {"name": "cifar10"}}
    config.tasks = {"t": {**task, "stream": "s"}}
    experiment = build.build(fields.complete(config),
                             given={"s": source_of(columns(40, 0), columns(20, 1))})
    evaluate = evaluation.evaluator(experiment, data_mesh(jax.devices()[:1]))
    found.append(evaluate(experiment.create_state(0), "test"))
  assert found[0] == pytest.approx(found[1], rel=1e-5) and len(found[0]) > 1


def test_mistakes():
  with pytest.raises(UserError, match="config.data.drop_labels: expected a fraction"):
    make(**{"data.drop_labels": 1.0})
