"""CIFAR-10 and CIFAR-100 at once: one trunk, one head for each data set.

  python launch.py --config=configs/cifar_mtl.py

The reference setting of multi-input multi-task learning: every task has its own data set, both
(Krizhevsky, 2009) pass through the trunk as one batch.

Arguments, separated by commas after the file name:

  coarse           adds CIFAR-100's 20 superclasses as a third task on the same images
  resnet18         ResNet-18 with a real training budget, for accelerators: SGD, 200 epochs
  tasks=A[+B…]     only these tasks, of cifar10, cifar100 and cifar100_coarse: `tasks=cifar10` is
                   the single-task run of the same trunk and budget
  independent      one trunk a task, nothing shared

What to expect is in the README: on the bundled sample measured, on CIFAR not yet.
"""

import ml_collections

STREAM_OF = {"cifar10": "cifar10", "cifar100": "cifar100", "cifar100_coarse": "cifar100"}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """The config for an argument string such as "coarse,independent"."""
  words, chosen = _parse(arg)
  tasks = chosen or ("cifar10", "cifar100") + (("cifar100_coarse",) if "coarse" in words else ())

  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = {
      "streams": {stream: {"name": stream} for stream in dict.fromkeys(
          STREAM_OF[task] for task in tasks)},
      "batch_size": 64,
      "missing": "auto",
  }
  config.tasks = {
      task: {
          "name": "classification",
          "stream": STREAM_OF[task],
          "label": "coarse_label" if task == "cifar100_coarse" else "label",
          "head": {"name": "linear"},
      } for task in tasks}
  config.trunk = {"name": "cnn"}
  config.sharing = {"name": "independent" if "independent" in words else "hard"}
  config.balancer = {"name": "equal"}
  config.optimizer = {"name": "adam", "learning_rate": 1e-3, "schedule": {"name": "cosine"}}
  config.train = {"epochs": 8.0}

  if "resnet18" in words:
    # The usual CIFAR recipe (DeVries and Taylor, 2017, arXiv:1708.04552).
    config.trunk = {"name": "resnet18"}
    config.data.batch_size = 128
    config.optimizer = {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "nesterov": True,
                        "weight_decay": 5e-4,
                        "schedule": {"name": "cosine", "warmup_epochs": 5.0}}
    config.train = {"epochs": 200.0}
  return config


def _parse(arg: str) -> tuple[set[str], tuple[str, ...]]:
  """Splits the argument into its words and the chosen tasks."""
  words, chosen = set(), ()
  for word in filter(None, arg.split(",")):
    if word.startswith("tasks="):
      chosen = tuple(word.removeprefix("tasks=").split("+"))
    elif word in ("coarse", "resnet18", "independent"):
      words.add(word)
    else:
      raise ValueError("expected coarse, resnet18, independent or tasks=A[+B…], "
                       f"found {word!r}")
  for task in chosen:
    if task not in STREAM_OF or chosen.count(task) > 1:
      raise ValueError(f"tasks: expected some of {'+'.join(STREAM_OF)}, each once, found {task!r}")
  if chosen and "coarse" in words:
    raise ValueError("expected coarse or tasks=…, found both; name cifar100_coarse among the tasks")
  return words, chosen
