"""Object detection data in COCO's layout: images, and one JSON file a split.

Found by themselves are, with the folders that their images may be in,

    <path>/annotations/instances_train2017.json    train2017, images/train2017, train, images
    <path>/instances_train.json                    train, images/train, images
    <path>/train/_annotations.coco.json            train

and likewise for val and test (valid, validation, testing, …). A single `instances_….json` of
another name is train. Anything else is said by `train`, `validation` and `test`.

The format is that of Lin et al., "Microsoft COCO: Common Objects in Context" (ECCV 2014,
arXiv:1405.0312). Boxes are taken to refer to the image turned upright by EXIF (`upright=False`: to
the image as stored), and become fractions of what is shown.

Rules beyond those of `image_files` and `boxes`:

| counted | which is | done |
|---|---|---|
| crowd annotation | `iscrowd`: appears in `classes`, makes `count` missing | no object |
| annotation of an unknown image | one that is not listed | left out |
| annotation of an unknown category | likewise | left out |
| box listed twice (read once) | of one image and category | read once |
| image entry without its own id and name | | left out |
| listed image that is not there | | left out with its boxes |
| file listed twice (read once) | in one JSON file: the first entry counts | read once |
| image of another size than listed (boxes scaled) | of the same aspect ratio | boxes scaled |
| image of another shape than listed | such as one turned since | left out |
| box beyond max_objects | the smallest of an image | left out of `objects` |
| class without a training box (kept) | a category that train has none of | a class all the same |

Refused are unreadable JSON, one without lists of images, annotations and categories, a split
without images, two JSON files for one split, a category id with two names, and a lack of any box.
"""

import collections
from collections.abc import Hashable, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from mtl_jax.data import boxes, image_files
from mtl_jax.data.images import reading
from mtl_jax.data.source import Label, Source
from mtl_jax.errors import UserError

_ROBOFLOW = "_annotations.coco.json"


def coco(dir: str | os.PathLike[str], *, download: bool = True, path: str,
         size: int | tuple[int, ...], fit: str = "pad", channels: int = 3,
         background: str = "white", upright: bool = True, max_objects: int | None = None,
         train: tuple[str, ...] = (), validation: tuple[str, ...] = (), test: tuple[str, ...] = (),
         test_fraction: float = 0.2, seed: int = 0, memory_gb: float = 4.0) -> Source:
  """A detection data set in COCO's layout; see the module.

  Labels are `objects` [M, 5], a box and its class each; `classes`, binary: which of them appear;
  and `count`, a number: of the objects. Classes are the categories in order of their ids.

  Every file is read once and checked at the start. The images are kept in memory, as they come to
  their size, where all of them fit into `memory_gb`; else they are read again when asked for.

  Args:
    dir: not used.
    download: not used.
    path: of the folder; "~" is the home, relative ones start at the working directory.
    size: of the images in pixels, or (height, width).
    fit: "pad", "crop" or "stretch", see `images`.
    channels: 3 for RGB, 1 for grey.
    background: colour behind transparent pixels and around padded images.
    upright: whether EXIF orientation is followed.
    max_objects: M; the most that any image has when None.
    train: JSON file and folder of images, relative to `path`, such as ("a.json", "images"); if any
      of these three is given, nothing is searched for.
    validation: likewise.
    test: likewise.
    test_fraction: of the images, that becomes test where there is neither test nor validation.
    seed: of that draw.
    memory_gb: GiB of images that are kept in memory.

  Raises:
    UserError: where the folder or its JSON files cannot be used.
  """
  how = reading(size, fit=fit, channels=channels, background=background, upright=upright)
  if max_objects is not None and max_objects < 1:
    raise UserError(f"max_objects: expected at least 1, found {max_objects}")
  root = image_files.existing_folder(path)
  given = {"train": train, "validation": validation, "test": test}
  places = _given(root, given) if any(given.values()) else _found(root)
  report = collections.Counter()
  listings = {split: _read(file, report) for split, (file, _) in places.items()}
  categories = _merged({places[split][0]: listing for split, listing in listings.items()})
  entries = []
  for split, (file, folders) in places.items():
    if not (there := _on_disk(root, folders, listings[split].entries, report)):
      raise UserError(f"{file}: expected images that are in {folders[0]}, found none "
                      f"({image_files.in_words(report)})")
    entries += [(entry, split) for entry in there]
  files = image_files.scan(root, [entry.name for entry, _ in entries],
                           [split for _, split in entries], how, report, memory_gb=memory_gb)
  shaped = np.array([_shaped(entries[i][0], *size, report)
                     for i, size in zip(files.index, files.sizes.tolist())], bool)
  image_files.require(files.take(shaped), files.splits.tolist(), report)
  files = image_files.divided(files.take(shaped), [0] * int(shaped.sum()), test_fraction, seed,
                              report)
  columns, labels = _columns(files, [entries[i][0] for i in files.index], categories, max_objects,
                             report)
  return image_files.source("coco", files, columns, labels, report, augmentation=())


@dataclasses.dataclass(frozen=True)
class Entry:
  """An image that a JSON file lists.

  Attributes:
    name: of the file, as listed; relative to the source's folder once it is found.
    size: width and height as listed; None where they are not.
    boxes: x, y, width, height and category id of each object.
    crowds: category ids of its crowds.
  """

  name: str
  size: tuple[float, float] | None
  boxes: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)
  crowds: set[int] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(frozen=True)
class Listing:
  """What a JSON file says: names of the categories by id, and its images."""

  categories: Mapping[int, str]
  entries: Sequence[Entry]


# ---- Where the files are.


def _given(root: pathlib.Path, given: Mapping[str, Sequence[str]]
           ) -> dict[str, tuple[pathlib.Path, list[pathlib.Path]]]:
  places = {}
  for split, pair in given.items():
    if not pair and split != "train":
      continue
    if len(pair) != 2:
      raise UserError(f"{split}: expected a JSON file and a folder of images, found "
                      f"{', '.join(pair) or 'none'}")
    file, folder = (root / pathlib.Path(part).expanduser() for part in pair)
    places[split] = file, [image_files.existing_folder(folder, split)]
  return places


def _found(root: pathlib.Path) -> dict[str, tuple[pathlib.Path, list[pathlib.Path]]]:
  """The JSON file of each split and the folders that its images may be in."""
  by_split = collections.defaultdict(list)
  for file in sorted([*root.glob("instances_*.json"), *root.glob("annotations/instances_*.json"),
                      *root.glob(f"*/{_ROBOFLOW}")]):
    name = file.parent.name if file.name == _ROBOFLOW else file.stem.removeprefix("instances_")
    word = name.rstrip("0123456789_-").lower()
    folders = [root / name, root / "images" / name, root / word, root / "images" / word,
               root / "images", root]
    by_split[image_files.SPLITS.get(word, "")].append((file, folders))
  others = by_split.pop("", [])
  by_split = by_split or {"train": others}
  for split, places in by_split.items():
    if len(places) > 1:
      raise UserError(f"{root}: expected one JSON file for {split}, found "
                      f"{' and '.join(str(file.relative_to(root)) for file, _ in places)}\n"
                      "name them by the arguments train, validation and test")
  if not by_split.get("train"):
    raise UserError(f"{root}: expected annotations/instances_train….json, instances_train.json or "
                    f"train/{_ROBOFLOW}, found none\n"
                    "check path, or name the files by the arguments train, validation and test")
  return {split: by_split[split][0] for split in image_files.ORDER if split in by_split}


def _on_disk(root: pathlib.Path, folders: Sequence[pathlib.Path], entries: Sequence[Entry],
             report: image_files.Report) -> list[Entry]:
  """The entries whose file is there, once each, with its name relative to the root."""
  found = {}
  for entry in entries:
    names = entry.name, entry.name.replace("\\", "/").rpartition("/")[2]
    path = next((path for name in names for folder in folders
                 if os.path.isfile(path := os.path.join(folder, name))), None)
    if path is None:
      report["listed image that is not there"] += 1
      continue
    name = os.path.relpath(path, root).replace(os.sep, "/")
    if name in found:
      report["file listed twice (read once)"] += 1
    else:
      found[name] = dataclasses.replace(entry, name=name)
  return list(found.values())


# ---- What the JSON files say.


def _read(file: pathlib.Path, report: image_files.Report) -> Listing:
  try:
    content = json.loads(file.read_bytes())
  except OSError as error:
    raise UserError(f"expected a JSON file at {file}, found: {error.strerror}") from error
  except json.JSONDecodeError as error:
    raise UserError(f"{file}, line {error.lineno}, column {error.colno}: expected JSON, found: "
                    f"{error.msg}\nthe file may be cut short: fetch it again") from error
  except UnicodeDecodeError as error:
    raise UserError(f"{file}: expected JSON in UTF-8, found: {error}") from error
  for key in ("images", "annotations", "categories"):
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
      raise UserError(f"{file}: expected lists of images, annotations and categories, as COCO has "
                      f"for its instances; found no {key}")
  categories = _categories(file, content["categories"])
  entries = _entries(content["images"], report)
  _annotate(entries, categories, content["annotations"], report)
  return Listing(categories, list(entries.values()))


def _categories(file: pathlib.Path, found: Sequence[Any]) -> dict[int, str]:
  names = {}
  for category in found:
    if not isinstance(category, dict) or type(category.get("id")) is not int:
      raise UserError(f"{file}: expected categories with a whole number as id, found {category!r}")
    name = str(category.get("name", category["id"]))
    if names.setdefault(category["id"], name) != name:
      raise UserError(f"{file}: expected one name for each category id, found "
                      f"{names[category['id']]!r} and {name!r} for {category['id']}")
  return names


def _entries(found: Sequence[Any], report: image_files.Report) -> dict[Hashable, Entry]:
  entries = {}
  for image in found:
    record = image if isinstance(image, dict) else {}
    key, name = record.get("id"), record.get("file_name")
    if not isinstance(key, (int, str)) or not isinstance(name, str) or not name or key in entries:
      report["image entry without its own id and name"] += 1
      continue
    size = record.get("width"), record.get("height")
    known = all(isinstance(side, (int, float)) and side > 0 for side in size)
    entries[key] = Entry(name, size if known else None)
  return entries


def _annotate(entries: Mapping[Hashable, Entry], categories: Mapping[int, str],
              found: Sequence[Any], report: image_files.Report) -> None:
  """Gives each entry its boxes and crowds."""
  seen = set()
  for annotation in found:
    record = annotation if isinstance(annotation, dict) else {}
    image, category, box = (record.get(key) for key in ("image_id", "category_id", "bbox"))
    if not isinstance(image, (int, str)) or image not in entries:
      report["annotation of an unknown image"] += 1
    elif not isinstance(category, int) or category not in categories:
      report["annotation of an unknown category"] += 1
    elif record.get("iscrowd"):
      report["crowd annotation"] += 1
      entries[image].crowds.add(category)
    else:
      whole = isinstance(box, list) and len(box) == 4 and all(
          isinstance(side, (int, float)) for side in box)
      box = tuple(map(float, box)) if whole else (np.nan,) * 4
      if whole and (image, category, box) in seen:
        report["box listed twice (read once)"] += 1
        continue
      seen.add((image, category, box))
      entries[image].boxes.append((*box, category))


def _merged(listings: Mapping[pathlib.Path, Listing]) -> dict[int, str]:
  """Names of all splits' categories, in order of their ids."""
  names = {}
  for file, listing in listings.items():
    for key, name in listing.categories.items():
      if names.setdefault(key, name) != name:
        raise UserError(f"{file}: expected the categories of the other splits, found {name!r} in "
                        f"place of {names[key]!r} for id {key}")
  return dict(sorted(names.items()))


# ---- Labels.


def _shaped(entry: Entry, width: int, height: int, report: image_files.Report) -> bool:
  """Whether the image has the shape that is listed for it."""
  if entry.size is None or entry.size == (width, height):
    return True
  listed_width, listed_height = entry.size
  if abs(height - listed_height * width / listed_width) > 1:
    report["image of another shape than listed"] += 1
    return False
  report["image of another size than listed (boxes scaled)"] += 1
  return True


def _columns(files: image_files.Files, entries: Sequence[Entry], categories: Mapping[int, str],
             max_objects: int | None, report: image_files.Report
             ) -> tuple[dict[str, np.ndarray], dict[str, Label]]:
  place = {key: i for i, key in enumerate(categories)}
  found = _objects(files, entries, place, report)
  most = max(map(len, found))
  if not most:
    raise UserError(f"{files.root}: expected boxes, found none to use "
                    f"({image_files.in_words(report)})")
  slots = max_objects or most
  objects = np.zeros((len(found), slots, 5), np.float32)
  objects[..., 4] = -1
  classes = np.zeros((len(found), len(categories)), np.int32)
  count = np.zeros(len(found), np.float32)
  for i, (entry, rows) in enumerate(zip(entries, found)):
    kept = _largest(rows, slots)
    report["box beyond max_objects"] += len(rows) - len(kept)
    objects[i, :len(kept)] = kept
    classes[i, [*rows[:, 4].astype(int), *(place[key] for key in entry.crowds)]] = 1
    count[i] = np.nan if entry.crowds else len(rows)
  trained = np.concatenate([rows[:, 4] for split, rows in zip(files.splits, found)
                            if split == "train"])
  report["class without a training box (kept)"] = len(categories) - len(np.unique(trained))
  names = tuple(categories.values())
  return ({"objects": objects, "classes": classes, "count": count},
          {"objects": Label("objects", len(names), names), "classes": Label("binary", None, names),
           "count": Label("number")})


def _objects(files: image_files.Files, entries: Sequence[Entry], place: Mapping[int, int],
             report: image_files.Report) -> list[np.ndarray]:
  """The usable objects of each image, [M, 5]."""
  found = []
  for entry, (width, height) in zip(entries, files.sizes.tolist()):
    scale = np.divide((width, height), entry.size) if entry.size else np.ones(2)
    table = np.array([box[:4] for box in entry.boxes], np.float64).reshape(-1, 4)
    corners = np.concatenate([table[:, :2], table[:, :2] + table[:, 2:]], axis=1)
    shown, used, counts = boxes.placed(corners * np.tile(scale, 2), width, height, files.how)
    report.update(counts)
    classes = np.array([place[box[4]] for box in entry.boxes], np.float32)[used]
    found.append(np.concatenate([shown, classes[:, None]], axis=1))
  return found


def _largest(rows: np.ndarray, count: int) -> np.ndarray:
  """The `count` boxes of largest area out of [N, 5], in their order."""
  if len(rows) <= count:
    return rows
  areas = (rows[:, 2] - rows[:, 0]) * (rows[:, 3] - rows[:, 1])
  return rows[np.sort(np.argsort(-areas, kind="stable")[:count])]
