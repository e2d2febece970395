"""Data sets as TFDS prepares them: each feature becomes its label, in both file formats."""

import json
import pathlib
import pickle
import tempfile

import numpy as np
import pytest

from mtl_jax.data import streams
from mtl_jax.data.source import Label
from mtl_jax.data.tfds import tfds
from mtl_jax.errors import MissingData, UserError

H, W = 6, 4
COUNTS = {"train": 12, "test": 4, "validation": 2}
BOX = (0.25, 0.125, 0.75, 0.5)  # ymin, xmin, ymax, xmax
OURS = [0.125, 0.25, 0.5, 0.75]  # x1, y1, x2, y2


@pytest.fixture(autouse=True)
def nothing_remains(tmp_path_factory, monkeypatch):
  """TFDS's temporary folders go with the test's own."""
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


def features():
  from tensorflow_datasets import features as kinds
  return {
      "photo": kinds.Image(shape=(H, W, 3)),
      "species": kinds.ClassLabel(names=["cat", "dog", "owl"]),
      "file_name": kinds.Text(),
      "weight": kinds.Scalar(dtype=np.float64),
      "pose": kinds.Tensor(shape=(3,), dtype=np.float32),
      "alive": kinds.Scalar(dtype=np.bool_),
      "marks": kinds.Tensor(shape=(2,), dtype=np.bool_),
      "head": kinds.BBoxFeature(),
      "objects": kinds.Sequence({"bbox": kinds.BBoxFeature(), "is_crowd": np.bool_,
                                 "label": kinds.ClassLabel(num_classes=5),
                                 "size": kinds.ClassLabel(num_classes=2)}),
      "faces": kinds.Sequence({"bbox": kinds.BBoxFeature(), "blur": np.uint8}),
      "trimap": kinds.Image(shape=(None, None, 1), use_colormap=True),
      "parts": kinds.LabeledImage(shape=(None, None, 1), labels=4),
      "attributes": {"Young": np.bool_, "5_o_Clock": np.bool_, "Bald": np.bool_},
      "depth": kinds.Tensor(shape=(H, W), dtype=np.float16),
      "age": kinds.Scalar(dtype=np.int64),
      "words": kinds.Sequence(kinds.ClassLabel(num_classes=3)),
      "landmarks": {"x": np.int64, "y": np.int64},
      "sound": kinds.Tensor(shape=(None,), dtype=np.float32),
  }


def drawn(i: int) -> dict:
  """Example i, as a builder yields it."""
  from PIL import Image
  from tensorflow_datasets import features as kinds
  pixels = np.random.default_rng(i).integers(0, 256, (H, W, 3), np.uint8)
  mask = np.full((H, W), 1 + i % 3, np.uint8)
  mask[0, 0] = 255
  box = kinds.BBox(*BOX)
  objects = [{"bbox": box, "is_crowd": j == 2, "label": (i + j) % 5, "size": 0}
             for j in range(i % 4)]
  return {
      "photo": Image.fromarray(pixels), "species": i % 3, "file_name": f"{i}.jpg",
      "weight": i / 4, "pose": np.arange(3, dtype=np.float32) + i, "alive": i % 2 == 0,
      "marks": np.array([i > 2, True]),
      "head": box, "objects": objects, "faces": [{"bbox": box, "blur": 0}] * (i % 3),
      "trimap": Image.fromarray(mask), "parts": Image.fromarray(mask),
      "attributes": {"Young": i % 2 == 0, "5_o_Clock": True, "Bald": False},
      "depth": np.full((H, W), i, np.float16), "age": i, "words": [1, 2],
      "landmarks": {"x": 1, "y": 2}, "sound": np.zeros(i, np.float32)}


def prepare(root: pathlib.Path, name: str = "tiny_pets", made=features, draw=drawn,
            counts=COUNTS, config: str = "", version: str = "1.2.0") -> pathlib.Path:
  """Prepares a data set by TFDS's own writers; returns its folder."""
  import tensorflow_datasets
  from tensorflow_datasets import core, features as kinds

  class Made(core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = core.Version(version)
    BUILDER_CONFIGS = [core.BuilderConfig(name=config)] if config else []

    def _info(self):
      return core.DatasetInfo(builder=self, features=kinds.FeaturesDict(made()))

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(count) for split, count in counts.items()}

    def _generate_examples(self, count):
      for i in range(count):
        yield i, draw(i)

  Made.name = name
  builder = Made(data_dir=root)
  builder.download_and_prepare(
      file_format="array_record",
      download_config=tensorflow_datasets.download.DownloadConfig(num_shards=2))
  return pathlib.Path(builder.data_dir)


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
  """A data_dir with tiny_pets in it, for tests that only read."""
  root = tmp_path_factory.mktemp("prepared")
  prepare(root)
  return root


def as_tfrecord(folder: pathlib.Path) -> None:
  """Rewrites what is prepared in a folder as TFRecord files, shard by shard."""
  from array_record.python import array_record_data_source
  from tensorboardX.record_writer import RecordWriter
  info = folder / "dataset_info.json"
  info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
  for path in sorted(folder.glob("*.array_record-*")):
    records = array_record_data_source.ArrayRecordDataSource([str(path)])
    writer = RecordWriter(str(path).replace("array_record", "tfrecord"))
    for i in range(len(records)):
      writer.write(records[i])
    writer.close()
    path.unlink()


def test_each_feature_becomes_its_label(pets):
  source = tfds(pets, dataset="tiny_pets")
  assert source.origin == "tfds:tiny_pets:1.2.0" and tuple(source.augmentation) == ()
  assert {split: len(examples) for split, examples in source.splits.items()} == COUNTS
  assert dict(source.labels) == {
      "species": Label("class", 3, ("cat", "dog", "owl")),
      "weight": Label("number"),
      "pose": Label("number"),
      "alive": Label("class", 2, ("false", "true")),
      "marks": Label("binary", None, ("0", "1")),
      "head": Label("box"),
      "objects": Label("objects", 5, ("0", "1", "2", "3", "4")),
      "faces": Label("objects", 1),
      "trimap": Label("mask", 4),
      "parts": Label("mask", 4, ("0", "1", "2", "3")),
      "attributes": Label("binary", None, ("5_o_Clock", "Bald", "Young")),
      "depth": Label("map"),
  }
  assert source.report == {f"feature that is no label (left out): {name}": 1
                           for name in ("age", "file_name", "landmarks", "sound", "words")}


def test_values_are_those_that_were_prepared(pets):
  for examples in tfds(pets, dataset="tiny_pets").splits.values():
    seen = set()
    for k in range(len(examples)):
      example = examples[k]
      i = int(4 * example["weight"])
      seen.add(i)
      expected = drawn(i)
      np.testing.assert_array_equal(example["image"], np.asarray(expected["photo"]))
      assert example["image"].dtype == np.uint8 and example["weight"].dtype == np.float32
      assert example["species"] == i % 3 and example["species"].dtype == np.int32
      assert example["alive"] == (i % 2 == 0)
      np.testing.assert_array_equal(example["marks"], [i > 2, 1])
      np.testing.assert_array_equal(example["pose"], expected["pose"])
      np.testing.assert_allclose(example["head"], OURS)
      np.testing.assert_array_equal(example["attributes"], [1, 0, i % 2 == 0])
      np.testing.assert_array_equal(example["depth"], np.full((H, W), i, np.float32))
      for name in ("trimap", "parts"):
        assert example[name].dtype == np.int32 and example[name][0, 0] == -1
        assert (example[name].ravel()[1:] == 1 + i % 3).all()
      shown = [j for j in range(i % 4) if j != 2]
      assert example["objects"].shape == (2, 5) and example["objects"].dtype == np.float32
      np.testing.assert_allclose(example["objects"], [
          [*OURS, (i + j) % 5] for j in shown] + [[0, 0, 0, 0, -1]] * (2 - len(shown)))
      np.testing.assert_allclose(
          example["faces"], [[*OURS, 0]] * (i % 3) + [[0, 0, 0, 0, -1]] * (2 - i % 3))
    assert seen == set(range(len(examples)))


def test_labels_pass_the_checks_of_the_streams(pets):
  source = tfds(pets, dataset="tiny_pets")
  streams.check_labels("pets", source.splits["train"].arrays(), source.labels)


@pytest.mark.parametrize("size", [None, 3])
def test_arrays_are_the_examples_and_travel_to_other_processes(pets, size):
  examples = tfds(pets, dataset="tiny_pets", size=size).splits["train"]
  whole = examples.arrays()
  assert examples.arrays() is whole
  for read in (examples, pickle.loads(pickle.dumps(tfds(pets, dataset="tiny_pets", size=size)
                                                   .splits["train"]))):
    for k in range(len(read)):
      for name, value in read[k].items():
        assert value.dtype == whole[name].dtype, name
        np.testing.assert_array_equal(value, whole[name][k])


def test_tfrecord_holds_the_same_examples(tmp_path):
  folder = prepare(tmp_path)
  expected = tfds(tmp_path, dataset="tiny_pets")
  before = {split: examples.arrays() for split, examples in expected.splits.items()}
  halves = {"train": "train[:50%]", "test": "train[50%:]"}
  before |= {half: examples.arrays() for half, examples in zip(halves.values(), tfds(
      tmp_path, dataset="tiny_pets", splits=halves).splits.values())}
  as_tfrecord(folder)
  found = tfds(tmp_path, dataset="tiny_pets")
  assert (found.labels, found.report) == (expected.labels, expected.report)
  after = dict(found.splits) | dict(zip(halves.values(), tfds(
      tmp_path, dataset="tiny_pets", splits=halves).splits.values()))
  for split, columns in before.items():
    assert len(after[split]) == len(columns["image"])
    for name, column in columns.items():
      np.testing.assert_array_equal(after[split].arrays()[name], column)


def test_parts_of_a_split_do_not_overlap(pets):
  parts = {"train": "train[:8]", "validation": "train[8:]", "test": "test+validation"}
  source = tfds(pets, dataset="tiny_pets", splits=parts, labels=("weight",))
  weights = {split: sorted(4 * examples.arrays()["weight"])
             for split, examples in source.splits.items()}
  assert len(weights["train"]) == 8 and len(weights["test"]) == 6
  assert sorted(weights["train"] + weights["validation"]) == list(range(12))


def test_only_chosen_labels_are_read(pets):
  source = tfds(pets, dataset="tiny_pets", labels=("species", "head"))
  assert set(source.labels) == {"species", "head"} and source.report == {}
  assert set(source.splits["train"][0]) == {"image", "species", "head"}
  assert set(source.splits["train"].features) == {"photo", "species", "head"}


@pytest.mark.parametrize("name", [
    "tiny_pets", "tiny_pets:1.2.0", "tiny_pets:1.*", "tiny_pets:1.2", "tiny_pets:1.*.*"])
def test_versions(pets, name):
  assert tfds(pets, dataset=name).origin == "tfds:tiny_pets:1.2.0"


def test_configs_and_namespaces(tmp_path):
  prepare(tmp_path / "ours", config="small")
  for folder in (tmp_path, tmp_path / "ours"):
    source = tfds(folder, dataset="ours:tiny_pets/small")
    assert source.origin == "tfds:tiny_pets/small:1.2.0"
  with pytest.raises(MissingData, match="tiny_pets, found small there"):
    tfds(tmp_path / "ours", dataset="tiny_pets/large")


# ---- Images of many sizes.


def sized_features():
  from tensorflow_datasets import features as kinds
  return {"image": kinds.Image(), "mask": kinds.Image(shape=(None, None, 1)),
          "depth": kinds.Tensor(shape=(None, None, 1), dtype=np.float32, encoding="zlib"),
          "box": kinds.BBoxFeature()}


def of_size(i: int) -> dict:
  """Left half black, of class 0 and at depth 1; right half white, of class 2 and at depth 3."""
  from PIL import Image
  from tensorflow_datasets import features as kinds
  right = np.zeros((8 + i, 4 + 2 * i), bool)
  right[:, 2 + i:] = True
  image = Image.fromarray(np.where(right, 255, 0).astype(np.uint8))
  return {"image": image if i % 2 else image.convert("RGB"),
          "mask": Image.fromarray(np.where(right, 2, 0).astype(np.uint8)),
          "depth": np.where(right, 3, 1).astype(np.float32)[..., None],
          "box": kinds.BBox(ymin=0.0, xmin=0.5, ymax=1.0, xmax=1.0)}


def test_labels_of_pixels_follow_their_image_to_one_size(tmp_path):
  prepare(tmp_path, made=sized_features, draw=of_size)
  source = tfds(tmp_path, dataset="tiny_pets", size=(6, 8))
  assert source.labels["mask"] == Label("mask", 3)
  columns = source.splits["train"].arrays()
  assert columns["image"].shape == (12, 6, 8, 3) and columns["mask"].shape == (12, 6, 8)
  assert columns["depth"].shape == (12, 6, 8, 1)
  for side, pixel, kind, depth in ((slice(0, 3), 0, 0, 1.0), (slice(5, 8), 255, 2, 3.0)):
    assert (columns["image"][:, :, side] == pixel).all()
    assert (columns["mask"][:, :, side] == kind).all()
    assert (columns["depth"][:, :, side] == depth).all()
  assert (columns["box"] == np.array([0.5, 0, 1, 1], np.float32)).all()


def test_images_of_several_sizes_need_a_size(tmp_path):
  prepare(tmp_path, made=sized_features, draw=of_size)
  with pytest.raises(UserError, match=r"every image to be \d+x\d+ as the first is, found one of"):
    tfds(tmp_path, dataset="tiny_pets").splits["train"].arrays()


def test_a_mask_of_another_size_than_its_image_is_refused(tmp_path):
  prepare(tmp_path, made=sized_features,
          draw=lambda i: of_size(0) | {"mask": of_size(1)["mask"]})
  with pytest.raises(UserError, match=r"of their image, \[8, 4\], found \[9, 6\]"):
    tfds(tmp_path, dataset="tiny_pets").splits["train"][0]


def grey_features():
  from tensorflow_datasets import features as kinds
  return {"image": kinds.Image(shape=(8, 4, 1)), "label": kinds.ClassLabel(num_classes=10)}


def test_grey_images_keep_one_channel(tmp_path):
  prepare(tmp_path, made=grey_features,
          draw=lambda i: {"image": of_size(0)["image"].convert("L"), "label": i % 10})
  image = tfds(tmp_path, dataset="tiny_pets").splits["test"][0]["image"]
  assert image.shape == (8, 4, 1)
  np.testing.assert_array_equal(image[0, :, 0], [0, 0, 255, 255])


# ---- Mistakes and damage.


@pytest.mark.parametrize("arguments, words", [
    ({"dataset": ""}, "expected the name of a TFDS data set"),
    ({"dataset": "no such!"}, "a name as TFDS writes it"),
    ({"image": "file_name"}, "image: expected one of parts, photo, trimap"),
    ({"labels": ("breed",)}, "labels: expected some of .*species.*, found 'breed'"),
    ({"labels": ("file_name",)}, "labels: expected some of"),
    ({"splits": {"train": "train"}}, "expected train and test, found train; TFDS has train"),
    ({"splits": {"train": "train", "test": "test", "dev": "test"}}, "expected train and test"),
    ({"splits": {"train": "train", "test": "nope"}}, "splits.test: expected some of train, "),
    ({"splits": {"train": "train[:x]", "test": "test"}}, "splits.train: expected some of"),
    ({"splits": {"train": "train[:0]", "test": "test"}}, r"found none in 'train\[:0\]'"),
    ({"size": 0}, "size: expected pixels"),
])
def test_an_argument_that_does_not_fit_is_refused(pets, arguments, words):
  with pytest.raises(UserError, match=words) as caught:
    tfds(pets, **{"dataset": "tiny_pets", **arguments})
  assert len(str(caught.value).splitlines()) <= 2


def test_a_set_without_test_says_how_to_split(tmp_path):
  prepare(tmp_path, counts={"train": 4})
  with pytest.raises(UserError, match="TFDS has train\nsay which is which, such as splits="):
    tfds(tmp_path, dataset="tiny_pets")


def test_a_set_without_image_or_label_is_refused(tmp_path):
  from tensorflow_datasets import features as kinds
  prepare(tmp_path, made=lambda: {"label": kinds.ClassLabel(num_classes=20)},
          draw=lambda i: {"label": i})
  with pytest.raises(UserError, match="image: expected one of none among label"):
    tfds(tmp_path, dataset="tiny_pets")
  prepare(tmp_path, "images_only", made=lambda: {"image": kinds.Image()},
          draw=lambda i: {"image": of_size(0)["image"]})
  with pytest.raises(UserError, match="a feature that can be a label, found none"):
    tfds(tmp_path, dataset="images_only")


def test_what_is_not_there_tells_the_command(tmp_path):
  with pytest.raises(MissingData) as caught:
    tfds(tmp_path, dataset="oxford_iiit_pet:3.*")
  lines = str(caught.value).splitlines()
  assert len(lines) == 2 and f"in {tmp_path / 'oxford_iiit_pet'}, found nothing" in lines[0]
  assert f'tfds.builder("oxford_iiit_pet", data_dir="{tmp_path}")' in lines[1]
  with pytest.raises(MissingData, match="TFDS knows none of that name"):
    tfds(tmp_path, dataset="no_such_set")
  with pytest.raises(MissingData, match="preparing it takes TensorFlow"):
    tfds(tmp_path, dataset="coco/2017")  # whose builder imports TensorFlow as it is made
  assert not list(tmp_path.iterdir())


def test_a_builder_that_needs_no_tensorflow_is_run(tmp_path):
  from tensorflow_datasets import core, features as kinds

  class TinyShapes(core.GeneratorBasedBuilder):
    VERSION = core.Version("1.0.0")

    def _info(self):
      return core.DatasetInfo(builder=self, features=kinds.FeaturesDict(grey_features()))

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples() for split in ("train", "test")}

    def _generate_examples(self):
      yield 0, {"image": of_size(0)["image"].convert("L"), "label": 7}

  source = tfds(tmp_path, download=False, dataset=TinyShapes.name)
  assert source.origin == "tfds:tiny_shapes:1.0.0"
  assert source.splits["test"][0]["label"] == 7


@pytest.mark.parametrize("tfrecord", [False, True])
def test_a_damaged_or_lost_shard_is_named(tmp_path, tfrecord):
  folder = prepare(tmp_path)
  if tfrecord:
    as_tfrecord(folder)
  path = sorted(folder.glob("*-train*"))[-1]
  content = path.read_bytes()
  path.write_bytes(content[:len(content) // 2])  # at the end of a block of an array_record
  with pytest.raises(UserError, match=f"{path} to be whole, found it (cut|damaged)"):
    tfds(tmp_path, dataset="tiny_pets")
  path.unlink()
  with pytest.raises(UserError, match=f"{path} to be whole, found it missing"):
    tfds(tmp_path, dataset="tiny_pets")


def test_a_damaged_image_names_the_set(tmp_path):
  import io
  prepare(tmp_path, made=grey_features, counts={"train": 2, "test": 2},
          draw=lambda i: {"image": io.BytesIO(b"nothing of the kind"), "label": 0})
  with pytest.raises(UserError, match="tfds:tiny_pets:1.2.0: expected images"):
    tfds(tmp_path, dataset="tiny_pets")
  with pytest.raises(UserError, match="tfds:tiny_pets:1.2.0 train: expected images, found a not"):
    tfds(tmp_path, dataset="tiny_pets", size=4).splits["train"].arrays()


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
def test_a_broken_description_is_named(tmp_path, file):
  folder = prepare(tmp_path)
  (folder / file).write_text("{ nothing that TFDS writes")
  with pytest.raises(UserError, match="to be as TFDS prepares it, found it broken") as caught:
    tfds(tmp_path, dataset="tiny_pets")
  assert len(str(caught.value).splitlines()) == 2
