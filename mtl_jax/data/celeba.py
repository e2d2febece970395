"""CelebA: 202,599 faces with 40 attributes, each of which can be a task of its own.

Liu, Luo, Wang and Tang, "Deep Learning Face Attributes in the Wild", ICCV 2015, arXiv:1411.7766.
"""

from collections.abc import Sequence
import dataclasses
import os
import pathlib

import numpy as np

from mtl_jax.data import images
from mtl_jax.data.image_files import ImageExamples
from mtl_jax.data.source import Label, Source
from mtl_jax.errors import MissingData, UserError

SPLITS = ("train", "validation", "test")  # by their numbers in list_eval_partition

_IMAGES = ("img_align_celeba", "img_align_celeba/img_align_celeba", "Img/img_align_celeba")
_FOLDERS = ("", "Anno", "Eval")
_WIDTH, _HEIGHT = 178, 218  # of the aligned images
_LAYOUT = ("it takes img_align_celeba/ with the images, list_attr_celeba and list_eval_partition, "
           "each .txt as published or .csv as on Kaggle")


def celeba(dir: str | os.PathLike[str], *, download: bool = True, path: str | None = None,
           size: int | Sequence[int] = 64) -> Source:
  """CelebA in the layout of its authors, or of Kaggle's copy.

  Labels: `attributes`, binary [40]; each attribute by its own name, such as `Smiling`, a class of
  2; and `landmarks`, where `list_landmarks_align_celeba` is there: number [10], x and y of both
  eyes, the nose and both corners of the mouth as fractions of width and height, which mirroring
  would make false. Splits are those of `list_eval_partition`: 162,770 train, 19,867 validation,
  19,962 test.

  Aligned images of 178x218 are stretched to `size`, as multi-task work does (Sener and Koltun,
  NeurIPS 2018, arXiv:1810.04650), and read when they are asked for.

  Args:
    dir: where `celeba` is looked for if there is no `path`.
    download: taken as every source does; nothing is downloaded.
    path: the folder with the images and the lists, or with the authors' Img, Anno and Eval.
    size: pixels of both sides, or (height, width).

  Raises:
    MissingData: the folder is not there.
    UserError: what is there lacks a part, or parts do not fit each other.
  """
  del download
  how = images.reading(size, fit="stretch", upright=False)
  root = pathlib.Path(path or pathlib.Path(dir) / "celeba").expanduser()
  if not root.is_dir():
    raise MissingData(f"expected CelebA in {root}, found no such folder\n{_LAYOUT}")
  folder = next((root / name for name in reversed(_IMAGES) if (root / name).is_dir()), None)
  if folder is None:
    raise UserError(f"expected a folder img_align_celeba in {root}, found none\n{_LAYOUT}")
  listed = _table(root, "list_attr_celeba")
  partition = _aligned(_table(root, "list_eval_partition"), listed)
  _check(listed, (-1, 0, 1))
  _check(partition, (0, 1, 2))
  _check_files(folder, listed)

  flags = (listed.values > 0).astype(np.int32)
  columns = {"attributes": flags}
  labels = {"attributes": Label("binary", names=listed.header)}
  for number, name in enumerate(listed.header):
    columns[name] = np.ascontiguousarray(flags[:, number])
    labels[name] = Label("class", 2, ("no", "yes"))
  if _file(root, "list_landmarks_align_celeba"):
    points = _aligned(_table(root, "list_landmarks_align_celeba"), listed)
    extent = np.tile(np.array([_WIDTH, _HEIGHT], np.float32), len(points.header) // 2)
    columns["landmarks"] = points.values.astype(np.float32) / extent
    labels["landmarks"] = Label("number", names=points.header)
  splits = {}
  for number, split in enumerate(SPLITS):
    rows = np.flatnonzero(partition.values[:, 0] == number)
    if len(rows):
      splits[split] = ImageExamples([os.path.join(folder, listed.files[row]) for row in rows], how,
                                    {name: column[rows] for name, column in columns.items()})
  return Source(origin=f"celeba:{len(listed.files)}", splits=splits, labels=labels,
                augmentation=() if "landmarks" in labels else ("flip",))


@dataclasses.dataclass(frozen=True)
class _Table:
  """A list of the data set.

  Attributes:
    path: its file.
    header: names of the columns.
    files: the image of each row.
    values: int32 [N, columns].
  """

  path: pathlib.Path
  header: tuple[str, ...]
  files: Sequence[str]
  values: np.ndarray


def _file(root: pathlib.Path, name: str) -> pathlib.Path | None:
  candidates = (root / folder / f"{name}{ending}" for folder in _FOLDERS
                for ending in (".txt", ".csv"))
  return next((path for path in candidates if path.is_file()), None)


def _table(root: pathlib.Path, name: str) -> _Table:
  """Reads a list: as text with spaces, a count and names above it or neither; or as CSV."""
  path = _file(root, name)
  if path is None:
    raise UserError(f"expected {name}.txt or {name}.csv in {root}, found neither\n{_LAYOUT}")
  try:
    text = path.read_text(encoding="utf-8-sig")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"expected {path} to be readable, found: {error}") from error
  lines = [line for line in text.replace(",", " ").splitlines() if line.strip()]
  declared, header = None, ("partition",)
  if path.suffix == ".csv" and lines:
    header, lines = tuple(lines[0].split()[1:]), lines[1:]
  elif len(lines) > 1 and lines[0].strip().isdigit():
    declared, header, lines = int(lines[0]), tuple(lines[1].split()), lines[2:]
  if not lines or declared not in (None, len(lines)):
    raise UserError(f"expected {path} to list {declared or 'images'}, found {len(lines)} rows\n"
                    "fetch the file again")
  files, _, rest = zip(*(line.partition(" ") for line in lines))
  try:
    values = np.loadtxt(rest, np.int32, ndmin=2)
  except ValueError as error:
    raise UserError(f"expected whole numbers in {path}, found: {error}") from error
  if values.shape != (len(files), len(header)) or len(set(files)) != len(files):
    raise UserError(
        f"expected {len(header)} numbers for each image of {path}, each image once, found "
        f"{values.shape[1]} numbers and {len(set(files))} images in {len(files)} rows")
  return _Table(path, header, files, values)


def _aligned(table: _Table, listed: _Table) -> _Table:
  """The table with the rows of another one, in its order."""
  if table.files == listed.files:
    return table
  place = {file: row for row, file in enumerate(table.files)}
  lacking = [file for file in listed.files if file not in place]
  if lacking:
    raise UserError(f"expected {table.path} to list each image of {listed.path}, "
                    f"found {len(lacking)} missing, the first {lacking[0]}")
  return dataclasses.replace(table, files=listed.files,
                             values=table.values[[place[file] for file in listed.files]])


def _check(table: _Table, allowed: Sequence[int]) -> None:
  wrong = np.argwhere(~np.isin(table.values, allowed))
  if len(wrong):
    row, column = wrong[0]
    raise UserError(f"expected one of {', '.join(map(str, allowed))} for each image of "
                    f"{table.path}, found {table.values[row, column]} for {table.files[row]}")


def _check_files(folder: pathlib.Path, listed: _Table) -> None:
  found = set(os.listdir(folder))
  lacking = [file for file in listed.files if file not in found]
  if lacking:
    raise UserError(f"expected the {len(listed.files)} images of {listed.path} in {folder}, "
                    f"found {len(lacking)} missing, the first {lacking[0]}\nunpack them again")
