"""Every file in `configs/`, with each of its arguments, passes a whole step without computing."""

import pathlib

import jax
import numpy as np
import pytest

from mtl_jax.data import sources
from mtl_jax.data.source import ArrayExamples, Label, Source
from mtl_jax.experiment import build, config, fields

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))

ARGUMENTS = {
    "cifar_mtl": ["", "coarse", "resnet18", "tasks=cifar10", "tasks=cifar100+cifar100_coarse",
                  "independent", "coarse,resnet18,independent"],
}


@pytest.fixture(autouse=True)
def schema(monkeypatch):
  """CIFAR's schema with a few examples."""
  def source(name):
    classes = {"cifar10": {"label": 10}, "cifar100": {"label": 100, "coarse_label": 20}}[name]
    columns = {"image": np.zeros((300, 32, 32, 3), np.uint8),
               **{label: np.zeros(300, np.int32) for label in classes}}
    examples = ArrayExamples(columns)
    labels = {label: Label("class", number) for label, number in classes.items()}
    return Source("schema", {"train": examples, "test": examples}, labels, ("crop", "flip"))
  monkeypatch.setattr(sources, "SOURCES", {
      name: lambda dir, download=True, name=name: source(name) for name in sources.SOURCES})


def test_every_config_has_its_arguments_listed():
  assert {path.stem for path in CONFIGS} == set(ARGUMENTS)


@pytest.mark.parametrize("path, argument", [
    (path, argument) for path in CONFIGS for argument in ARGUMENTS.get(path.stem, [])],
    ids=lambda x: x.stem if isinstance(x, pathlib.Path) else x or "plain")
def test_a_whole_step_has_the_right_shapes(path, argument):
  experiment = build.build(fields.complete(config.load(f"{path}:{argument}")))
  state = jax.eval_shape(lambda: experiment.create_state(0))
  batch = {stream: {name: jax.ShapeDtypeStruct((16, *column.shape[1:]), column.dtype)
                    for name, column in examples.arrays().items()}
           for stream, examples in experiment.examples("train").items()}
  new, logs = jax.eval_shape(experiment.train_step, state, batch)
  kind = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert kind(new) == kind(state)
  assert logs["losses"].shape == (len(experiment.tasks),)
  metrics = jax.eval_shape(experiment.eval_step, state, batch)
  assert set(metrics) == {task.name for task in experiment.tasks}


def test_single_task_runs_have_the_trunk_and_budget_of_the_joint_run():
  path = next(p for p in CONFIGS if p.stem == "cifar_mtl")
  joint, single = (fields.complete(config.load(f"{path}:{argument}")).to_dict()
                   for argument in ("", "tasks=cifar10"))
  for field in ("trunk", "train", "optimizer", "balancer", "seed"):
    assert joint[field] == single[field]
  assert joint["data"]["batch_size"] == single["data"]["batch_size"]
  assert set(single["tasks"]) == {"cifar10"} and set(single["data"]["streams"]) == {"cifar10"}
