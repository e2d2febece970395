"""Digit scenes: what, how turned and where, at once, on real handwriting; nothing to download.

  python launch.py --config=configs/digits_mtl.py
  python launch.py --config=configs/digits_mtl.py:many
  python launch.py --config=configs/digits_mtl.py:dense

Handwritten digits (scikit-learn's) at any place, size and angle on coloured, cluttered paper.
Tasks: the class of the digit, its angle in degrees (regression) and its box.

Arguments, separated by commas after the file name:

  many           up to three digits a scene: all of them are detected, and counted (regression)
  dense          adds the segmentation of the digits and the distance of what is seen
  tasks=A[+B…]   only these tasks of the scene: the single-task run of the same trunk and budget
  independent    one trunk a task, nothing shared

What the first and `many` reach is in the README, as measured; `dense` has not been yet.
"""

import ml_collections

TASKS = {
    "digit": {"name": "classification", "label": "digit", "head": {"name": "linear"}},
    "angle": {"name": "regression", "label": "angle", "head": {"name": "linear"}},
    "box": {"name": "boxes", "label": "box", "head": {"name": "linear"}},
    "digits": {"name": "detection", "label": "objects", "head": {"name": "detection"}},
    "count": {"name": "regression", "label": "count", "head": {"name": "linear"}},
    "mask": {"name": "segmentation", "label": "mask",
             "head": {"name": "upsampling", "channels": 16}},
    "depth": {"name": "depth", "label": "depth", "head": {"name": "upsampling", "channels": 16}},
}

# At equal weights the regressions, which fall fast, starve the class.
WEIGHTS = {"digit": 1.0, "angle": 0.1, "box": 0.5, "digits": 1.0, "count": 0.1, "mask": 1.0,
           "depth": 0.3}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """The config for an argument string such as "many,dense"."""
  words, chosen = _parse(arg)
  many, dense = "many" in words, "dense" in words
  tasks = (("digits", "count") if many else ("digit", "angle", "box"))
  tasks += ("mask", "depth") if dense else ()

  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = {
      "streams": {"scenes": {"name": "digit_scenes", "objects": 3 if many else 1, "dense": dense,
                             "size": 48 if many else 32,
                             "train_examples": 10_000 if many else 20_000}},
      "batch_size": 64,
  }
  config.tasks = {task: {**TASKS[task], "stream": "scenes"} for task in chosen or tasks}
  config.task_weights = {task: WEIGHTS[task] for task in config.tasks}
  config.trunk = {"name": "cnn", "channels": (16, 32, 64, 128), "width": 128}
  config.sharing = {"name": "independent" if "independent" in words else "hard"}
  config.balancer = {"name": "equal"}
  config.optimizer = {"name": "adam", "learning_rate": 1e-3, "schedule": {"name": "cosine"}}
  config.train = {"epochs": 12.0, "evaluate_every_epochs": 3.0}
  if many:
    config.optimizer = {"name": "adam", "learning_rate": 2e-3, "clip_norm": 5.0,
                        "schedule": {"name": "cosine", "warmup_steps": 100}}
    config.train = {"epochs": 8.0, "evaluate_every_epochs": 4.0}
  return config


def _parse(arg: str) -> tuple[set[str], tuple[str, ...]]:
  """Splits the argument into its words and the chosen tasks."""
  words, chosen = set(), ()
  for word in filter(None, arg.split(",")):
    if word.startswith("tasks="):
      chosen = tuple(word.removeprefix("tasks=").split("+"))
    elif word in ("many", "dense", "independent"):
      words.add(word)
    else:
      raise ValueError(f"expected many, dense, independent or tasks=A[+B…], found {word!r}")
  for task in chosen:
    if task not in TASKS or chosen.count(task) > 1:
      raise ValueError(f"tasks: expected some of {'+'.join(TASKS)}, each once, found {task!r}")
  return words, chosen
