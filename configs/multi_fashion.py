"""Multi-Fashion: two garments in one image, one task each.

  python launch.py --config=configs/multi_fashion.py
  python launch.py --config=configs/multi_fashion.py:reconstruct

Two garments of Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017, arXiv:1708.07747) overlaid by the recipe
of MultiMNIST (Sabour, Frosst, Hinton, NeurIPS 2017, arXiv:1710.09829; with garments Lin et al.,
NeurIPS 2019, arXiv:1912.12854). Tasks: the class of the upper left and of the lower right one.

Fashion-MNIST is read from IDX files, where the Debian package dataset-fashion-mnist puts them or
where `--config.data.streams.garments.path=…` says, or from what TFDS has prepared.

Arguments, separated by commas after the file name:

  reconstruct    classifies the left garment and reconstructs the right one
  tasks=A[+B…]   only these tasks, of left, right and right_image: the single-task runs
  independent    one trunk a task, nothing shared

What the two classes reach, together and each alone, is in the README, as measured;
`reconstruct` has not been.
"""

import ml_collections

TASKS = {
    "left": {"name": "classification", "label": "left", "head": {"name": "linear"}},
    "right": {"name": "classification", "label": "right", "head": {"name": "linear"}},
    "right_image": {"name": "reconstruction", "label": "right_image",
                    "head": {"name": "upsampling", "channels": 16}},
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """The config for an argument string such as "reconstruct"."""
  words, chosen = _parse(arg)
  tasks = chosen or (("left", "right_image") if "reconstruct" in words else ("left", "right"))

  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = {
      "streams": {"garments": {"name": "multi_fashion", "reconstruct": "right_image" in tasks}},
      "batch_size": 128,
  }
  config.tasks = {task: {**TASKS[task], "stream": "garments"} for task in tasks}
  config.trunk = {"name": "cnn"}
  config.sharing = {"name": "independent" if "independent" in words else "hard"}
  config.balancer = {"name": "equal"}
  config.optimizer = {"name": "adam", "learning_rate": 1e-3, "schedule": {"name": "cosine"}}
  config.train = {"epochs": 5.0}
  return config


def _parse(arg: str) -> tuple[set[str], tuple[str, ...]]:
  """Splits the argument into its words and the chosen tasks."""
  words, chosen = set(), ()
  for word in filter(None, arg.split(",")):
    if word.startswith("tasks="):
      chosen = tuple(word.removeprefix("tasks=").split("+"))
    elif word in ("reconstruct", "independent"):
      words.add(word)
    else:
      raise ValueError(f"expected reconstruct, independent or tasks=A[+B…], found {word!r}")
  for task in chosen:
    if task not in TASKS or chosen.count(task) > 1:
      raise ValueError(f"tasks: expected some of {'+'.join(TASKS)}, each once, found {task!r}")
  return words, chosen
