"""Data sets that TFDS has prepared as array_record or tfrecord, read without TensorFlow."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import os
import pathlib
from typing import TYPE_CHECKING

import numpy as np

from mtl_jax.data.features import Column, Place
from mtl_jax.data.images import Reading, Unusable, decode
from mtl_jax.data.stacking import stacked
from mtl_jax.errors import UserError

if TYPE_CHECKING:
  import tensorflow_datasets as tfds

_CHUNK = 64  # examples that a thread decodes at a time


@dataclasses.dataclass(frozen=True)
class Records:
  """Examples read and decoded when they are asked for.

  Attributes:
    origin: of the records, for messages.
    records: one serialised example each.
    features: the TFDS features that are read, of those that the records were serialised by.
    image: the name of the one that becomes "image".
    how: images are read.
    resized: whether images of another size come to that of `how`, or are refused.
    columns: how the other features become labels, by name.
  """

  origin: str
  records: "ArrayRecords | TFRecords"
  features: "tfds.features.FeaturesDict"
  image: str
  how: Reading
  resized: bool
  columns: Mapping[str, Column]

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
    return self._decoded(self.records[index])

  def arrays(self) -> Mapping[str, np.ndarray]:
    return self._stacked

  @functools.cached_property
  def _stacked(self) -> Mapping[str, np.ndarray]:
    def read(indices: Sequence[int]) -> Iterator[Mapping[str, np.ndarray]]:
      return map(self._decoded, self.records.read(indices))

    return stacked(self[0], len(self), read, _CHUNK)

  def _decoded(self, record: bytes) -> Mapping[str, np.ndarray]:
    example = self.features.deserialize_example_np(record, decoders=self._undecoded)
    try:
      image = decode(example[self.image], self.how)
    except Unusable as error:
      raise UserError(f"{self.origin}: expected images, found a {error}\n"
                      "prepare the data set again") from error
    place = Place((image.height, image.width), self.how.shape[:2])
    if not self.resized and place.original != place.result:
      raise UserError(f"{self.origin}: expected every image to be {_words(place.result)} as the "
                      f"first is, found one of {_words(place.original)}\n"
                      "give the stream a size that all images come to")
    try:
      return {"image": image.pixels, **{name: column.convert(example[name], place)
                                        for name, column in self.columns.items()}}
    except ValueError as error:
      raise UserError(f"{self.origin}: {error}") from error

  @functools.cached_property
  def _undecoded(self):
    import tensorflow_datasets as tfds
    return {name: tfds.decode.SkipDecoding() for name, feature in self.features.items()
            if isinstance(feature, tfds.features.Image)}


def _words(size: tuple[int, int]) -> str:
  return f"{size[0]}x{size[1]}"


# ---- What is prepared.


def local_folder(dir: str | os.PathLike[str]) -> pathlib.Path:
  """The data_dir of TFDS that `dir` names.

  Raises:
    UserError: where that is not a folder of this machine.
  """
  if "://" in os.fspath(dir):
    raise UserError(f"expected a folder of this machine as data.dir, found {dir}")
  return pathlib.Path(dir).expanduser()


def prepared(dataset: str, root: pathlib.Path) -> "tfds.core.DatasetBuilder | None":
  """The TFDS builder of a data set as it is prepared under `root`; None where it is not.

  Args:
    dataset: its name as TFDS writes it: "mnist", "mnist:3.*", "coco/2017", "robotics:mt_opt/sd".
      One with a namespace is looked for in `<root>/<namespace>` and in `root`.
    root: a data_dir of TFDS.

  Raises:
    UserError: for a name that is none, and a folder that is not as TFDS leaves it.
  """
  from google.protobuf import json_format
  from tensorflow_datasets.core import naming, read_only_builder, registered
  try:
    name, arguments = naming.parse_builder_name_kwargs(full_name(dataset))
  except ValueError as error:
    raise UserError("dataset: expected a name as TFDS writes it, such as mnist, mnist:3.0.1 or "
                    f"coco/2017, found {dataset!r}") from error
  for folder in ([root / name.namespace] if name.namespace else []) + [root]:
    try:
      return read_only_builder.builder_from_files(name.name, data_dir=folder, **arguments)
    except registered.DatasetNotFoundError:
      continue
    except (OSError, ValueError, KeyError, ImportError, json_format.ParseError) as error:
      raise broken(folder / name.name, error) from error
  return None


def full_name(dataset: str) -> str:
  """The name with all three parts of a version.

  >>> full_name("oxford_iiit_pet:3.*"), full_name("mnist:3.0.1"), full_name("kubric:movi_a")
  ('oxford_iiit_pet:3.*.*', 'mnist:3.0.1', 'kubric:movi_a')
  """
  name, colon, version = dataset.rpartition(":")
  if version[:1].isdigit():
    version = ".".join([*version.split("."), "*", "*"][:max(3, version.count(".") + 1)])
  return name + colon + version


@contextlib.contextmanager
def preparing(dataset: str, root: pathlib.Path) -> Iterator[None]:
  """Tells in words what may go wrong while a data set is being prepared under `root`."""
  try:
    yield
  except (OSError, RuntimeError) as error:  # array_record's writer raises the latter
    if not prepared(dataset, root):  # else another process was faster
      raise UserError(f"cannot prepare {dataset} in {root}: {str(error).partition(chr(10))[0]}\n"
                      "expected a folder with permission to write and room for it, as data.dir"
                      ) from error


def serialized(builder: "tfds.core.DatasetBuilder", split: str) -> "ArrayRecords | TFRecords":
  """The serialised examples of a split, or of a part of one such as "train[:80%]".

  Raises:
    UserError: where files are missing or damaged, or of another format.
  """
  import tensorflow_datasets as tfds
  file_format = builder.info.file_format.value
  if file_format not in ("array_record", "tfrecord"):
    raise UserError(f"expected {builder.data_path} to hold array_record or tfrecord, "
                    f"found {file_format}\nprepare the data set in another folder, as data.dir")
  shards = builder.info.splits[split].file_instructions
  for shard in shards:
    if not pathlib.Path(shard.filename).exists():
      raise damaged(pathlib.Path(shard.filename), "missing")
  if file_format == "tfrecord":
    return _tfrecords(shards)
  records = builder.as_data_source(
      split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
  start = 0
  for shard in shards:  # a file is opened, and found cut, when it is first read
    try:
      whole = records[start + shard.take - 1]
    except RuntimeError as error:
      raise damaged(pathlib.Path(shard.filename), f"damaged ({error})") from error
    if not whole:  # what array_record reads where a file ends too early, at the end of a block
      raise damaged(pathlib.Path(shard.filename), "cut")
    start += shard.take
  return ArrayRecords(str(builder.data_path), split, records)


@dataclasses.dataclass(frozen=True)
class ArrayRecords:
  """The records of array_record files, read when they are asked for.

  Attributes:
    folder: where the files are.
    split: which the records are of.
    records: as TFDS reads them.
  """

  folder: str
  split: str
  records: Sequence[bytes]

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: int) -> bytes:
    return self._read(lambda: [self.records[index]])[0]

  def read(self, indices: Sequence[int]) -> Sequence[bytes]:
    """Several records at once, ten times faster than one by one."""
    return self._read(lambda: self.records.__getitems__(list(indices)))

  def _read(self, read: Callable[[], Sequence[bytes]]) -> Sequence[bytes]:
    try:
      found = read()
      if all(found):
        return found
      reason = "cut"
    except RuntimeError as error:
      reason = f"damaged ({error})"
    raise UserError(f"expected the records of {self.split} in {self.folder} to be whole, found one "
                    f"{reason}\nremove that folder to have the data set prepared again")


# ---- TFRecord files, which TFDS itself reads with TensorFlow only.


@dataclasses.dataclass(frozen=True)
class TFRecords:
  """The records of TFRecord files, read when they are asked for.

  Attributes:
    paths: of the files.
    spans: int64 [N, 3]: which file, first byte, and the byte after the last one.
  """

  paths: Sequence[str]
  spans: np.ndarray

  def __len__(self) -> int:
    return len(self.spans)

  def __getitem__(self, index: int) -> bytes:
    path, start, end = self.spans[index].tolist()
    with open(self.paths[path], "rb") as file:
      file.seek(start)
      return file.read(end - start)

  def read(self, indices: Sequence[int]) -> Sequence[bytes]:
    """Several records."""
    return [self[index] for index in indices]


def _tfrecords(shards: Sequence["tfds.core.FileInstruction"]) -> TFRecords:
  spans = []
  for number, shard in enumerate(shards):
    path = pathlib.Path(shard.filename)
    found = [(number, *span) for span in _spans(path)]
    if len(found) != shard.examples_in_shard:
      raise damaged(path, f"cut to {len(found)} of {shard.examples_in_shard} records")
    spans += found[shard.skip:shard.skip + shard.take]
  return TFRecords([shard.filename for shard in shards],
                   np.array(spans, np.int64).reshape(-1, 3))


def _spans(path: pathlib.Path) -> Iterator[tuple[int, int]]:
  """Where records lie: each is its length, the length's CRC, its bytes, their CRC; all verified."""
  from google_crc32c import value as crc32c
  content = path.read_bytes()
  start = 0
  while start < len(content):
    body = start + 12
    end = body + int.from_bytes(content[start:start + 8], "little")
    if max(body, end) + 4 > len(content):
      raise damaged(path, f"cut within the record at byte {start}")
    for first, last in ((start, start + 8), (body, end)):
      crc = crc32c(content[first:last])
      masked = (crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF
      if masked.to_bytes(4, "little") != content[last:last + 4]:
        raise damaged(path, f"altered in the record at byte {start}")
    yield body, end
    start = end + 4


def broken(folder: pathlib.Path, reason: object) -> UserError:
  """The error for a folder that is not as TFDS leaves it."""
  reason = str(reason).partition("\n")[0]
  return UserError(f"expected {folder} to be as TFDS prepares it, found it broken: {reason}\n"
                   "mend it, or remove it to have the data set prepared again")


def damaged(path: pathlib.Path, found: str) -> UserError:
  """The error for a file of records that is not whole."""
  return UserError(f"expected {path} to be whole, found it {found}\n"
                   f"remove {path.parent} to have the data set prepared again")
