"""Scenes with labels of pixels in the layout of MTAN, which LibMTL and nash-mtl read as well.

`<root>/train/<part>/<i>.npy` and `<root>/val/<part>/<i>.npy`, where i counts from 0 in each and the
parts are `image` and one folder for each label. All published work that uses this layout trains on
all of train and reports val; so val is "test" here, and validation is cut from train by
`config.data.validation`.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import os
import pathlib

import numpy as np

from mtl_jax.data.images import reading
from mtl_jax.data.source import Label, Source
from mtl_jax.data.stacking import nearest, stacked
from mtl_jax.errors import MissingData, UserError

SPLITS = {"train": "train", "test": "val"}


@dataclasses.dataclass(frozen=True)
class Part:
  """One folder of arrays and the label that it becomes.

  Attributes:
    folders: where it is, under the first of these names that is there.
    label: what it becomes.
    convert: from an array as it is stored to the label's value; a ValueError where it is no such.
  """

  folders: Sequence[str]
  label: Label
  convert: Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Scenes:
  """The examples of one split, read when they are asked for.

  Attributes:
    folder: of the split.
    count: how many there are.
    folders: of the arrays by name, "image" among them.
    parts: the labels by name.
    size: height and width of what is stored.
    result: height and width that it comes to.
  """

  folder: str
  count: int
  folders: Mapping[str, str]
  parts: Mapping[str, Part]
  size: tuple[int, int]
  result: tuple[int, int]

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
    example = {"image": self._image(self._read("image", image, index))}
    for name, part in self.parts.items():
      value = self._read(name, part.convert, index)
      example[name] = value if self.size == self.result else nearest(value, self.result)
    return example

  def arrays(self) -> Mapping[str, np.ndarray]:
    return self._stacked

  @functools.cached_property
  def _stacked(self) -> Mapping[str, np.ndarray]:
    return stacked(self[0], len(self), lambda indices: map(self.__getitem__, indices))

  def _read(self, name: str, convert: Callable[[np.ndarray], np.ndarray],
            index: int) -> np.ndarray:
    path = os.path.join(self.folder, self.folders[name], f"{range(self.count)[index]}.npy")
    try:
      value = convert(load(path))
    except ValueError as error:
      raise UserError(f"expected {path} to hold {error}") from error
    if value.shape[:2] != self.size:
      raise UserError(f"expected {path} to be {self.size[0]}x{self.size[1]} as the first image is, "
                      f"found {value.shape[0]}x{value.shape[1]}")
    return value

  def _image(self, pixels: np.ndarray) -> np.ndarray:
    if self.size == self.result:
      return pixels
    from PIL import Image
    small = Image.fromarray(pixels).resize(self.result[::-1], Image.Resampling.BILINEAR)
    return np.asarray(small)


def scenes(name: str, dir: str | os.PathLike[str], path: str | None, parts: Mapping[str, Part], *,
           size: int | Sequence[int] | None, where: str) -> Source:
  """The source of a data set in this layout.

  Args:
    name: of the data set, and of its folder in `dir` if there is no `path`.
    dir: see `path`.
    path: the folder with train and val.
    parts: labels by name.
    size: pixels of both sides, or (height, width), that everything is resized to; as stored when
      None.
    where: where the data set is to be had, for the message.

  Raises:
    MissingData: the folder is not there.
    UserError: it lacks a file, or the first files of a split are not what they should be.
  """
  root = pathlib.Path(path or pathlib.Path(dir) / name).expanduser()
  if not root.is_dir():
    raise MissingData(f"expected {name} in {root}, found no such folder\nit takes train and val, "
                      f"each with image, {', '.join(part.folders[0] for part in parts.values())} of "
                      f"<i>.npy: {where}")
  splits = {}
  for split, below in SPLITS.items():
    folder = root / below
    folders = {"image": "image"} | {
        key: next((option for option in part.folders if (folder / option).is_dir()),
                  part.folders[0]) for key, part in parts.items()}
    count = _count(folder, folders)
    first = load(folder / "image" / "0.npy")
    stored = tuple(first.shape[:2])
    result = stored if size is None else reading(size).shape[:2]
    splits[split] = Scenes(str(folder), count, folders, parts, stored, result)
    splits[split][0]  # what is no such data set is refused before anything else is done
  return Source(origin=f"{name}:{'+'.join(str(len(examples)) for examples in splits.values())}",
                splits=splits, labels={key: part.label for key, part in parts.items()},
                augmentation=("flip",))


def _count(folder: pathlib.Path, folders: Mapping[str, str]) -> int:
  """How many examples there are, with all their files."""
  found = {}
  for part in folders.values():
    if not (folder / part).is_dir():
      raise UserError(f"expected a folder {folder / part}, found none")
    found[part] = {path.name for path in (folder / part).iterdir() if path.suffix == ".npy"}
  count = max(len(names) for names in found.values())
  for part, names in found.items():
    for index in range(count):
      if f"{index}.npy" not in names:
        raise UserError(f"expected 0.npy … {count - 1}.npy in {folder / part}, "
                        f"found no {index}.npy\nunpack the data set again")
  if not count:
    raise UserError(f"expected 0.npy and so on in {folder / 'image'}, found no .npy at all")
  return count


# ---- From arrays as they are stored to values of a label.


def load(path: str | os.PathLike[str]) -> np.ndarray:
  """The array in a .npy file.

  Raises:
    UserError: where it cannot be read.
  """
  try:
    return np.load(path, allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    found = str(error).partition("\n")[0]
    raise UserError(f"expected {path} to hold an array, found: {found}\n"
                    "unpack the data set again") from error


def image(array: np.ndarray) -> np.ndarray:
  """Colours of 0 … 1, or bytes, as uint8 [H, W, 3].

  >>> image(np.full((1, 1, 3), 0.5)).tolist()
  [[[128, 128, 128]]]
  """
  if array.ndim != 3 or array.shape[-1] != 3:
    raise ValueError(f"an image [H, W, 3], found {list(array.shape)}")
  if array.dtype == np.uint8:
    return array
  if array.dtype.kind != "f" or not ((array >= 0) & (array <= 1)).all():
    raise ValueError(f"colours from 0 to 1, found {_extent(array)}")
  return np.rint(array * array.dtype.type(255)).astype(np.uint8)


def mask(array: np.ndarray, classes: int) -> np.ndarray:
  """Classes, -1 (or 255) where nobody knows, as int32 [H, W].

  >>> mask(np.array([[0.0, 6.0, -1.0, 255.0]]), 7).tolist()
  [[0, 6, -1, -1]]
  """
  if array.ndim != 2:
    raise ValueError(f"classes [H, W], found {list(array.shape)}")
  known = array[(array != -1) & (array != 255)]
  if not np.isin(known, np.arange(classes)).all():
    raise ValueError(f"classes 0 … {classes - 1}, or -1, found {_extent(known)}")
  return np.where(array == 255, -1, array).astype(np.int32)


def depth(array: np.ndarray) -> np.ndarray:
  """Numbers, 0 where nobody knows, as float32 [H, W, 1] with NaN there.

  >>> depth(np.array([[2.5, 0.0]])).tolist()
  [[[2.5], [nan]]]
  """
  array = array[..., None] if array.ndim == 2 else array
  if array.ndim != 3 or array.shape[-1] != 1:
    raise ValueError(f"depths [H, W, 1], found {list(array.shape)}")
  if not np.isfinite(array).all():
    raise ValueError(f"finite depths, found {_extent(array)}")
  return np.where(array == 0, np.nan, array).astype(np.float32)


def normals(array: np.ndarray) -> np.ndarray:
  """Directions, zero where nobody knows, as float32 [H, W, 3] of length 1 with NaN there.

  >>> normals(np.array([[[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]])).tolist()
  [[[0.0, 0.0, 1.0], [nan, nan, nan]]]
  """
  if array.ndim != 3 or array.shape[-1] != 3:
    raise ValueError(f"normals [H, W, 3], found {list(array.shape)}")
  length = np.sqrt((array.astype(np.float32) ** 2).sum(-1, keepdims=True))
  known = length[length != 0]
  if not np.isfinite(length).all() or (known.size and abs(np.median(known) - 1) > 0.1):
    raise ValueError("normals of length 1, or 0 where unknown, found lengths like "
                     f"{np.median(known):.3g}")
  with np.errstate(invalid="ignore"):  # 0 / 0, which is missing
    return (array / length).astype(np.float32)


def _extent(array: np.ndarray) -> str:
  return f"{array.min():.4g} … {array.max():.4g} of {array.dtype}"
