"""A source: the examples of one data set, by split, and what its labels mean."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Protocol

import numpy as np


KINDS = ("class", "binary", "number", "box", "objects", "mask", "map", "normals")


@dataclasses.dataclass(frozen=True)
class Label:
  """What a label of a source is: what an example holds under its name, and how it moves.

  | kind | of one example | missing |
  |---|---|---|
  | `class` | int32 [], one of `num_classes` | -1 |
  | `binary` | int32 [L], 0 or 1 for each of L attributes | -1, each on its own |
  | `number` | float32 [] or [D], which no augmentation changes | NaN, each on its own |
  | `box` | float32 [4]: x1, y1, x2, y2 as fractions of width and height | NaN |
  | `objects` | float32 [M, 5]: boxes and their class; absent ones 0 with class -1 | NaN throughout |
  | `mask` | int32 [H, W], a class a pixel | -1, each pixel on its own |
  | `map` | float32 [H, W] or [H, W, C], numbers a pixel | NaN, each pixel on its own |
  | `normals` | float32 [H, W, 3], unit vectors (x right, y down) | NaN, each pixel on its own |

  Attributes:
    kind: one of `KINDS`.
    num_classes: of "class", "objects" and "mask"; else None.
    names: of the classes, or of the attributes; () where they have none.
    depth: of "map": whether the numbers are distances from the camera, which a zoom divides by its
      factor, as if the camera had come nearer.
  """

  kind: str = "class"
  num_classes: int | None = None
  names: Sequence[str] = ()
  depth: bool = False


class Examples(Protocol):
  """A random-access sequence of examples: `{"image": uint8 [H, W, C], label: …}`, see `Label`.

  Where the images cost much to read, a method `column(name)` gives one label of all without them;
  where several examples are faster read together, `rows(indices)` gives them stacked.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...

  def arrays(self) -> Mapping[str, np.ndarray]:
    """All examples at once, stacked along a leading axis of length N."""
    ...


def column(examples: Examples, name: str) -> np.ndarray:
  """One label of all examples, stacked."""
  if hasattr(examples, "column"):
    return examples.column(name)
  return np.stack([np.asarray(examples[i][name]) for i in range(len(examples))])


def rows(examples: Examples, indices: Sequence[int]) -> dict[str, np.ndarray]:
  """The examples at some places, one at least, stacked.

  >>> digits = Subset(ArrayExamples({"label": np.array([7, 8, 9])}), np.array([2, 0]))
  >>> rows(Unlabelled(digits, {"label": np.array([False, True])}), [1, 0])["label"].tolist()
  [-1, 9]
  """
  if hasattr(examples, "rows"):
    return examples.rows(indices)
  found = [examples[int(index)] for index in indices]
  return {name: np.stack([example[name] for example in found]) for name in found[0]}


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
    return {name: values[index] for name, values in self.columns.items()}

  def arrays(self) -> Mapping[str, np.ndarray]:
    return self.columns

  def column(self, name: str) -> np.ndarray:
    return self.columns[name]

  def rows(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
    return {name: values[np.asarray(indices)] for name, values in self.columns.items()}


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
    return {name: values[self.indices] for name, values in self.examples.arrays().items()}

  def column(self, name: str) -> np.ndarray:
    return column(self.examples, name)[self.indices]

  def rows(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
    return rows(self.examples, self.indices[np.asarray(indices)])


@dataclasses.dataclass(frozen=True)
class Joined:
  """The examples of one sequence and then those of another, with the same columns."""

  first: Examples
  second: Examples

  def __len__(self) -> int:
    return len(self.first) + len(self.second)

  def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
    size = len(self.first)
    return self.first[index] if index < size else self.second[index - size]

  def arrays(self) -> Mapping[str, np.ndarray]:
    second = self.second.arrays()
    return {name: np.concatenate([values, second[name]])
            for name, values in self.first.arrays().items()}

  def column(self, name: str) -> np.ndarray:
    return np.concatenate([column(self.first, name), column(self.second, name)])


@dataclasses.dataclass(frozen=True)
class Unlabelled:
  """Examples some of whose labels are taken away.

  Attributes:
    examples: with all their labels.
    dropped: by label, [N] bool: whose is missing.
  """

  examples: Examples
  dropped: Mapping[str, np.ndarray]

  def __len__(self) -> int:
    return len(self.examples)

  def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
    example = self.examples[index]
    return {name: missing(value) if name in self.dropped and self.dropped[name][index] else value
            for name, value in example.items()}

  def arrays(self) -> Mapping[str, np.ndarray]:
    return {name: self._without(name, values) for name, values in self.examples.arrays().items()}

  def column(self, name: str) -> np.ndarray:
    return self._without(name, column(self.examples, name))

  def rows(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
    return {name: self._without(name, values, np.asarray(indices))
            for name, values in rows(self.examples, indices).items()}

  def _without(self, name: str, values: np.ndarray,
               indices: np.ndarray | slice = slice(None)) -> np.ndarray:
    if name not in self.dropped:
      return values
    gone = self.dropped[name][indices].reshape(-1, *(1,) * (values.ndim - 1))
    return np.where(gone, missing(values), values)


def missing(values: np.ndarray) -> np.ndarray:
  """A label of the same shape and type of which nothing is there: -1 or NaN throughout.

  >>> missing(np.array([3, 4], np.int32)).tolist(), missing(np.array(0.5, np.float32)).tolist()
  ([-1, -1], nan)
  """
  values = np.asarray(values)
  return np.full_like(values, np.nan if values.dtype.kind == "f" else -1)


@dataclasses.dataclass(frozen=True)
class Columns:
  """Examples with only some of their columns."""

  examples: Examples
  names: Sequence[str]

  def __len__(self) -> int:
    return len(self.examples)

  def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
    example = self.examples[index]
    return {name: example[name] for name in self.names}

  def arrays(self) -> Mapping[str, np.ndarray]:
    columns = self.examples.arrays()
    return {name: columns[name] for name in self.names}

  def column(self, name: str) -> np.ndarray:
    return column(self.examples, name)

  def rows(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
    found = rows(self.examples, indices)
    return {name: found[name] for name in self.names}


@dataclasses.dataclass(frozen=True)
class Source:
  """One data set.

  Attributes:
    origin: where the examples really come from, as reported to the user and written into the
      run folder: "tfds:cifar10:3.0.2", or "sample" for the bundled sample.
    splits: examples by split name: "train" and "test", and "validation" where the set has one.
    labels: what the examples hold besides the image, by name.
    augmentation: names of the augmentations that leave these labels true, see
      `mtl_jax.data.augmentation`; boxes and what lies on pixels move along, numbers and classes
      do not.
    report: how many files or entries were left out or mended, by what was wrong with them.
  """

  origin: str
  splits: Mapping[str, Examples]
  labels: Mapping[str, Label]
  augmentation: Sequence[str] = ()
  report: Mapping[str, int] = dataclasses.field(default_factory=dict)
