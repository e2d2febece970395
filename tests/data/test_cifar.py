"""CIFAR is prepared, found, read in both formats, downloaded; every mishap says what to do."""

import contextlib
import errno
import hashlib
import http.server
import io
import json
import pathlib
import pickle
import re
import tarfile
import tempfile
import threading
import time

import numpy as np
import pytest

from mtl_jax.data import cifar
from mtl_jax.errors import MissingData, UserError

ARCHIVES = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}
SOURCES = {"cifar10": cifar.cifar10, "cifar100": cifar.cifar100}
NUM_CLASSES = {"cifar10": {"label": 10}, "cifar100": {"label": 100, "coarse_label": 20}}
SIZES = {"train": 50, "test": 10}


@pytest.fixture(autouse=True)
def nothing_remains(tmp_path_factory, monkeypatch):
  """The probe's answer is forgotten; TFDS's temporary folders go with the test's own."""
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
  cifar._reachable.cache_clear()
  yield
  cifar._reachable.cache_clear()


@pytest.fixture
def offline(monkeypatch):
  monkeypatch.setattr(cifar, "_answers", lambda site: False)


def made_archive(name: str) -> tuple[bytes, dict[str, dict[str, np.ndarray]]]:
  """A small archive as it is published, and the columns that are in it."""
  rng = np.random.default_rng(0)
  columns = {
      split: {"image": rng.integers(0, 256, (size, 32, 32, 3), np.uint8),
              **{key: rng.integers(0, classes, size, np.int32)
                 for key, classes in NUM_CLASSES[name].items()}}
      for split, size in SIZES.items()}

  def rows(split, start=0, stop=None):
    labels = [columns[split][key][start:stop] for key in ("coarse_label", "label")
              if key in columns[split]]
    pixels = columns[split]["image"][start:stop].transpose(0, 3, 1, 2)
    return np.column_stack([*labels, pixels.reshape(len(pixels), -1)]).astype(np.uint8).tobytes()

  def names(count):
    return "".join(f"class_{i}\n" for i in range(count)).encode()

  if name == "cifar10":
    files = {"batches.meta.txt": names(10) + b"\n", "test_batch.bin": rows("test")}
    files |= {f"data_batch_{i + 1}.bin": rows("train", 10 * i, 10 * i + 10) for i in range(5)}
    folder = "cifar-10-batches-bin"
  else:
    files = {"fine_label_names.txt": names(100), "coarse_label_names.txt": names(20),
             "train.bin": rows("train"), "test.bin": rows("test")}
    folder = "cifar-100-binary"
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
    for file, content in files.items():
      entry = tarfile.TarInfo(f"{folder}/{file}")
      entry.size = len(content)
      tar.addfile(entry, io.BytesIO(content))
  return buffer.getvalue(), columns


def expect(monkeypatch, name: str, content: bytes, site: str = "http://127.0.0.1:9") -> None:
  """Has TFDS expect this archive, at a site where nothing answers unless a test says otherwise."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.download import checksums
  info = checksums.UrlInfo(
      size=len(content), checksum=hashlib.sha256(content).hexdigest(), filename=ARCHIVES[name])
  monkeypatch.setattr(
      tfds.builder_cls(name), "url_infos", {f"{site}/{ARCHIVES[name]}": info})


def place(root: pathlib.Path, name: str, content: bytes) -> pathlib.Path:
  archive = root / "downloads" / "manual" / ARCHIVES[name]
  archive.parent.mkdir(parents=True, exist_ok=True)
  archive.write_bytes(content)
  return archive


def prepared(monkeypatch, root: pathlib.Path, name: str) -> dict[str, dict[str, np.ndarray]]:
  content, columns = made_archive(name)
  expect(monkeypatch, name, content)
  place(root, name, content)
  SOURCES[name](root)
  return columns


def in_order(columns) -> list[np.ndarray]:
  """The columns in an order of their own content: TFDS shuffles what it prepares."""
  order = np.argsort([image.tobytes() for image in columns["image"]])
  return [np.asarray(columns[key])[order] for key in sorted(columns)]


def assert_same(source, columns) -> None:
  assert set(source.splits) == {"train", "test"}
  for split, examples in source.splits.items():
    assert len(examples) == SIZES[split]
    found = examples.arrays()
    assert set(found) == set(columns[split])
    assert found["image"].dtype == np.uint8 and found["label"].dtype == np.int32
    for ours, theirs in zip(in_order(found), in_order(columns[split])):
      np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", SOURCES)
def test_prepares_the_archive_and_finds_the_result_again(tmp_path, monkeypatch, offline, name):
  columns = prepared(monkeypatch, tmp_path, name)
  (tmp_path / "downloads" / "manual" / ARCHIVES[name]).unlink()
  source = SOURCES[name](str(tmp_path))
  assert re.fullmatch(rf"tfds:{name}:\d+\.\d+\.\d+", source.origin)
  assert {key: label.num_classes for key, label in source.labels.items()} == NUM_CLASSES[name]
  assert {label.kind for label in source.labels.values()} == {"class"}
  assert tuple(source.augmentation) == ("crop", "flip")
  assert_same(source, columns)
  version = source.origin.rpartition(":")[2]
  assert [path.name for path in (tmp_path / name).iterdir()] == [version]


@pytest.mark.parametrize("name", SOURCES)
def test_tfds_itself_reads_what_was_prepared(tmp_path, monkeypatch, name):
  import tensorflow_datasets as tfds
  columns = prepared(monkeypatch, tmp_path, name)
  for split in SIZES:
    examples = list(tfds.data_source(name, data_dir=tmp_path, split=split))
    assert sorted(e["id"] for e in examples) == [
        f"{split}_{i:05d}".encode() for i in range(SIZES[split])]
    found = {key: np.stack([e[key] for e in examples]) for key in columns[split]}
    for ours, theirs in zip(in_order(found), in_order(columns[split])):
      np.testing.assert_array_equal(ours, theirs)
  official = tfds.builder_cls(name)(data_dir=tmp_path / "elsewhere").info.features
  ours = tfds.builder(name, data_dir=tmp_path).info.features
  assert repr(ours) == repr(official)
  assert ours["label"].int2str(3) == "class_3"


def test_examples_are_read_one_by_one_and_travel_to_other_processes(tmp_path, monkeypatch):
  prepared(monkeypatch, tmp_path, "cifar100")
  examples = cifar.cifar100(tmp_path).splits["train"]
  whole = examples.arrays()
  assert examples.arrays() is whole
  for copy in (examples, pickle.loads(pickle.dumps(cifar.cifar100(tmp_path).splits["train"]))):
    for i in (0, 7, 49):
      assert set(copy[i]) == set(whole)
      for key, value in copy[i].items():
        assert value.dtype == whole[key].dtype
        np.testing.assert_array_equal(value, whole[key][i])


def as_tfrecord(root: pathlib.Path, name: str) -> pathlib.Path:
  """Rewrites what is prepared under `root` as TFRecord files; returns the train file."""
  from tensorboardX.record_writer import RecordWriter
  splits = {split: [bytes(examples.records[i]) for i in range(len(examples))]
            for split, examples in SOURCES[name](root).splits.items()}
  info, = root.glob(f"{name}/*/dataset_info.json")
  info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
  for path in info.parent.glob("*.array_record-*"):
    path.unlink()
  for split, records in splits.items():
    path = info.parent / f"{name}-{split}.tfrecord-00000-of-00001"
    with contextlib.closing(RecordWriter(str(path))) as writer:
      for record in records:
        writer.write(record)
  return info.parent / f"{name}-train.tfrecord-00000-of-00001"


@pytest.mark.parametrize("name", SOURCES)
def test_reads_tfrecord(tmp_path, monkeypatch, name):
  columns = prepared(monkeypatch, tmp_path, name)
  as_tfrecord(tmp_path, name)
  assert_same(SOURCES[name](tmp_path), columns)


def cut_within_a_record(content: bytes) -> bytes:
  return content[:-5]


def cut_within_a_header(content: bytes) -> bytes:
  return content + b"\1\0\0"


def cut_between_records(content: bytes) -> bytes:
  return content[:16 + int.from_bytes(content[:8], "little")]


def altered(content: bytes) -> bytes:
  return content[:100] + bytes([content[100] ^ 1]) + content[101:]


@pytest.mark.parametrize(
    "damage", [cut_within_a_record, cut_within_a_header, cut_between_records, altered])
def test_damaged_tfrecord_is_named(tmp_path, monkeypatch, damage):
  prepared(monkeypatch, tmp_path, "cifar10")
  path = as_tfrecord(tmp_path, "cifar10")
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(UserError, match=f"{re.escape(str(path))} to be whole, found it (cut|alter)"):
    cifar.cifar10(tmp_path)


def test_damaged_array_record_is_named(tmp_path, monkeypatch):
  prepared(monkeypatch, tmp_path, "cifar10")
  path, = tmp_path.glob("cifar10/*/*-test.array_record-*")
  path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(UserError, match=re.escape(str(path))):
    cifar.cifar10(tmp_path)
  path.unlink()
  with pytest.raises(UserError, match="found it missing"):
    cifar.cifar10(tmp_path)


def test_wrong_archive_is_refused_and_kept(tmp_path, monkeypatch):
  content, _ = made_archive("cifar10")
  expect(monkeypatch, "cifar10", content)
  archive = place(tmp_path, "cifar10", b"something else")
  with pytest.raises(UserError) as caught:
    cifar.cifar10(tmp_path)
  message = str(caught.value)
  assert str(archive) in message and "found 14 bytes" in message and "replace it" in message
  assert len(message.splitlines()) <= 3
  assert archive.read_bytes() == b"something else"
  assert not (tmp_path / "cifar10").exists()


@pytest.mark.parametrize("name", SOURCES)
def test_missing_data_says_what_to_do(tmp_path, monkeypatch, offline, name):
  with pytest.raises(MissingData) as caught:
    SOURCES[name](tmp_path / "data")
  message = str(caught.value)
  assert str(tmp_path / "data" / "downloads" / "manual" / ARCHIVES[name]) in message
  assert "data.missing=sample" in message and len(message.splitlines()) <= 3
  assert not (tmp_path / "data").exists()


def test_a_network_that_hangs_is_waited_for_once_and_not_long(tmp_path, monkeypatch):
  probes, released = [], threading.Event()

  def hang(site):
    probes.append(site)
    return released.wait(60)

  monkeypatch.setattr(cifar, "_answers", hang)
  monkeypatch.setattr(cifar, "_PROBE_SECONDS", 0.2)
  start = time.monotonic()
  for source in SOURCES.values():
    with pytest.raises(MissingData, match="no answer"):
      source(tmp_path)
  released.set()
  assert time.monotonic() - start < 5 and len(probes) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
  content, _ = made_archive("cifar10")
  expect(monkeypatch, "cifar10", content)
  place(tmp_path, "cifar10", content)
  (tmp_path / "cifar10").symlink_to(tmp_path / "nowhere" / "at" / "all")  # not even root writes it
  with pytest.raises(UserError, match=f"cannot prepare cifar10 in {re.escape(str(tmp_path))}"):
    cifar.cifar10(tmp_path)


def test_a_bucket_is_refused():
  with pytest.raises(UserError, match="a folder of this machine as data.dir, found gs://bucket"):
    cifar.cifar10("gs://bucket/data")


def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
  from PIL import Image
  content, columns = made_archive("cifar10")
  expect(monkeypatch, "cifar10", content)
  place(tmp_path, "cifar10", content)
  with monkeypatch.context() as patch:
    def full(array, *args):
      raise OSError(errno.ENOSPC, "No space left on device")
    patch.setattr(Image, "fromarray", full)
    with pytest.raises(UserError, match="No space left on device") as caught:
      cifar.cifar10(tmp_path)
  assert len(str(caught.value).splitlines()) <= 2
  assert not list((tmp_path / "cifar10").iterdir())
  assert_same(cifar.cifar10(tmp_path), columns)


@pytest.mark.parametrize("lost", ["dataset_info.json", "features.json"])
def test_a_broken_folder_is_named(tmp_path, monkeypatch, lost):
  prepared(monkeypatch, tmp_path, "cifar10")
  path, = tmp_path.glob(f"cifar10/*/{lost}")
  path.unlink()
  with pytest.raises(UserError, match=f"{re.escape(str(tmp_path / 'cifar10'))} .* found it broken"):
    cifar.cifar10(tmp_path)


class Site(http.server.BaseHTTPRequestHandler):
  """Serves one archive; loses the first connection halfway if told so."""

  content = b""
  cut = False
  ranges = True
  requests = []

  def do_HEAD(self):
    self.send_response(200)
    self.end_headers()

  def do_GET(self):
    cls = type(self)
    wanted = self.headers.get("Range")
    cls.requests.append(wanted)
    if not cls.content:
      self.send_error(404)
      return
    start = int(wanted[len("bytes="):-1]) if wanted and cls.ranges else 0
    self.send_response(206 if start else 200)
    self.send_header("Content-Length", str(len(cls.content) - start))
    self.end_headers()
    stop = len(cls.content) // 2 if cls.cut else None
    cls.cut = False
    self.wfile.write(cls.content[start:stop])

  def log_message(self, *args):
    pass


@pytest.fixture
def site(monkeypatch):
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  for attribute in ("content", "cut", "ranges"):
    monkeypatch.setattr(Site, attribute, getattr(Site, attribute))
  monkeypatch.setattr(Site, "requests", [])
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


@pytest.mark.parametrize("cut, ranges", [(False, True), (True, True), (True, False)])
def test_downloads_and_resumes(tmp_path, monkeypatch, site, cut, ranges):
  Site.content, columns = made_archive("cifar10")
  Site.cut, Site.ranges = cut, ranges
  expect(monkeypatch, "cifar10", Site.content, site)
  assert_same(cifar.cifar10(tmp_path), columns)
  archive = tmp_path / "downloads" / "manual" / ARCHIVES["cifar10"]
  assert list(archive.parent.iterdir()) == [archive]
  assert len(Site.requests) == 1 + cut
  assert archive.read_bytes() == Site.content


def test_a_wrong_download_is_removed(tmp_path, monkeypatch, site):
  content, _ = made_archive("cifar10")
  expect(monkeypatch, "cifar10", content, site)
  Site.content = content[:-1] + b"!"
  with pytest.raises(UserError, match="the download was removed: try again"):
    cifar.cifar10(tmp_path)
  assert not list((tmp_path / "downloads" / "manual").iterdir())


def test_a_site_without_the_archive_is_missing_data(tmp_path, monkeypatch, site):
  expect(monkeypatch, "cifar10", b"anything", site)
  with pytest.raises(MissingData, match="404"):
    cifar.cifar10(tmp_path)
  assert not list((tmp_path / "downloads" / "manual").iterdir())


def test_nothing_is_downloaded_where_that_is_off(tmp_path, monkeypatch):
  monkeypatch.setattr(cifar, "_answers", lambda site: pytest.fail("asked the network"))
  with pytest.raises(MissingData, match="cannot be downloaded: data.download is off"):
    cifar.cifar10(tmp_path, download=False)
