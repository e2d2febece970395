"""Faces beside objects: a folder of people and a detection set in COCO's layout, one trunk.

  python launch.py --config=configs/faces_objects_mtl.py:faces=~/lfw,objects=~/coco

Two streams of different image sizes pass through one trunk. `faces` is a folder with one folder a
person, such as LFW's (Huang, Ramesh, Berg, Learned-Miller, 2007); whose face it is, is learned with
a margin softmax on unit vectors, so that faces of people it has never seen can be compared.
`objects` is a folder with `instances_*.json` and images (Lin et al., ECCV 2014, arXiv:1405.0312).

Arguments, separated by commas after the file name:

  faces=PATH         folder of the faces, or of any other images in class folders
  objects=PATH       folder of the detection set
  face_size=N        pixels a side of a face; 64
  object_size=HxW    pixels of an image of objects; 128x160
  tasks=A[+B]        only these tasks, of faces and objects: the single-task runs
  independent        one trunk a task, nothing shared

Measured on blood cells (BCCD) beside CIFAR-10's classes as faces; see the README.
"""

import ml_collections

HEADS = {"faces": {"name": "identity", "stream": "faces", "label": "label",
                   "head": {"name": "normalized"}},
         "objects": {"name": "detection", "stream": "objects", "label": "objects",
                     "head": {"name": "detection"}}}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """The config for an argument string such as "faces=~/lfw,objects=~/coco"."""
  words, values = _parse(arg)
  tasks = tuple(values["tasks"].split("+"))
  for task in tasks:
    if task not in HEADS or tasks.count(task) > 1:
      raise ValueError(f"tasks: expected some of {'+'.join(HEADS)}, each once, found {task!r}")
    if not values[task]:
      raise ValueError(f"expected {task}=PATH, the folder of the {task}, found none")
  face_side = _pixels("face_size", values["face_size"], 1)
  streams = {
      "faces": {"name": "image_folder", "path": values["faces"], "size": face_side[0],
                "augmentation": ("flip", "shift")},
      "objects": {"name": "coco", "path": values["objects"],
                  "size": _pixels("object_size", values["object_size"], 2),
                  "augmentation": ("flip", "scale:0.7")},
  }
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = {"streams": {task: streams[task] for task in tasks}, "batch_size": 16}
  config.tasks = {task: HEADS[task] for task in tasks}
  config.trunk = {"name": "cnn", "channels": (32, 64, 64), "width": 128, "pool": "mean"}
  config.sharing = {"name": "independent" if "independent" in words else "hard"}
  config.balancer = {"name": "equal"}
  config.optimizer = {"name": "adam", "learning_rate": 1e-3, "schedule": {"name": "cosine"}}
  config.train = {"steps": 1500, "evaluate_every_steps": 500}
  return config


def _pixels(name: str, text: str, count: int) -> tuple[int, ...]:
  sizes = text.split("x")
  if not all(size.isdigit() for size in sizes) or len(sizes) != count:
    wanted = "a number of pixels" if count == 1 else "height x width, such as 128x160"
    raise ValueError(f"{name}: expected {wanted}, found {text!r}")
  return tuple(map(int, sizes))


def _parse(arg: str) -> tuple[set[str], dict[str, str]]:
  """Splits the argument into its words and its values."""
  words, values = set(), {"faces": "", "objects": "", "face_size": "64",
                          "object_size": "128x160", "tasks": "faces+objects"}
  for word in filter(None, arg.split(",")):
    key, equals, value = word.partition("=")
    if equals and key in values:
      values[key] = value
    elif word == "independent":
      words.add(word)
    else:
      raise ValueError(f"expected {'=, '.join(values)}= or independent, found {word!r}")
  return words, values
