"""CIFAR-10 and CIFAR-100 from TFDS, without TensorFlow.

What TFDS has prepared is read where it lies. Otherwise the data set is prepared here, as TFDS would
do it, from the official binary archive, which is downloaded if nobody has put it in place.
"""

import functools
import os
import pathlib
import queue
import tarfile
import threading
from typing import TYPE_CHECKING
import urllib.parse
import uuid

import numpy as np

from mtl_jax.data.records import broken, local_folder, prepared, preparing
from mtl_jax.data.source import Source
from mtl_jax.data.tfds import source
from mtl_jax.errors import MissingData, UserError

if TYPE_CHECKING:
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.download import checksums

LABELS = {"cifar10": ("label",), "cifar100": ("label", "coarse_label")}

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


def _source(name: str, dir: str | os.PathLike[str], download: bool) -> Source:
  root = local_folder(dir)
  builder = prepared(name, root)
  if builder is None:
    _prepare(name, root, download)
    builder = prepared(name, root)
  if builder is None:
    raise broken(root / name, "its description is missing")
  return source(builder, labels=LABELS[name], augmentation=("crop", "flip"))


# ---- Preparing it from the archive.


def _prepare(name: str, root: pathlib.Path, download: bool) -> None:
  import tensorflow_datasets as tfds
  (url, expected), = tfds.builder_cls(name).url_infos.items()
  archive = root / "downloads" / "manual" / expected.filename
  with preparing(name, root):
    if archive.exists():
      _verify(archive, expected, f"replace it by {url}")
    else:
      _download(name, url, expected, archive, allowed=download)
    _archive_builder(name, archive)(data_dir=root).download_and_prepare(file_format="array_record")


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
  def missing(reason: object) -> MissingData:
    return MissingData(
        f"expected {name} prepared by TFDS in {archive.parents[2] / name}, or {archive}: found "
        f"neither\nand {url} cannot be downloaded: {reason}\n"
        "place that archive, prepare the data set with TFDS, or set config.data.missing=sample")

  if not allowed:
    raise missing("data.download is off")
  import requests  # Here: it takes a quarter of a second.
  part = archive.with_name(f"{archive.name}.{uuid.uuid4().hex}")
  try:
    if not _reachable("{0.scheme}://{0.netloc}".format(urllib.parse.urlsplit(url))):
      raise requests.ConnectionError("no answer")
    archive.parent.mkdir(parents=True, exist_ok=True)
    _fetch(url, expected.size, part)
    _verify(part, expected, f"the download was removed: try again, or place {archive} yourself")
    part.replace(archive)
  except requests.RequestException as error:
    raise missing(error) from error
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
