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
    "celeba": ["tasks=Smiling+Male", "one", "one,resnet18"],
    "cifar_mtl": ["", "coarse", "resnet18", "tasks=cifar10", "tasks=cifar100+cifar100_coarse",
                  "independent", "coarse,resnet18,independent"],
    "cityscapes": ["small", "tasks=depth"],
    "digits_mtl": ["", "many", "dense", "many,dense", "tasks=box", "independent"],
    "faces_objects_mtl": ["faces=a,objects=b", "faces=a,tasks=faces",
                          "faces=a,objects=b,object_size=32x48,independent"],
    "image_folder_mtl": ["a", "a,levels=label+other,size=64,resnet18", "{table}"],
    "multi_fashion": ["", "reconstruct", "tasks=right", "independent"],
    "nyuv2": ["small", "", "tasks=normal"],
}

PLAIN = {  # labels of each source, and the size of its images
    "celeba": ({name: Label("class", 2) for name in ("Smiling", "Male")}
               | {"attributes": Label("binary", names=("Smiling", "Male"))}, (64, 64)),
    "cifar10": ({"label": Label("class", 10)}, (32, 32)),
    "cifar100": ({"label": Label("class", 100), "coarse_label": Label("class", 20)}, (32, 32)),
    "cityscapes": ({"segmentation": Label("mask", 7), "depth": Label("map")}, (32, 64)),
    "coco": ({"objects": Label("objects", 3), "count": Label("number")}, (32, 48)),
    "digit_scenes": ({"digit": Label("class", 10), "angle": Label("number"), "box": Label("box"),
                      "objects": Label("objects", 10), "count": Label("number"),
                      "mask": Label("mask", 11), "depth": Label("map")}, (48, 48)),
    "image_folder": ({"label": Label("class", 3), "other": Label("class", 4),
                      "age": Label("number"), "place": Label("box")}, (64, 64)),
    "multi_fashion": ({"left": Label("class", 10), "right": Label("class", 10),
                       "right_image": Label("map")}, (36, 36)),
    "nyuv2": ({"segmentation": Label("mask", 13), "depth": Label("map", depth=True),
               "normal": Label("normals")}, (32, 48)),
}


def column(label: Label, size: tuple[int, int], count: int) -> np.ndarray:
  """Labels of the right shape: those of the first class, all at zero."""
  shape = {"class": (), "binary": (len(label.names),), "number": (), "box": (4,),
           "objects": (5, 5), "mask": size, "map": (*size, 1), "normals": (*size, 3)}[label.kind]
  whole = label.kind in ("class", "binary", "mask")
  return np.zeros((count, *shape), np.int32 if whole else np.float32)


def plain(name: str) -> Source:
  """A source with the labels of the one of that name, and a few black images."""
  labels, size = PLAIN[name]
  examples = ArrayExamples({"image": np.zeros((40, *size, 3), np.uint8),
                            **{key: column(label, size, 40) for key, label in labels.items()}})
  return Source("plain", {"train": examples, "test": examples}, labels)


@pytest.fixture(autouse=True)
def schema(monkeypatch):
  """The labels of every source, and its own arguments, with a few examples."""
  for name, factory in sources.SOURCES.items():
    if name in PLAIN:
      def made(*args, name=name, **kwargs):
        return plain(name)
      made.__wrapped__ = factory  # so that its signature is the factory's
      monkeypatch.setitem(sources.SOURCES, name, made)


def test_every_config_has_its_arguments_listed():
  assert {path.stem for path in CONFIGS} == set(ARGUMENTS)


@pytest.mark.parametrize("path, argument", [
    (path, argument) for path in CONFIGS for argument in ARGUMENTS.get(path.stem, [])],
    ids=lambda x: x.stem if isinstance(x, pathlib.Path) else x or "plain")
def test_a_whole_step_has_the_right_shapes(path, argument, tmp_path):
  if argument == "{table}":
    (tmp_path / "labels.csv").write_text(
        "file,other,age,place_x1,place_y1,place_x2,place_y2\na.png,red,3.5,0,0,9,9\n")
    argument = f"{tmp_path},labels=labels.csv"
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


@pytest.mark.parametrize("name, argument", [("cifar_mtl", "tasks=cifar10"),
                                            ("digits_mtl", "tasks=box"),
                                            ("multi_fashion", "tasks=left")])
def test_single_task_runs_have_the_trunk_and_budget_of_the_joint_run(name, argument):
  path = next(p for p in CONFIGS if p.stem == name)
  joint, single = (fields.complete(config.load(f"{path}:{words}")).to_dict()
                   for words in ("", argument))
  for field in ("trunk", "train", "optimizer", "balancer", "seed"):
    assert joint[field] == single[field]
  assert joint["data"]["batch_size"] == single["data"]["batch_size"]
  assert set(single["tasks"]) == {argument.removeprefix("tasks=")}
