"""The image files of one data set: found, each read once and checked, divided into splits.

The rules for whatever is wrong, for every source made of image files. What is counted stands in
`Source.report`, under these words:

| counted | which is | done |
|---|---|---|
| hidden file | `.DS_Store`, `._a.jpg`, `__MACOSX`, `Thumbs.db`, hidden folders | left out |
| empty folder | a folder without any file | left out |
| empty file | | left out |
| not an image | text, archives and whatever else is none | left out |
| truncated or damaged image | | left out |
| image of more than 16 bits | a channel, or of floating-point numbers | left out |
| image of too many pixels | more than 179 million: a decompression bomb | left out |
| file that cannot be opened | a link to nothing, or no permission to read | left out |
| wrong file extension (read) | that of another format, or none | read |
| same content in a later split | the order is train, validation, test | left out of the earlier |
| same content twice in a split (read) | | read |
| validation image read as test | there is validation, but no test | moved |

Where there is neither validation nor test, test is cut from train by `held_out`; validation is cut
later. Refused, by a UserError, are a folder without permission to be listed, and a folder or a
split of it without any usable image.
"""

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent import futures
import dataclasses
import functools
import hashlib
import os
import pathlib
import warnings

import numpy as np

from mtl_jax.data.images import Reading, Unusable, decode, has_wrong_extension, read_image
from mtl_jax.data.source import Label, Source
from mtl_jax.errors import UserError

SPLITS = {"train": "train", "training": "train", "val": "validation", "valid": "validation",
          "validation": "validation", "test": "test", "testing": "test"}
Report = collections.Counter[str]
ORDER = ("train", "validation", "test")

_HIDDEN = ("__macosx", "thumbs.db", "desktop.ini")
_UNOPENED = "file that cannot be opened"
_PROGRESS_FILES = 2000  # a scan of more shows a bar


def existing_folder(path: str | os.PathLike[str] | None, argument: str = "path") -> pathlib.Path:
  """The folder that an argument names, absolute.

  Raises:
    UserError: where there is none.
  """
  if not path:
    raise UserError(f"{argument}: expected a folder, found none given")
  folder = pathlib.Path(os.path.abspath(pathlib.Path(path).expanduser()))
  if not folder.is_dir():
    found = "a file (unpack an archive first)" if folder.exists() else "nothing there"
    raise UserError(f"{argument}: expected a folder at {folder}, found {found}")
  return folder


def files_below(root: pathlib.Path, report: Report) -> list[str]:
  """Names of all files below a folder, relative to it with "/", sorted.

  Args:
    root: the folder.
    report: where what is left out is counted.

  Raises:
    UserError: for a folder that may not be listed.
  """
  return sorted(_walk(root, "", (), report))


def _walk(folder: pathlib.Path, prefix: str, above: tuple[str, ...],
          report: Report) -> Iterator[str]:
  real = os.path.realpath(folder)
  if real in above:  # a link to a folder that it lies in
    return
  try:
    entries = list(os.scandir(folder))
  except OSError as error:
    raise UserError(f"expected {folder} to be readable, found: {error.strerror}") from error
  if prefix and not entries:
    report["empty folder"] += 1
  for entry in entries:
    if entry.name.startswith(".") or entry.name.lower() in _HIDDEN:
      report["hidden file"] += 1
    elif entry.is_dir():
      yield from _walk(folder / entry.name, f"{prefix}{entry.name}/", (*above, real), report)
    else:
      yield prefix + entry.name


@dataclasses.dataclass(frozen=True)
class ImageExamples:
  """Examples whose images are files.

  Attributes:
    paths: one file an example.
    how: they are read.
    labels: columns [N, …] by name.
    kept: the images read already, uint8 [N, H, W, C]; None where they are read when asked for.
  """

  paths: Sequence[str]
  how: Reading
  labels: Mapping[str, np.ndarray]
  kept: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
    image = read_image(self.paths[index], self.how) if self.kept is None else self.kept[index]
    return {"image": image, **{name: column[index] for name, column in self.labels.items()}}

  def arrays(self) -> Mapping[str, np.ndarray]:
    return {"image": self._images, **self.labels}

  @functools.cached_property
  def _images(self) -> np.ndarray:
    if self.kept is not None:
      return self.kept
    images = np.empty((len(self), *self.how.shape), np.uint8)
    with futures.ThreadPoolExecutor() as pool:
      read = pool.map(lambda path: read_image(path, self.how), self.paths)
      for i, image in enumerate(read):
        images[i] = image
    return images


@dataclasses.dataclass(frozen=True)
class Files:
  """Image files that have been read once, in order.

  Attributes:
    root: the folder that names are relative to.
    how: they are read.
    names: relative, with "/".
    index: [N] of each in the list that was scanned.
    splits: [N] of "train", "validation", "test", or "" where not decided.
    sizes: [N, 2], width and height of the originals, upright.
    digests: of the contents.
    images: uint8 [N, H, W, C], or None where they are not kept.
  """

  root: pathlib.Path
  how: Reading
  names: Sequence[str]
  index: np.ndarray
  splits: np.ndarray
  sizes: np.ndarray
  digests: Sequence[bytes]
  images: np.ndarray | None

  def __len__(self) -> int:
    return len(self.names)

  def take(self, chosen: np.ndarray) -> "Files":
    """Those where the mask [N] is true."""
    rows = np.flatnonzero(chosen)
    images = self.images
    if images is not None:
      adjoin = len(rows) and rows[-1] - rows[0] + 1 == len(rows)  # then a view will do
      images = images[rows[0]:rows[-1] + 1] if adjoin else images[rows]
    return dataclasses.replace(
        self, names=[self.names[i] for i in rows], index=self.index[rows], splits=self.splits[rows],
        sizes=self.sizes[rows], digests=[self.digests[i] for i in rows], images=images)


def scan(root: pathlib.Path, names: Sequence[str], splits: Sequence[str], how: Reading,
         report: Report, *, memory_gb: float, threads: int | None = None) -> Files:
  """Reads every file once; those that give an image.

  Args:
    root: the folder that names are relative to.
    names: of the files.
    splits: of each file, "" where not decided.
    how: images are read.
    report: where files with something wrong are counted.
    memory_gb: all images are kept where they fit into so many GiB.
    threads: that read; by the number of processors when None.

  Raises:
    UserError: where none, or none of a split, can be used.
  """
  from rich import console, progress
  images = None
  if len(names) * np.prod(how.shape, dtype=np.int64) <= memory_gb * 2 ** 30:
    images = np.empty((len(names), *how.shape), np.uint8)
  sizes = np.zeros((len(names), 2), np.int32)
  digests = [b""] * len(names)

  def read(i: int) -> str | None:
    try:
      content = (root / names[i]).read_bytes()
      image = decode(content, how)
    except (Unusable, OSError) as error:
      return str(error) if isinstance(error, Unusable) else _UNOPENED
    if images is not None:
      images[i] = image.pixels
    sizes[i] = image.width, image.height
    digests[i] = hashlib.blake2b(content, digest_size=16).digest()
    return "wrong file extension (read)" if has_wrong_extension(names[i], image.format) else None

  with warnings.catch_warnings(), futures.ThreadPoolExecutor(threads) as pool:
    warnings.simplefilter("ignore")  # Pillow's, on damage that is counted here
    found = list(progress.track(
        pool.map(read, range(len(names))), f"reading {root.name}", len(names), transient=True,
        console=console.Console(stderr=True), disable=len(names) < _PROGRESS_FILES))
  files = Files(root, how, names, np.arange(len(names)), np.array(splits, dtype="U10"), sizes,
                digests, images)
  report.update(word for word in found if word)
  usable = files.take(np.array([bool(digest) for digest in digests], bool))
  require(usable, set(splits) or {""}, report)
  return usable


def require(files: Files, splits: Iterable[str], report: Report) -> None:
  """Raises UserError where no file is left of one of the splits."""
  for split in sorted(set(splits) - set(files.splits.tolist())):
    raise UserError(f"{files.root}: expected usable images{split and f' for {split}'}, found none "
                    f"({in_words(report)})\ncheck that path names the folder of the data itself")


def in_words(report: Report) -> str:
  """What was counted, in one line.

  >>> in_words(collections.Counter({"empty file": 2, "not an image": 1}))
  '2 empty file, 1 not an image'
  """
  return ", ".join(f"{count} {word}" for word, count in report.items() if count) or "nothing else"


def held_out(names: Sequence[str], groups: Sequence[object], fraction: float,
             seed: int) -> np.ndarray:
  """Which files are held out: a fraction of each group, drawn by a hash of seed and name.

  A group gives its share to within one file, and all groups together theirs; a group never gives
  all, so that one of a single file stays whole.

  >>> held_out(["a0", "a1", "a2", "a3", "b0"], ["a", "a", "a", "a", "b"], 0.25, seed=0).sum()
  np.int64(1)

  Args:
    names: N of them.
    groups: of each, such as its class.
    fraction: more than 0, at most 0.5.
    seed: of the draw.

  Returns:
    bool [N].

  Raises:
    UserError: for another fraction.
  """
  if not 0 < fraction <= 0.5:
    raise UserError(f"test_fraction: expected more than 0 and at most 0.5, found {fraction}")
  sizes = collections.Counter(groups)
  order = sorted((str(groups[i]), _hash(f"{seed}/{names[i]}"), i) for i in range(len(names))
                 if sizes[groups[i]] > 1)
  held = np.zeros(len(names), bool)
  for k, (_, _, i) in enumerate(order):
    held[i] = int((k + 1) * fraction + 0.5) > int(k * fraction + 0.5)
  return held


def _hash(text: str) -> str:
  return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def divided(files: Files, groups: Sequence[object], fraction: float, seed: int,
            report: Report) -> Files:
  """The files with a train and a test split at least, none of whose contents is in another split.

  Args:
    files: scanned.
    groups: of each, for `held_out` where there is neither test nor validation.
    fraction: of train that becomes test then.
    seed: of that draw.
    report: where images that change their split or lose it are counted.

  Raises:
    UserError: where a split is left without any.
  """
  splits = np.where(files.splits == "", "train", files.splits)
  if "test" not in splits and "validation" in splits:
    report["validation image read as test"] = int((splits == "validation").sum())
    splits = np.where(splits == "validation", "test", splits)
  elif "test" not in splits:
    held = held_out(files.names, groups, fraction, seed)
    if not held.any():
      most = max(collections.Counter(groups).values())
      raise UserError(f"{files.root}: expected enough images of one class to cut a fraction of "
                      f"{fraction} from, found {most} at most\n"
                      "bring a test split, or set test_fraction")
    splits = np.where(held, "test", splits)
  last, times = {}, collections.Counter(zip(files.digests, splits.tolist()))
  for digest, split in times:
    last[digest] = max(last.get(digest, split), split, key=ORDER.index)
  fresh = np.array([last[digest] == split for digest, split in zip(files.digests, splits)], bool)
  report["same content in a later split"] = int((~fresh).sum())
  report["same content twice in a split (read)"] = sum(
      count - 1 for (digest, split), count in times.items() if last[digest] == split)
  fresh_files = dataclasses.replace(files, splits=splits).take(fresh)
  require(fresh_files, {"train", "test", *splits.tolist()}, report)
  return fresh_files


def source(kind: str, files: Files, columns: Mapping[str, np.ndarray], labels: Mapping[str, Label],
           report: Report, augmentation: Sequence[str]) -> Source:
  """The source of divided files with their labels.

  Its origin is kind, the folder's own name, the number of images and a fingerprint of names,
  contents, splits and labels: the same wherever the folder lies, another when any of these changes.

  Args:
    kind: "folder", "coco".
    files: divided.
    columns: labels [N, …] by name.
    labels: what they are.
    report: counts so far.
    augmentation: that leaves the labels true.
  """
  report = {word: count for word, count in sorted(report.items()) if count}
  splits = {}
  for split in ORDER:
    chosen = files.splits == split
    if chosen.any():
      part = files.take(chosen)
      splits[split] = ImageExamples([os.path.join(part.root, name) for name in part.names],
                                    part.how, {name: column[chosen]
                                               for name, column in columns.items()}, part.images)
  content = hashlib.blake2b(digest_size=6)
  for name, split, digest in zip(files.names, files.splits, files.digests):
    content.update(f"{name}\0{split}\0".encode("utf-8", "surrogateescape") + digest)
  for name in sorted(columns):
    content.update(f"{name}\0{tuple(labels[name].names)}\0".encode() + columns[name].tobytes())
  origin = f"{kind}:{files.root.name}:{len(files)}:{content.hexdigest()}"
  return Source(origin, splits, labels, augmentation, report)

