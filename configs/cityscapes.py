"""Cityscapes: semantic segmentation and depth of street scenes.

  python launch.py --config=configs/cityscapes.py --config.data.streams.streets.path=~/cityscapes

Cordts et al.: The Cityscapes Dataset for Semantic Urban Scene Understanding (CVPR 2016,
arXiv:1604.01685), as Liu, Johns and Davison have preprocessed it (CVPR 2019, arXiv:1803.10704):
2,975 train and 500 test images of 128x256, 7 classes, inverse depth. Published work selects on
test; here a tenth of train is the validation set.

Arguments, separated by commas after the file name:

  small        a small network, to try things on a CPU
  tasks=A[+B]  only these tasks, of segmentation and depth

Not measured here: the data is not to be had without its authors' sites.
"""

import ml_collections

TASKS = {
    "segmentation": {"name": "segmentation", "label": "segmentation"},
    "depth": {"name": "depth", "label": "depth"},
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """The config for an argument string such as "small"."""
  words, chosen = set(), tuple(TASKS)
  for word in filter(None, arg.split(",")):
    if word.startswith("tasks="):
      chosen = tuple(word.removeprefix("tasks=").split("+"))
    elif word == "small":
      words.add(word)
    else:
      raise ValueError(f"expected small or tasks=A[+B…], found {word!r}")
  for task in chosen:
    if task not in TASKS or chosen.count(task) > 1:
      raise ValueError(f"tasks: expected some of {'+'.join(TASKS)}, each once, found {task!r}")

  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = {"streams": {"streets": {"name": "cityscapes"}}, "batch_size": 8,
                 "augmentation": ("flip", "scale:0.83")}
  config.tasks = {task: {**TASKS[task], "stream": "streets", "head": {"name": "fpn"}}
                  for task in chosen}
  config.trunk = {"name": "resnet18", "stem": "imagenet"}
  if "small" in words:
    config.trunk = {"name": "cnn", "channels": (16, 32, 64), "width": 64}
  config.sharing = {"name": "hard"}
  config.balancer = {"name": "equal"}
  config.optimizer = {"name": "adam", "learning_rate": 1e-4,
                      "schedule": {"name": "steps", "at": (0.5,), "factor": 0.5}}
  config.train = {"epochs": 200.0, "evaluate_every_epochs": 10.0}
  return config
