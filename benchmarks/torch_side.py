"""The benchmarks' networks in PyTorch, in a process of its own that `peers.py` starts and asks.

Two thread pools in one process disturb each other, so PyTorch lives here and jax elsewhere; and
here may be another Python environment, which needs neither jax nor this package. Weights, images
and labels come from a file, so that both sides start from the same numbers. Requests and answers
are JSON lines:

  {"do": "add", "name": …, "file": …, "network": …, "way": …, "layout": …}  ->  {"losses": [...]}
  {"do": "time", "name": …, "steps": …}                                    ->  {"seconds": …}
  {"do": "drop"}                                                           ->  {}

An answer {"missing": …} names what is not installed. Ways:

  equal              one backward of the summed losses, plain eager PyTorch
  libmtl:METHOD      see `libmtl_way.py`
  torchjd:METHOD     TorchJD's `mtl_backward` and `jac_to_grad`
"""

from collections.abc import Callable, Mapping, Sequence
import json
import os
import sys
import time
from typing import Any

import libmtl_way
import numpy as np
import torch
from torch import nn
import torch.nn.functional as F

Arrays = Mapping[str, np.ndarray]  # by our path, "sharing/trunk/conv1/kernel"


def _filled(layer: nn.Module, **values: np.ndarray) -> nn.Module:
  with torch.no_grad():
    for name, value in values.items():
      getattr(layer, name).copy_(torch.as_tensor(value))
  return layer


def _conv(params: Arrays, name: str, stride: int = 1) -> nn.Module:
  kernel = params[f"{name}/kernel"].transpose(3, 2, 0, 1)
  bias = {"bias": params[f"{name}/bias"]} if f"{name}/bias" in params else {}
  out, into, size, _ = kernel.shape
  layer = nn.Conv2d(into, out, size, stride, padding=size // 2, bias=bool(bias))
  return _filled(layer, weight=kernel, **bias)


def _dense(params: Arrays, name: str) -> nn.Module:
  kernel = params[f"{name}/kernel"]
  return _filled(nn.Linear(*kernel.shape), weight=kernel.T, bias=params[f"{name}/bias"])


def _norm(params: Arrays, name: str) -> nn.Module:
  scale = params[f"{name}/scale"]
  return _filled(nn.BatchNorm2d(len(scale)), weight=scale, bias=params[f"{name}/bias"])


class CNN(nn.Module):
  """`mtl_jax.models.CNN`: two 3x3 convolutions with ReLU and pooling, one dense layer."""

  def __init__(self, params: Arrays):
    super().__init__()
    self.conv1, self.conv2 = (_conv(params, f"sharing/trunk/conv{i}") for i in (1, 2))
    name = "sharing/trunk/dense"
    kernel, channels = params[f"{name}/kernel"], self.conv2.out_channels
    side = round((len(kernel) // channels) ** 0.5)
    # Ours flattens [H, W, C], PyTorch [C, H, W].
    kernel = kernel.reshape(side, side, channels, -1).transpose(2, 0, 1, 3)
    self.dense = _dense({f"{name}/kernel": kernel.reshape(-1, kernel.shape[-1]),
                         f"{name}/bias": params[f"{name}/bias"]}, name)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = F.max_pool2d(F.relu(self.conv1(x)), 2)
    x = F.max_pool2d(F.relu(self.conv2(x)), 2)
    return F.relu(self.dense(x.flatten(1)))


class Block(nn.Module):
  """Two 3x3 convolutions with BatchNorm around an identity or 1x1 shortcut."""

  def __init__(self, params: Arrays, name: str, stride: int):
    super().__init__()
    self.conv1, self.conv2 = _conv(params, f"{name}/conv1", stride), _conv(params, f"{name}/conv2")
    self.bn1, self.bn2 = _norm(params, f"{name}/bn1"), _norm(params, f"{name}/bn2")
    self.shortcut = nn.Identity()
    if f"{name}/downsample_0/kernel" in params:
      self.shortcut = nn.Sequential(_conv(params, f"{name}/downsample_0", stride),
                                    _norm(params, f"{name}/downsample_1"))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    y = F.relu(self.bn1(self.conv1(x)))
    return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
  """`mtl_jax.models.resnet18` with the stem for small images."""

  def __init__(self, params: Arrays):
    super().__init__()
    trunk = "sharing/trunk"
    self.conv1, self.bn1 = _conv(params, f"{trunk}/conv1"), _norm(params, f"{trunk}/bn1")
    self.blocks = nn.Sequential(*(
        Block(params, f"{trunk}/layer{layer}_{block}", 2 if layer > 1 and block == 0 else 1)
        for layer in (1, 2, 3, 4) for block in (0, 1)))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.blocks(F.relu(self.bn1(self.conv1(x)))).mean(dim=(2, 3))


NETWORKS = {"cnn": CNN, "resnet18": ResNet18}


class Model(nn.Module):
  """A trunk and one linear head a task, in the order of the tasks t0, t1, …."""

  def __init__(self, network: str, params: Arrays):
    super().__init__()
    self.trunk = NETWORKS[network](params)
    count = sum(path.startswith("heads_") and path.endswith("/kernel") for path in params)
    self.heads = nn.ModuleList(_dense(params, f"heads_t{i}/dense") for i in range(count))

  def losses(self, images: torch.Tensor,
             labels: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Each task's mean cross-entropy, and the features [B, F] that the heads read."""
    features = self.trunk(images)
    return [F.cross_entropy(head(features), y) for head, y in zip(self.heads, labels)], features


def way_of(name: str, model: Model) -> Callable[[list[torch.Tensor], torch.Tensor], Any]:
  """What turns losses and features into gradients.

  Raises:
    ImportError: where a package that it takes is missing.
    ValueError: for an unknown name.
  """
  library, _, method = name.partition(":")
  shared, count = list(model.trunk.parameters()), len(model.heads)
  if name == "equal":
    return lambda losses, features: sum(losses).backward()
  if library == "libmtl":
    fill = libmtl_way.LibMTLWay(method, shared, count)
    return lambda losses, features: fill(losses)
  if library != "torchjd":
    raise ValueError(f"way: expected equal, libmtl:… or torchjd:…, found {name!r}")
  from torchjd import aggregation, autojac
  aggregator = {"pcgrad": aggregation.PCGrad, "mgda": aggregation.MGDA,
                "cagrad": lambda: aggregation.CAGrad(c=0.5), "upgrad": aggregation.UPGrad,
                "nash_mtl": lambda: aggregation.NashMTL(n_tasks=count)}[method]()

  def fill_by_jacobian(losses: list[torch.Tensor], features: torch.Tensor) -> None:
    autojac.mtl_backward(losses, features=features)
    autojac.jac_to_grad(shared, aggregator)
  return fill_by_jacobian


class Training:
  """Steps of Adam on one batch.

  Args:
    file: `.npz` with images [B, H, W, C], labels [T, B] and our parameters by path.
    network: one of `NETWORKS`.
    way: see above.
    layout: "channels_first", PyTorch's own, or "channels_last".
    precision: "float32", or "bfloat16" for autocast.
  """

  def __init__(self, file: str, network: str, way: str, layout: str = "channels_first",
               precision: str = "float32"):
    self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with np.load(file) as arrays:
      params = {path: arrays[path] for path in arrays.files if "/" in path}
      images, labels = arrays["images"], arrays["labels"]
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    images = torch.as_tensor(images.transpose(0, 3, 1, 2).copy())
    self._images = images.to(self._device, memory_format=memory)
    self._labels = list(torch.as_tensor(labels.astype(np.int64)).to(self._device))
    self.model = Model(network, params).to(self._device, memory_format=memory).train()
    self._way = way_of(way, self.model)
    self._adam = torch.optim.Adam(self.model.parameters(), lr=1e-3)
    self._autocast = torch.autocast(self._device.type, torch.bfloat16,
                                    enabled=precision == "bfloat16")

  def gradients(self) -> list[torch.Tensor]:
    """Fills in the gradients of a step and returns the losses."""
    self._adam.zero_grad()
    with self._autocast:
      losses, features = self.model.losses(self._images, self._labels)
    self._way(losses, features)
    return losses

  def step(self) -> list[torch.Tensor]:
    """One step; returns the losses before it."""
    losses = self.gradients()
    self._adam.step()
    return losses

  def seconds(self, steps: int) -> float:
    """Seconds a step."""
    self._wait()
    start = time.perf_counter()
    for _ in range(steps):
      self.step()
    self._wait()
    return (time.perf_counter() - start) / steps

  def _wait(self) -> None:
    if self._device.type == "cuda":
      torch.cuda.synchronize()


def answer(request: dict[str, Any], trainings: dict[str, Training]) -> dict[str, Any]:
  """What a request is answered by."""
  do, name = request.pop("do"), request.pop("name", None)
  if do == "time":
    return {"seconds": trainings[name].seconds(request["steps"])}
  if do == "drop":
    trainings.clear()
    return {}
  try:
    training = Training(**request)
  except ImportError as error:
    return {"missing": error.name}
  losses = [loss.item() for loss in training.step()]
  trainings[name] = training
  return {"losses": losses}


def main(threads: int) -> None:
  """Answers requests until there are no more."""
  torch.set_num_threads(threads)
  torch.set_float32_matmul_precision("high")  # on accelerators, jax does the same
  torch.backends.cudnn.benchmark = True
  # Solvers print; the answers keep their channel to themselves.
  channel = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  trainings: dict[str, Training] = {}
  version = {"torch": torch.__version__.partition("+")[0]}
  print(json.dumps(version), file=channel, flush=True)
  for line in sys.stdin:
    print(json.dumps(answer(json.loads(line), trainings)), file=channel, flush=True)


if __name__ == "__main__":
  main(int(sys.argv[1]))
