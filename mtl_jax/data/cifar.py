"""CIFAR-10 and CIFAR-100 from TFDS, without TensorFlow.

What TFDS has prepared is read where it lies. Otherwise the data set is prepared here, as TFDS would
do it, from the official binary archive, which is downloaded if nobody has put it in place.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import io
import os
import pathlib
import queue
import tarfile
import threading
from typing import TYPE_CHECKING
import urllib.parse
import uuid

import numpy as np

from mtl_jax.data.source import Label, Source
from mtl_jax.errors import MissingData, UserError

if TYPE_CHECKING:
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.download import checksums

_PROBE_SECONDS = 5.0
_TIMEOUT = (5.0, 30.0)  # seconds to connect, and between two answers


def cifar10(dir: str | os.PathLike[str], *, download: bool = True) -> Source:
  """CIFAR-10: 50,000 train and 10,000 test images, 32x32, with a `label` of 10 classes.

  Args:
    dir: a data_dir of TFDS, with the data set prepared (as array_record or tfrecord) or with the
      archive in `<dir>/downloads/manual/`, or where it shall be downloaded and prepared.
    download: whether a missing archive may be downloaded.

  Raises:
    MissingData: the data set is not there and cannot be downloaded.
    UserError: what is there is damaged, or there is no room or permission to prepare it.
  """
  return _source("cifar10", dir, download)


def cifar100(dir: str | os.PathLike[str], *, download: bool = True) -> Source:
  """CIFAR-100: as `cifar10`, with a `label` of 100 classes and a `coarse_label` of 20."""
  return _source("cifar100", dir, download)


@dataclasses.dataclass(frozen=True)
class Records:
  """Examples read and decoded when they are asked for.

  Attributes:
    records: one serialised example each.
    features: the TFDS features that they were serialised by.
    labels: names of the integer labels to keep.
  """

  records: Sequence[bytes]
  features: "tfds.features.FeaturesDict"
  labels: Sequence[str]

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
    return self._decoded(self.records[index])

  def arrays(self) -> Mapping[str, np.ndarray]:
    return self._columns

  @functools.cached_property
  def _columns(self) -> Mapping[str, np.ndarray]:
    records = self.records
    if hasattr(records, "__getitems__"):  # ten times faster than one by one
      records = records.__getitems__(list(range(len(records))))
    examples = [self._decoded(record) for record in records]
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}

  def _decoded(self, record: bytes) -> Mapping[str, np.ndarray]:
    import tensorflow_datasets as tfds
    from PIL import Image
    example = self.features.deserialize_example_np(
        record, decoders={"image": tfds.decode.SkipDecoding()})
    image = np.asarray(Image.open(io.BytesIO(example["image"])))
    return {"image": image, **{name: np.asarray(example[name], np.int32) for name in self.labels}}


def _source(name: str, dir: str | os.PathLike[str], download: bool) -> Source:
  import tensorflow_datasets as tfds
  if "://" in os.fspath(dir):
    raise UserError(f"expected a folder of this machine as data.dir, found {dir}")
  root = pathlib.Path(dir).expanduser()
  builder = _prepared(name, root)
  if builder is None:
    _prepare(name, root, download)
    builder = _prepared(name, root)
  if builder is None:
    raise _broken(root / name, "its description is missing")
  features = builder.info.features
  labels = {key: Label("class", feature.num_classes, tuple(feature.names))
            for key, feature in features.items()
            if isinstance(feature, tfds.features.ClassLabel)}
  return Source(
      origin=f"tfds:{name}:{builder.version}",
      splits={split: Records(_records(builder, split), features, tuple(labels))
              for split in ("train", "test")},
      labels=labels,
      augmentation=("crop", "flip"),
  )


# ---- Reading what TFDS has prepared.


def _prepared(name: str, root: pathlib.Path) -> "tfds.core.DatasetBuilder | None":
  """The TFDS builder of the data set as it is prepared under `root`; None where it is not."""
  from tensorflow_datasets.core import read_only_builder, registered
  try:
    return read_only_builder.builder_from_files(name, data_dir=root)
  except registered.DatasetNotFoundError:
    return None
  except OSError as error:
    raise _broken(root / name, error) from error


def _records(builder: "tfds.core.DatasetBuilder", split: str) -> Sequence[bytes]:
  import tensorflow_datasets as tfds
  file_format = builder.info.file_format.value
  if file_format not in ("array_record", "tfrecord"):
    raise UserError(f"expected {builder.data_path} to hold array_record or tfrecord, "
                    f"found {file_format}\nprepare the data set in another folder, as data.dir")
  shards = builder.info.splits[split]
  for path in shards.filepaths:
    if not path.exists():
      raise _damaged(path, "missing")
  if file_format == "array_record":
    records = builder.as_data_source(
        split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    try:
      for index in (0, len(records) - 1):  # a file is opened, and found cut, when it is first read
        records[index]
    except RuntimeError as error:
      raise _damaged(shards.filepaths[0], f"damaged ({error})") from error
    return records
  records = []
  for path, length in zip(shards.filepaths, shards.shard_lengths):
    shard = list(_tfrecords(path))
    if len(shard) != length:
      raise _damaged(path, f"cut to {len(shard)} of {length} records")
    records += shard
  return records


def _tfrecords(path: pathlib.Path) -> Iterator[bytes]:
  """The records of a TFRecord file: each is its length, the length's CRC, its bytes, their CRC."""
  from google_crc32c import value as crc32c
  content = path.read_bytes()
  start = 0
  while start < len(content):
    body = start + 12
    end = body + int.from_bytes(content[start:start + 8], "little")
    if max(body, end) + 4 > len(content):
      raise _damaged(path, f"cut within the record at byte {start}")
    for first, last in ((start, start + 8), (body, end)):
      crc = crc32c(content[first:last])
      masked = (crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF
      if masked.to_bytes(4, "little") != content[last:last + 4]:
        raise _damaged(path, f"altered in the record at byte {start}")
    yield content[body:end]
    start = end + 4


def _broken(folder: pathlib.Path, reason: object) -> UserError:
  return UserError(f"expected {folder} to be as TFDS prepares it, found it broken: {reason}\n"
                   "mend it, or remove it to have the data set prepared again")


def _damaged(path: pathlib.Path, found: str) -> UserError:
  return UserError(f"expected {path} to be whole, found it {found}\n"
                   f"remove {path.parent} to have the data set prepared again")


# ---- Preparing it from the archive.


def _prepare(name: str, root: pathlib.Path, download: bool) -> None:
  import tensorflow_datasets as tfds
  (url, expected), = tfds.builder_cls(name).url_infos.items()
  archive = root / "downloads" / "manual" / expected.filename
  try:
    if archive.exists():
      _verify(archive, expected, f"replace it by {url}")
    else:
      _download(name, url, expected, archive, allowed=download)
    _archive_builder(name, archive)(data_dir=root).download_and_prepare(file_format="array_record")
  except (OSError, RuntimeError) as error:  # array_record's writer raises the latter
    if _prepared(name, root):
      return  # another process was faster
    raise UserError(f"cannot prepare {name} in {root}: {str(error).partition(chr(10))[0]}\n"
                    "expected a folder with permission to write and 1 GB of room, as data.dir"
                    ) from error


def _archive_builder(name: str, archive: pathlib.Path) -> "type[tfds.core.DatasetBuilder]":
  """TFDS's own builder of the data set, except that numpy and pillow read the archive."""
  import tensorflow_datasets as tfds
  official = tfds.builder_cls(name)

  class ArchiveBuilder(official, skip_registration=True):
    name = official.name
    url_infos = official.url_infos

    def _split_generators(self, dl_manager):
      layout = self._cifar_info
      with tarfile.open(archive, "r|gz") as tar:  # one pass: a gzip cannot be read at random
        files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
      for key, file in zip(layout.label_keys, layout.label_files):
        self.info.features[key].names = files[layout.prefix + file].decode().split()
      return {
          split: self._generate_examples(split, b"".join(files[layout.prefix + f] for f in parts))
          for split, parts in (("train", layout.train_files), ("test", layout.test_files))
      }

    def _generate_examples(self, split, content):
      from PIL import Image
      keys = self._cifar_info.label_keys
      rows = np.frombuffer(content, np.uint8).reshape(-1, len(keys) + 3 * 32 * 32)
      for index, row in enumerate(rows):
        image = row[len(keys):].reshape(3, 32, 32).transpose(1, 2, 0)
        labels = dict(zip(keys, row.tolist()))
        yield index, {"id": f"{split}_{index:05d}", "image": Image.fromarray(image), **labels}

  return ArchiveBuilder


def _verify(file: pathlib.Path, expected: "checksums.UrlInfo", remedy: str) -> None:
  from tensorflow_datasets.core.download import checksums
  found = checksums.compute_url_info(file)
  if found != expected:
    raise UserError(
        f"expected {file} to have {expected.size} bytes and SHA-256 {expected.checksum}\n"
        f"found {found.size} bytes and SHA-256 {found.checksum}\n{remedy}")


# ---- Downloading the archive.


def _download(name: str, url: str, expected: "checksums.UrlInfo", archive: pathlib.Path, *,
              allowed: bool) -> None:
  """Downloads to a name of this process alone; only what has been verified becomes `archive`."""
  import requests
  part = archive.with_name(f"{archive.name}.{uuid.uuid4().hex}")
  try:
    if not allowed:
      raise requests.ConnectionError("data.download is off")
    if not _reachable("{0.scheme}://{0.netloc}".format(urllib.parse.urlsplit(url))):
      raise requests.ConnectionError("no answer")
    archive.parent.mkdir(parents=True, exist_ok=True)
    _fetch(url, expected.size, part)
    _verify(part, expected, f"the download was removed: try again, or place {archive} yourself")
    part.replace(archive)
  except requests.RequestException as error:
    raise MissingData(
        f"expected {name} prepared by TFDS in {archive.parents[2] / name}, or {archive}: found "
        f"neither\nand {url} cannot be downloaded: {error}\n"
        "place that archive, prepare the data set with TFDS, or set config.data.missing=sample"
    ) from error
  finally:
    part.unlink(missing_ok=True)


@functools.cache
def _reachable(site: str) -> bool:
  """Whether the site answers. The wait has a bound that a resolver without one cannot exceed."""
  answers = queue.SimpleQueue()
  threading.Thread(target=lambda: answers.put(_answers(site)), daemon=True).start()
  try:
    return answers.get(timeout=_PROBE_SECONDS)
  except queue.Empty:
    return False


def _answers(site: str) -> bool:
  import requests
  try:
    requests.head(site, timeout=_PROBE_SECONDS)
  except requests.RequestException:
    return False
  return True


def _fetch(url: str, size: int, file: pathlib.Path) -> None:
  """Downloads `url`, taking up again from where a lost connection left off."""
  import requests
  from rich import console, progress
  columns = (progress.TextColumn("{task.description}"), progress.BarColumn(),
             progress.DownloadColumn(), progress.TransferSpeedColumn(),
             progress.TimeRemainingColumn())
  screen = console.Console(stderr=True)
  with file.open("wb") as output, progress.Progress(*columns, console=screen) as bar:
    task = bar.add_task(url.rpartition("/")[2], total=size)
    while (done := output.tell()) < size:
      try:
        headers = {"Range": f"bytes={done}-"} if done else {}
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
          response.raise_for_status()
          if response.status_code != requests.codes.partial_content:
            output.truncate(output.seek(0))  # the server sends the whole again
          for block in response.iter_content(1 << 16):
            output.write(block)
            bar.update(task, completed=output.tell())
        return
      except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
        if output.tell() <= done:
          raise
