"""Your own images: point it at a folder and go.

  python launch.py --config=configs/image_folder_mtl.py:~/photos
  python launch.py --config=configs/image_folder_mtl.py:~/shapes,levels=shape+colour
  python launch.py --config=configs/image_folder_mtl.py:~/animals,labels=labels.csv

The folder holds `<split>/<class>/…` or `<class>/…`; with `levels`, one folder inside the other for
each task; with `labels`, a CSV file (relative to the folder) with one line an image and one column
a task. Words become classes, numbers are regressed, four columns `<name>_x1` … `<name>_y2` are a
box. Where nothing says otherwise a fifth is test, and a tenth of the rest validation.

Arguments, separated by commas after the file name:

  PATH              the folder, first
  levels=A[+B…]     a task for each level of nested folders
  labels=FILE       a task for each column of a table
  tasks=A[+B…]      only these tasks
  size=N            pixels a side; 64
  resnet18          ResNet-18 in place of the small reference network
  independent       one trunk a task, nothing shared: does sharing help?

What is wrong with the files is counted and shown at the start.
"""

import pathlib

import ml_collections

from mtl_jax.data.label_table import label_kinds, read_table

KINDS = {"class": "classification", "number": "regression", "box": "boxes"}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """The config for an argument string such as "~/photos,size=96"."""
  path, words, values = _parse(arg)
  levels = tuple(filter(None, values["levels"].split("+")))
  kinds = dict.fromkeys(levels or ("label",), "class")
  if values["labels"]:
    table = read_table(pathlib.Path(path).expanduser() / values["labels"])
    kinds = dict.fromkeys(levels, "class") | label_kinds(table, table.rows)
  tasks = values["tasks"].split("+") if values["tasks"] else [
      name for name, kind in kinds.items() if kind != "none"]
  for task in tasks:
    if task not in kinds or kinds[task] == "none":
      raise ValueError(f"tasks: expected some of {'+'.join(kinds)}, found {task!r}")

  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = {
      "streams": {"images": {"name": "image_folder", "path": path, "size": int(values["size"]),
                             "levels": levels, "labels": values["labels"] or None}},
      "batch_size": 64,
  }
  config.tasks = {task: {"name": KINDS[kinds[task]], "stream": "images", "label": task,
                         "head": {"name": "linear"}} for task in tasks}
  config.trunk = {"name": "cnn", "channels": (32, 64, 64), "width": 128}
  if "resnet18" in words:
    config.trunk = {"name": "resnet18", "stem": "cifar" if int(values["size"]) <= 64 else "imagenet"}
  config.sharing = {"name": "independent" if "independent" in words else "hard"}
  config.balancer = {"name": "equal"}
  config.optimizer = {"name": "adam", "learning_rate": 1e-3, "schedule": {"name": "cosine"}}
  config.train = {"epochs": 20.0}
  return config


def _parse(arg: str) -> tuple[str, set[str], dict[str, str]]:
  """Splits the argument into the folder, words and values."""
  path, *rest = arg.split(",")
  if not path or "=" in path:
    raise ValueError(f"expected the folder of the images first, found {arg!r}")
  words, values = set(), {"levels": "", "labels": "", "tasks": "", "size": "64"}
  for word in filter(None, rest):
    key, equals, value = word.partition("=")
    if equals and key in values:
      values[key] = value
    elif word in ("resnet18", "independent"):
      words.add(word)
    else:
      raise ValueError(f"expected {'=, '.join(values)}=, resnet18 or independent, found {word!r}")
  if not values["size"].isdigit() or int(values["size"]) < 1:
    raise ValueError(f"size: expected a number of pixels, found {values['size']!r}")
  return path, words, values
