"""The names and layouts of torchvision's ResNets, and ours."""

from collections.abc import Mapping
import re

import numpy as np

Path = tuple[str, ...]

_LEAVES = {  # collection and name of what has one axis
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}


def from_torchvision(arrays: Mapping[str, np.ndarray]) -> dict[Path, np.ndarray]:
  """Variables of our trunk, `{(collection, module, …, leaf): array}`, from torchvision's names.

  Kernels of convolutions [O, I, H, W] become [H, W, I, O], those of dense layers [O, I] become
  [I, O]; `num_batches_tracked`, which nothing reads here, is left out.

  >>> found = from_torchvision({"layer2.0.conv1.weight": np.zeros((8, 4, 3, 3)),
  ...                           "layer2.0.downsample.1.running_var": np.ones(8)})
  >>> {"/".join(path): x.shape for path, x in found.items()}  # doctest: +NORMALIZE_WHITESPACE
  {'params/layer2_0/conv1/kernel': (3, 3, 4, 8),
   'batch_stats/layer2_0/downsample_1/var': (8,)}

  Raises:
    ValueError: for a name or a shape that no ResNet of torchvision has.
  """
  result = {}
  for name, x in arrays.items():
    module, _, leaf = name.rpartition(".")
    if leaf == "num_batches_tracked":
      continue
    if not module or leaf not in _LEAVES or x.ndim not in ((1, 2, 4) if leaf == "weight" else (1,)):
      raise ValueError(f"{name}: expected names and shapes of torchvision's ResNet, such as "
                       f"layer1.0.conv1.weight [64, 64, 3, 3]; found {list(x.shape)}")
    collection, ours = _LEAVES[leaf]
    if x.ndim > 1:
      ours, x = "kernel", x.transpose((2, 3, 1, 0) if x.ndim == 4 else (1, 0))
    path = re.sub(r"\.(\d+)", r"_\1", module).split(".")
    result[(collection, *path, ours)] = x
  return result
