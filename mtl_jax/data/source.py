"""A source: the examples of one data set, by split, and what its labels mean."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Protocol

import numpy as np


class Examples(Protocol):
  """A random-access sequence of examples `{"image": uint8 [H, W, C], "<label>": int32 []}`."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...

  def arrays(self) -> Mapping[str, np.ndarray]:
    """All examples at once, stacked along a leading axis of length N."""
    ...


@dataclasses.dataclass(frozen=True)
class ArrayExamples:
  """Examples held in memory as arrays with a common leading axis.

  >>> examples = ArrayExamples({"image": np.zeros((2, 4, 4, 3), np.uint8), "label": np.arange(2)})
  >>> len(examples), int(examples[1]["label"])
  (2, 1)
  """

  columns: Mapping[str, np.ndarray]

  def __post_init__(self):
    sizes = {name: len(column) for name, column in self.columns.items()}
    if len(set(sizes.values())) != 1:
      raise ValueError(f"expected columns of one length, found {sizes}")

  def __len__(self) -> int:
    return len(next(iter(self.columns.values())))

  def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
    return {name: column[index] for name, column in self.columns.items()}

  def arrays(self) -> Mapping[str, np.ndarray]:
    return self.columns


@dataclasses.dataclass(frozen=True)
class Subset:
  """Some examples of another sequence, in the order of `indices`."""

  examples: Examples
  indices: np.ndarray

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
    return self.examples[int(self.indices[index])]

  def arrays(self) -> Mapping[str, np.ndarray]:
    return {name: column[self.indices] for name, column in self.examples.arrays().items()}


@dataclasses.dataclass(frozen=True)
class Source:
  """One data set.

  Attributes:
    origin: where the examples really come from, as reported to the user and written into the
      run folder: "tfds:cifar10:3.0.2", or "sample" for the bundled sample.
    splits: examples by split name: "train" and "test", and "validation" where the set has one.
    num_classes: number of classes of each integer label.
    augmentation: names of the augmentations that leave these labels true.
  """

  origin: str
  splits: Mapping[str, Examples]
  num_classes: Mapping[str, int]
  augmentation: Sequence[str] = ()
