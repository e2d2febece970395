"""Folders of images: classes by folder, or labels out of a table.

    <path>/<split>/<class>/…/x.jpg    splits train, val, test (training, valid, validation, testing)
    <path>/<class>/…/x.jpg            no splits; LFW's <person>/<person>_0001.jpg is one of these
    <path>/…/x.jpg and a CSV file     labels="labels.csv", see `label_table`

Where nothing else is said the class is the folder right below the split, whatever is nested in it,
and is called `label`. `levels=("shape", "colour")` names the folders from the outside in, one label
each. With a table, class folders count only if `levels` names them. Where test is cut from train,
each class gives its share; with a table alone, each class of the column with the fewest classes.

Rules beyond those of `image_files` and `label_table`:

| counted | which is | done |
|---|---|---|
| file outside any class folder | not below a folder for each level | left out |
| file outside the split folders | beside them | left out |
| class without a usable image | a folder of files that are all left out | no class |
| class without a training image (kept) | one of validation or test only | a class all the same |

Refused are fewer than two classes in a level, two folders for one split, split folders without one
for train, and a split folder without a file for any class.
"""

import collections
from collections.abc import Mapping, Sequence
import os
import pathlib

import numpy as np

from mtl_jax.data import image_files, label_table
from mtl_jax.data.image_files import SPLITS
from mtl_jax.data.images import reading
from mtl_jax.data.source import Label, Source
from mtl_jax.errors import UserError


def image_folder(dir: str | os.PathLike[str], *, download: bool = True, path: str,
                 size: int | tuple[int, ...], fit: str = "crop", channels: int = 3,
                 background: str = "white", upright: bool = True, labels: str | None = None,
                 levels: tuple[str, ...] = (), kinds: tuple[str, ...] = (),
                 boxes: str = "pixels", test_fraction: float = 0.2, seed: int = 0,
                 memory_gb: float = 4.0) -> Source:
  """Images of a folder, with the labels that its folders or a table give; see the module.

  Every file is read once and checked at the start. The images are kept in memory, as they come to
  their size, where all of them fit into `memory_gb`; else they are read again when asked for.

  >>> import tempfile
  >>> from PIL import Image
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   for i in range(10):
  ...     name = pathlib.Path(folder, "cat" if i < 5 else "dog", f"{i}.png")
  ...     name.parent.mkdir(exist_ok=True)
  ...     Image.new("RGB", (40, 30), (i, i, i)).save(name)
  ...   source = image_folder("", path=folder, size=16)
  >>> source.labels["label"].names, len(source.splits["train"]), len(source.splits["test"])
  (('cat', 'dog'), 8, 2)
  >>> source.splits["test"].arrays()["image"].shape
  (2, 16, 16, 3)

  Args:
    dir: not used.
    download: not used.
    path: of the folder; "~" is the home, relative ones start at the working directory.
    size: of the images in pixels, or (height, width).
    fit: "crop", "pad" or "stretch", see `images`.
    channels: 3 for RGB, 1 for grey.
    background: colour behind transparent pixels and around padded images.
    upright: whether EXIF orientation is followed.
    labels: a CSV file, relative to `path`.
    levels: names of the labels that nested folders give, from the outside in; ("label",) where
      there is no table.
    kinds: "column:class" or "column:number" for columns of the table.
    boxes: unit of the table's boxes, "pixels" of the original or "fractions" of it.
    test_fraction: of the images, in each class, that becomes test where there is no split.
    seed: of that draw.
    memory_gb: GiB of images that are kept in memory.

  Raises:
    UserError: where the folder or its table cannot be used.
  """
  how = reading(size, fit=fit, channels=channels, background=background, upright=upright)
  if boxes not in ("pixels", "fractions"):
    raise UserError(f"boxes: expected pixels or fractions, found {boxes!r}")
  root = image_files.existing_folder(path)
  report = collections.Counter()
  names = image_files.files_below(root, report)
  table = label_table.read_table(root / pathlib.Path(labels).expanduser()) if labels else None
  levels = tuple(levels) or (() if table else ("label",))
  if len(set(levels)) < len(levels) or set(levels) & {"image", "present"}:
    raise UserError(f"levels: expected names that no other label has, found {', '.join(levels)}")
  if table:
    names = [name for name in names if root / name != table.path]
  placed = _placed(root, names, levels, report)
  rows = {}
  if table:
    found = label_table.matched(table, list(placed), report)
    rows = {name: row for name, row in zip(placed, found) if row or levels}
    placed = {name: (row.split if row and row.split else placed[name][0], placed[name][1])
              for name, row in rows.items()}
  files = image_files.scan(root, list(placed), [split for split, _ in placed.values()], how, report,
                           memory_gb=memory_gb)
  columns, meaning = _level_columns(root, files, placed, levels, report)
  if table:
    more, what = label_table.columns(table, [rows[name] for name in files.names], files, report,
                                     kinds=kinds, unit=boxes)
    if clash := set(columns) & set(more):
      raise UserError(f"levels: expected names that no other label has, found {min(clash)}")
    columns, meaning = {**columns, **more}, {**meaning, **what}
  return _source(files, columns, meaning, levels, report, test_fraction, seed)


def _split_folders(root: pathlib.Path) -> dict[str, str]:
  """The split of each folder that is one; {} where the folder has none."""
  folders = sorted(entry.name for entry in root.iterdir()
                   if entry.is_dir() and not entry.name.startswith("."))
  found = {name: SPLITS[name.lower()] for name in folders if name.lower() in SPLITS}
  if "train" not in found.values():
    if found and len(found) == len(folders):
      raise UserError(f"{root}: expected a train folder beside {', '.join(found)}, found none")
    return {}
  for split in found.values():
    same = [name for name in found if found[name] == split]
    if len(same) > 1:
      raise UserError(f"{root}: expected one folder for {split}, found {' and '.join(same)}")
  return found


def _placed(root: pathlib.Path, names: Sequence[str], levels: Sequence[str],
            report: image_files.Report) -> dict[str, tuple[str, tuple[str, ...]]]:
  """The split and the class folders of each file that has them, in order."""
  split_folders = _split_folders(root)
  placed = {}
  for name in names:
    *folders, _ = name.split("/")
    split = ""
    if split_folders:
      split = split_folders.get(folders[0], "") if folders else ""
      if not split:
        report["file outside the split folders"] += 1
        continue
      folders = folders[1:]
    if len(folders) < len(levels):
      report["file outside any class folder"] += 1
      continue
    placed[name] = split, tuple(folders[:len(levels)])
  for folder, split in split_folders.items():
    if split not in {split for split, _ in placed.values()}:
      raise UserError(f"{root / folder}: expected images{' in class folders' if levels else ''}, "
                      "found none\nfill the folder, or remove it")
  return placed


def _level_columns(root: pathlib.Path, files: image_files.Files,
                   placed: Mapping[str, tuple[str, tuple[str, ...]]], levels: Sequence[str],
                   report: image_files.Report
                   ) -> tuple[dict[str, np.ndarray], dict[str, Label]]:
  columns, labels = {}, {}
  for depth, level in enumerate(levels):
    columns[level], labels[level] = label_table.class_column(
        [placed[name][1][depth] for name in files.names])
    there = {folders[depth] for _, folders in placed.values()}
    report["class without a usable image"] += len(there - set(labels[level].names))
    if labels[level].num_classes < 2:
      raise UserError(f"{root}: expected folders of two classes or more as {level}, found only "
                      f"{', '.join(labels[level].names)}\n"
                      "check that path names the folder that holds the data itself")
  return columns, labels


def _source(files: image_files.Files, columns: Mapping[str, np.ndarray],
            labels: Mapping[str, Label], levels: Sequence[str],
            report: image_files.Report, fraction: float, seed: int) -> Source:
  labelled = np.zeros(len(files), bool)
  for column in columns.values():
    present = column >= 0 if column.dtype.kind == "i" else ~np.isnan(column)
    labelled |= present.reshape(len(files), -1).any(axis=1)
  report["file without any label"] = int((~labelled).sum())
  image_files.require(files.take(labelled), files.splits.tolist(), report)
  classes = [name for name, label in labels.items() if label.kind == "class"]
  strata = levels or sorted((name for name in classes
                             if 2 * labels[name].num_classes <= labelled.sum()),
                            key=lambda name: labels[name].num_classes)[:1]
  groups = list(zip(*(columns[name][labelled].tolist() for name in strata)))
  used = image_files.divided(files.take(labelled), groups or [()] * int(labelled.sum()), fraction,
                             seed, report)
  chosen = np.isin(files.index, used.index)
  columns = {name: column[chosen] for name, column in columns.items()}
  trained = used.splits == "train"
  report["class without a training image (kept)"] = sum(
      len(set(range(labels[name].num_classes)) - set(columns[name][trained].tolist()))
      for name in classes)
  steady = all(label.kind != "box" for label in labels.values())
  return image_files.source("folder", used, columns, labels, report,
                            augmentation=("crop",) if steady else ())
