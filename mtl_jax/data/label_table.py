"""Labels of images out of a table: a CSV file with one line an image.

The first line names the columns. Cells are separated by commas, semicolons or tabs, whichever the
first line holds most of; the text is UTF-8. The file's column is the one called file, filename,
file_name, image or path, else the first. A column called split says train, validation or test.
Every other column is a label, by its name:

| column | label |
|---|---|
| four columns `name_x1`, `name_y1`, `name_x2`, `name_y2` (or `x1` … `y2`: `box`) | `box` |
| text | `class`; classes in alphabetical order |
| whole numbers, at most 20 different ones | `class`; classes in order of the numbers |
| other numbers | `number` |

`kinds=("age:number", "grade:class")` decides where this guess is wrong. A cell that is empty, NA,
N/A, NaN or null (in any case) is a missing label; a box with one such cell is missing.

| counted | which is | done |
|---|---|---|
| line of labels without a file | one for a file that is not there | left out |
| line of labels that fits several files | by a name that is not unique | left out |
| file listed twice (read once) | on lines that are alike | read once |
| file listed twice with different labels | | left out |
| file not listed in the labels | | left out, unless `levels` label it |
| file without any label | all its cells are missing | left out |
| label column without a value | | left out |
| cell that is not a finite number (missing) | a word if `kinds` says number | missing |

and what `boxes` counts. Refused are text that is not UTF-8, a line with too many or too few cells,
a column named twice or without a name, an unknown split, a word in a column where most cells are
numbers (unless `kinds` decides), and boxes of which none can be used.
"""

import collections
from collections.abc import Mapping, Sequence
import csv
import dataclasses
import io
import pathlib
import unicodedata

import numpy as np

from mtl_jax.data import boxes
from mtl_jax.data.image_files import SPLITS, Files, Report, in_words
from mtl_jax.data.source import Label
from mtl_jax.errors import UserError

FEW = 20

_FILE = ("file", "filename", "file_name", "image", "path")
_MISSING = ("", "na", "n/a", "nan", "null")
_CORNERS = ("x1", "y1", "x2", "y2")
_NOT_FINITE = "cell that is not a finite number (missing)"


@dataclasses.dataclass(frozen=True)
class Row:
  """One line: its number, the file that it is about, its split or "", and cells by column."""

  line: int
  file: str
  split: str
  cells: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of labels: where it lies, names of its label columns, and its rows."""

  path: pathlib.Path
  fields: Sequence[str]
  rows: Sequence[Row]

  def error(self, line: int, reason: str) -> UserError:
    return UserError(f"{self.path}, line {line}: {reason}")


def read_table(path: pathlib.Path) -> Table:
  """The table in a CSV file.

  Raises:
    UserError: where it is none.
  """
  fail = Table(path, (), ()).error
  try:
    content = path.read_bytes()
    text = content.decode("utf-8-sig")
  except OSError as error:
    raise UserError(f"labels: expected a CSV file at {path}, found: {error.strerror}") from error
  except UnicodeDecodeError as error:
    line = content[:error.start].count(b"\n") + 1
    raise fail(line, "expected UTF-8, found another encoding; save it as UTF-8") from error
  first = text.partition("\n")[0]
  reader = csv.reader(io.StringIO(text, newline=""), strict=True,
                      delimiter=max(",;\t", key=first.count))
  rows = []
  try:
    header = [name.strip() for name in next(reader, [])]
    place = next((i for i, name in enumerate(header) if name.lower() in _FILE), 0)
    fields = _checked_fields(header, place, fail)
    for cells in reader:
      if not any(cell.strip() for cell in cells):
        continue
      if len(cells) != len(header):
        raise fail(reader.line_num, f"expected {len(header)} cells, found {len(cells)}")
      by_name = {name: cell.strip() for name, cell in zip(header, cells)}
      file = by_name[header[place]].replace("\\", "/").removeprefix("./")
      rows.append(Row(reader.line_num, file, _split(by_name, reader.line_num, fail),
                      {name: by_name[name] for name in fields}))
  except csv.Error as error:
    raise fail(reader.line_num, f"expected a CSV file, found: {error}") from error
  return Table(path, fields, rows)


def _checked_fields(header: Sequence[str], place: int, fail) -> tuple[str, ...]:
  fields = tuple(name for i, name in enumerate(header) if i != place and name != "split")
  if not fields:
    raise fail(1, f"expected a column for files and columns of labels, found {header}")
  for name in header:
    if header.count(name) > 1 or (name in fields and name in ("", "image", "present")):
      raise fail(1, f"expected a name of its own for each column of labels, found {name!r}")
  return fields


def _split(cells: Mapping[str, str], line: int, fail) -> str:
  if "split" not in cells:
    return ""
  if cells["split"].lower() not in SPLITS:
    raise fail(line, f"split: expected train, validation or test, found {cells['split']!r}")
  return SPLITS[cells["split"].lower()]


def matched(table: Table, names: Sequence[str], report: Report) -> list[Row | None]:
  """The row about each file; None where there is not exactly one, which `report` counts.

  A row names a file relative to the folder, or by the end of that name where this is unique, or
  with more folders before it, as an absolute path does.
  """
  plain = [unicodedata.normalize("NFC", name) for name in names]
  by_basename = collections.defaultdict(list)
  for i, name in enumerate(plain):
    by_basename[name.rpartition("/")[2]].append(i)
  rows, spoilt = [None] * len(names), set()
  for row in table.rows:
    wanted = "/" + unicodedata.normalize("NFC", row.file)
    fitting = [i for i in by_basename[wanted.rpartition("/")[2]]
               if wanted.endswith("/" + plain[i]) or ("/" + plain[i]).endswith(wanted)]
    exact = [i for i in fitting if "/" + plain[i] == wanted]
    if len(exact or fitting) != 1:
      report["line of labels that fits several files" if fitting
             else "line of labels without a file"] += 1
      continue
    i, = exact or fitting
    if rows[i] is None:
      rows[i] = row
    elif (rows[i].cells, rows[i].split) == (row.cells, row.split):
      report["file listed twice (read once)"] += 1
    else:
      spoilt.add(i)
  report["file listed twice with different labels"] = len(spoilt)
  report["file not listed in the labels"] = rows.count(None)
  return [None if i in spoilt else row for i, row in enumerate(rows)]


def columns(table: Table, rows: Sequence[Row | None], files: Files, report: Report, *,
            kinds: Sequence[str], unit: str) -> tuple[dict[str, np.ndarray], dict[str, Label]]:
  """The label columns of a table for some files.

  Args:
    table: of labels.
    rows: of each file, None where its labels are missing.
    files: N of them.
    report: where cells and boxes with something wrong are counted.
    kinds: "column:class" or "column:number", where the kind is not to be guessed.
    unit: of boxes, "pixels" of the original, upright, or "fractions" of it.

  Returns:
    arrays [N, …] by label, and what they are.

  Raises:
    UserError: for kinds of columns that are not there, and where a column is of no clear kind.
  """
  arrays, labels = {}, {}
  boxed = _box_columns(table.fields, _wanted(kinds, table.fields))
  for label, kind in label_kinds(table, rows, kinds).items():
    if kind == "box":
      arrays[label], labels[label] = _box_column(table, rows, files, label, boxed[label], unit,
                                                 report)
      continue
    present = _present(rows, label)
    if kind == "none":
      report["label column without a value"] += 1
    elif kind == "class":
      arrays[label], labels[label] = class_column([present.get(i) for i in range(len(rows))])
    else:
      arrays[label], labels[label] = _number_column(present, len(rows), report), Label("number")
  return arrays, labels


def label_kinds(table: Table, rows: Sequence[Row | None], kinds: Sequence[str] = ()
                ) -> dict[str, str]:
  """What the labels of a table are: "box", "class", "number", or "none" where no cell has a value.

  Args:
    table: of labels.
    rows: those that count, None for a file without one.
    kinds: as `columns` takes them.

  Raises:
    UserError: as `columns`.
  """
  wanted = _wanted(kinds, table.fields)
  boxed = _box_columns(table.fields, wanted)
  if clash := set(boxed) & set(table.fields):
    raise table.error(1, f"expected a name of its own for each label, found {min(clash)!r} for a "
                         "box and for a column")
  found = dict.fromkeys(boxed, "box")
  for field in table.fields:
    if any(field in corners for corners in boxed.values()):
      continue
    present = _present(rows, field)
    found[field] = (wanted.get(field) or _guessed_kind(table, field, rows, present)
                    if present else "none")
  return found


def _present(rows: Sequence[Row | None], field: str) -> dict[int, str]:
  """The cells of a column that hold a value, by the row's number."""
  cells = ["" if row is None else row.cells[field] for row in rows]
  return {i: cell for i, cell in enumerate(cells) if cell.lower() not in _MISSING}


def class_column(values: Sequence[str | None]) -> tuple[np.ndarray, Label]:
  """Classes by name, None where missing, as a column of labels.

  >>> classes, label = class_column(["10", None, "9"])
  >>> classes.tolist(), label.names
  ([1, -1, 0], ('9', '10'))
  """
  names = sorted({value for value in values if value is not None})
  if all(_is_whole(name) for name in names):
    names.sort(key=int)
  place = {name: i for i, name in enumerate(names)} | {None: -1}
  column = np.array([place[value] for value in values], np.int32)
  return column, Label("class", len(names), tuple(names))


def _wanted(kinds: Sequence[str], fields: Sequence[str]) -> dict[str, str]:
  wanted = {}
  for item in kinds:
    field, _, kind = item.rpartition(":")
    if field not in fields or kind not in ("class", "number"):
      raise UserError(f"kinds: expected column:class or column:number for columns "
                      f"{', '.join(fields)}; found {item!r}")
    wanted[field] = kind
  return wanted


def _guessed_kind(table: Table, field: str, rows: Sequence[Row | None],
                  present: Mapping[int, str]) -> str:
  words = [i for i, cell in present.items() if not _is_number(cell)]
  if not words:
    different = set(present.values())
    return "class" if len(different) <= FEW and all(map(_is_whole, different)) else "number"
  if len(words) * 2 < len(present):
    raise table.error(rows[words[0]].line, f"{field}: expected a number as in most lines, found "
                      f"{present[words[0]]!r}\nmend it, or set kinds={field}:number (then it is "
                      f"missing) or kinds={field}:class")
  return "class"


def _number_column(present: Mapping[int, str], count: int,
                   report: Report) -> np.ndarray:
  column = np.full(count, np.nan, np.float32)
  for i, cell in present.items():
    value = float(cell) if _is_number(cell) else np.nan
    if abs(value) <= np.finfo(np.float32).max:
      column[i] = value
    else:
      report[_NOT_FINITE] += 1
  return column


def _box_columns(fields: Sequence[str], wanted: Mapping[str, str]) -> dict[str, list[str]]:
  """Names of the four columns of each box label."""
  found = {}
  for field in fields:
    if field == "x1" or field.endswith("_x1"):
      corners = [field.removesuffix("x1") + corner for corner in _CORNERS]
      if set(corners) <= set(fields) - set(wanted):
        found[field.removesuffix("x1").removesuffix("_") or "box"] = corners
  return found


def _box_column(table: Table, rows: Sequence[Row | None], files: Files, label: str,
                corners: Sequence[str], unit: str, report: Report
                ) -> tuple[np.ndarray, Label]:
  column = np.full((len(rows), 4), np.nan, np.float32)
  largest = 0.0
  for i, row in enumerate(rows):
    cells = [row.cells[corner] for corner in corners] if row else [""]
    if any(cell.lower() in _MISSING for cell in cells):
      continue
    for cell in cells:
      if not _is_number(cell):
        raise table.error(row.line, f"{label}: expected numbers x1, y1, x2, y2, found {cell!r}")
    width, height = files.sizes[i].tolist()
    box = np.array([[float(cell) for cell in cells]])
    largest = max(largest, float(np.abs(box).max()))
    if unit == "fractions":
      box = box * (width, height, width, height)
    shown, _, counts = boxes.placed(box, width, height, files.how)
    report.update(counts)
    column[i] = shown[0] if len(shown) else np.nan
  if unit == "pixels" and 0 < largest <= 1:
    raise UserError(f"{table.path}: {label}: expected boxes in pixels, found none beyond 1\n"
                    "set boxes=fractions if these are fractions of width and height")
  if np.isnan(column).all():
    raise UserError(f"{table.path}: {label}: expected boxes x1, y1, x2, y2 in {unit}, found none "
                    f"to use ({in_words(report)})")
  return column, Label("box")


def _is_number(cell: str) -> bool:
  try:
    float(cell)
  except ValueError:
    return False
  return True


def _is_whole(cell: str) -> bool:
  try:
    int(cell)
  except ValueError:
    return False
  return True
