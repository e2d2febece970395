"""A tiny experiment that trains in a second: two streams of coloured squares, one device."""

import json

import jax
import ml_collections
import numpy as np
import pytest

from mtl_jax.data import sources
from mtl_jax.data.source import ArrayExamples, Label, Source
from mtl_jax.experiment import build, fields, loop
from mtl_jax.training import sharding


def tiny_source(name: str, *, size: int = 48, origin: str = "tiny") -> Source:
  """Squares whose brightness is the label, and whose left half tells odd from even."""
  classes = {"cifar10": {"label": 4}, "cifar100": {"label": 6, "coarse_label": 2}}[name]

  def examples(count, seed):
    rng = np.random.default_rng([seed, len(name)])
    label = rng.integers(0, classes["label"], count)
    image = rng.integers(0, 40, (count, 8, 8, 3)) + 30 * label[:, None, None, None]
    image[:, :, :4, 0] += 60 * (label % 2)[:, None, None]
    columns = {"image": image.astype(np.uint8), "label": label.astype(np.int32)}
    if "coarse_label" in classes:
      columns["coarse_label"] = (label // 3).astype(np.int32)
    return ArrayExamples(columns)

  return Source(origin, {"train": examples(size, 0), "test": examples(21, 1)},
                {label: Label("class", number) for label, number in classes.items()},
                augmentation=("shift",))


def tiny_config(**changes) -> ml_collections.ConfigDict:
  """A config of two tasks on the tiny sources; dotted fields replace or add."""
  result = ml_collections.ConfigDict({
      "data": {"streams": {"cifar10": {"name": "cifar10"}, "cifar100": {"name": "cifar100"}},
               "batch_size": 8},
      "tasks": {"a": {"name": "classification", "stream": "cifar10", "head": {"name": "linear"}},
                "b": {"name": "classification", "stream": "cifar100", "head": {"name": "linear"}}},
      "trunk": {"name": "cnn", "channels": (4, 4), "width": 8},
      "balancer": {"name": "equal"},
      "optimizer": {"name": "adam", "learning_rate": 0.01},
      "train": {"steps": 12, "evaluate_every_steps": 5, "log_every_steps": 2},
  })
  for name, value in changes.items():
    section = result
    *parents, last = name.split(".")
    for parent in parents:
      if parent not in section:
        section[parent] = ml_collections.ConfigDict()
      section = section[parent]
    with section.ignore_type():
      section[last] = value
  return result


def make(**changes) -> build.Experiment:
  """The tiny experiment, built."""
  return build.build(fields.complete(tiny_config(**changes)))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  """CIFAR's names give the tiny sources, and runs use one device of the eight."""
  monkeypatch.setattr(sources, "SOURCES", {
      name: lambda dir, download=True, name=name: tiny_source(name)
      for name in ("cifar10", "cifar100")})
  monkeypatch.setattr(loop, "data_mesh", lambda: sharding.data_mesh(jax.devices()[:1]))


def records(folder) -> list[dict]:
  """The lines of metrics.jsonl without their times."""
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in line.items() if k != "examples_per_second"} for line in lines]


def final_checksums(folder) -> dict:
  """CRC-32 of every array of the newest checkpoint."""
  newest = max((int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()))
  record = json.loads((folder / "checkpoints" / str(newest) / "record" / "metadata").read_text())
  return json.loads(record["text"])["checksums"]
