"""Records what PyTorch makes of a narrow ResNet-18, for `test_torchvision.py`.

  python tests/models/record_resnet18.py    (wants torch, which the tests do not)

Written from the paper (He, Zhang, Ren, Sun, CVPR 2016, arXiv:1512.03385) with torchvision's names.
`data/resnet18_narrow.pth` holds the `state_dict` with the stem for ImageNet;
`data/resnet18_narrow.npz` images [B, C, H, W] and features [B, F]: of that network, and of one with
CIFAR's stem, whose first kernel is the middle of the other's.
"""

import pathlib

import numpy as np
import torch
from torch import nn

CHANNELS, CLASSES = 4, 7
FOLDER = pathlib.Path(__file__).parent / "data"


class BasicBlock(nn.Module):
  """Two 3x3 convolutions around an identity or 1x1 shortcut."""

  def __init__(self, inputs: int, outputs: int, stride: int):
    super().__init__()
    self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(outputs)
    self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
    self.bn2 = nn.BatchNorm2d(outputs)
    self.downsample = None
    if stride > 1:
      self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                                      nn.BatchNorm2d(outputs))

  def forward(self, x):
    y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
    return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
  """From images to features; `fc` is there for its name."""

  def __init__(self, stem: str):
    super().__init__()
    size, stride = (7, 2) if stem == "imagenet" else (3, 1)
    self.conv1 = nn.Conv2d(3, CHANNELS, size, stride, size // 2, bias=False)
    self.bn1 = nn.BatchNorm2d(CHANNELS)
    self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
    widths = [CHANNELS, *(CHANNELS * 2 ** i for i in range(4))]
    for i in range(4):
      setattr(self, f"layer{i + 1}", nn.Sequential(
          BasicBlock(widths[i], widths[i + 1], 2 if i else 1),
          BasicBlock(widths[i + 1], widths[i + 1], 1)))
    self.fc = nn.Linear(8 * CHANNELS, CLASSES)

  def forward(self, images):
    x = self.maxpool(torch.relu(self.bn1(self.conv1(images))))
    return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean(dim=(2, 3))


def main():
  """Writes both files."""
  torch.manual_seed(0)
  network = ResNet18("imagenet")
  for module in network.modules():
    if isinstance(module, nn.BatchNorm2d):
      nn.init.uniform_(module.weight, 0.5, 1.5)
      nn.init.uniform_(module.bias, -0.5, 0.5)
      nn.init.uniform_(module.running_mean, -0.5, 0.5)
      nn.init.uniform_(module.running_var, 0.5, 1.5)
  small = ResNet18("cifar")
  weights = network.state_dict()
  small.load_state_dict({**weights, "conv1.weight": weights["conv1.weight"][:, :, 2:5, 2:5]})
  images = torch.randn(2, 3, 22, 18)
  with torch.no_grad():
    features = {stem: module.eval()(images).numpy()
                for stem, module in (("imagenet", network), ("cifar", small))}
  FOLDER.mkdir(exist_ok=True)
  torch.save(network.state_dict(), FOLDER / "resnet18_narrow.pth")
  np.savez(FOLDER / "resnet18_narrow.npz", images=images.numpy(), **features)


if __name__ == "__main__":
  main()
