"""COCO's layout: where files are found, what labels hold, and every defect, counted or refused."""

import copy
import json
import pickle
import shutil

import numpy as np
from PIL import Image
import pytest

from mtl_jax.data import boxes, streams
from mtl_jax.data.coco import coco
from mtl_jax.data.source import Label
from mtl_jax.errors import UserError

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}]
# Image 1 is 40 wide and 20 high; padded to 20 x 20 it lies in rows 5 to 15.
IMAGES = [{"id": 1, "file_name": "1.png", "width": 40, "height": 20},
          {"id": 2, "file_name": "2.png", "width": 20, "height": 20},
          {"id": 3, "file_name": "3.png", "width": 20, "height": 20}]
ANNOTATIONS = [
    {"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 0, 20, 10], "iscrowd": 0},
    {"id": 2, "image_id": 1, "category_id": 2, "bbox": [0.0, 10.0, 40.0, 10.0]},
    {"id": 3, "image_id": 2, "category_id": 2, "bbox": [5, 5, 10, 5]},
]
PADDED = {1: [[0.25, 0.25, 0.75, 0.5, 1], [0, 0.5, 1, 0.75, 0]], 2: [[0.25, 0.25, 0.75, 0.5, 0]]}
ABSENT = [0, 0, 0, 0, -1]


def listing(**changes):
  content = {"images": IMAGES, "annotations": ANNOTATIONS, "categories": CATEGORIES, **changes}
  return copy.deepcopy(content)


def write(file, content):
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(content if isinstance(content, str) else json.dumps(content))


def draw(folder, seed, entries=IMAGES):
  folder.mkdir(parents=True, exist_ok=True)
  for entry in entries:
    rng = np.random.default_rng((seed, entry["id"]))
    pixels = rng.integers(0, 256, (entry["height"], entry["width"], 3), np.uint8)
    Image.fromarray(pixels).save(folder / entry["file_name"])


def data_set(root, train=None, test=None):
  for seed, (split, content) in enumerate((("train", train), ("test", test))):
    write(root / f"instances_{split}.json", content or listing())
    draw(root / split, seed)
  return root


def read(root, size=20, **arguments):
  return coco("unused", path=str(root), size=size, **arguments)


def test_labels(tmp_path):
  source = read(data_set(tmp_path / "cells"))
  names = ("cat", "dog")
  assert source.labels == {"objects": Label("objects", 2, names), "count": Label("number"),
                           "classes": Label("binary", None, names)}
  train = source.splits["train"].arrays()
  assert train["objects"].dtype == np.float32 and train["image"].shape == (3, 20, 20, 3)
  np.testing.assert_array_equal(train["objects"],
                                [PADDED[1], [*PADDED[2], ABSENT], [ABSENT, ABSENT]])
  np.testing.assert_array_equal(train["classes"], [[1, 1], [1, 0], [0, 0]])
  np.testing.assert_array_equal(train["count"], np.array([2, 1, 0], np.float32))
  assert (train["image"][0, :5] == 255).all() and (train["image"][0, 15:] == 255).all()
  assert not (train["image"][0, 5:15] == 255).all()
  streams.check_labels("cells", train, source.labels)
  assert source.report == {} and source.augmentation == ()
  assert source.origin.startswith("coco:cells:6:")


def test_nothing_depends_on_memory_or_place(tmp_path):
  kept = read(data_set(tmp_path / "cells"))
  again = read(tmp_path / "cells", memory_gb=0.0)
  shutil.move(tmp_path / "cells", tmp_path / "moved" / "cells")
  moved = read(tmp_path / "moved/cells", memory_gb=0.0)
  assert kept.origin == again.origin == moved.origin
  for other in (moved, pickle.loads(pickle.dumps(moved))):
    for split, examples in kept.splits.items():
      for i in range(3):
        for name, value in examples[i].items():
          np.testing.assert_array_equal(value, other.splits[split][i][name])
  with pytest.raises(UserError, match="1.png to be an image, found: No such file"):
    again.splits["train"][0]
  changed = listing()
  changed["annotations"][0]["bbox"][0] = 11
  write(tmp_path / "moved/cells/instances_train.json", changed)
  assert read(tmp_path / "moved/cells").origin != kept.origin


@pytest.mark.parametrize("json_of,images_of,arguments", [
    ("annotations/instances_{}2017.json", "{}2017", {}),
    ("annotations/instances_{}2017.json", "images/{}2017", {}),
    ("annotations/instances_{}.json", "images", {}),
    ("instances_{}.json", "{}", {}),
    ("{}/_annotations.coco.json", "{}", {}),
    ("boxes-{}.json", "pictures of {}", {"train": ("boxes-train.json", "pictures of train"),
                                         "test": ("boxes-test.json", "pictures of test")}),
])
def test_layouts(tmp_path, json_of, images_of, arguments):
  other = [dict(entry, file_name=f"t{entry['file_name']}") for entry in IMAGES]
  for split, entries in (("train", IMAGES), ("test", other)):
    write(tmp_path / json_of.format(split), listing(images=entries))
    draw(tmp_path / images_of.format(split), split == "test", entries)
  write(tmp_path / "annotations/captions_train2017.json", "not read")
  source = read(tmp_path, **arguments)
  assert source.report == {}
  for split in ("train", "test"):
    np.testing.assert_array_equal(source.splits[split].arrays()["objects"][0], PADDED[1])


def test_validation_and_single_files(tmp_path):
  data_set(tmp_path)
  (tmp_path / "instances_test.json").rename(tmp_path / "instances_val.json")
  (tmp_path / "test").rename(tmp_path / "val")
  assert read(tmp_path).report == {"validation image read as test": 3}
  given = read(tmp_path, train=("instances_train.json", "train"),
               test=("instances_val.json", "val"))
  assert set(given.splits) == {"train", "test"} and given.report == {}
  (tmp_path / "instances_val.json").unlink()
  (tmp_path / "instances_train.json").rename(tmp_path / "instances_default.json")
  (tmp_path / "train").rename(tmp_path / "images")
  cut = read(tmp_path, test_fraction=1 / 3)
  assert [len(cut.splits[split]) for split in ("train", "test")] == [2, 1]


def test_the_largest_boxes_are_kept_and_the_rest_is_counted(tmp_path):
  boxes = [[0, 0, 2, 2], [0, 0, 9, 9], [1, 1, 3, 3], [0, 0, 9, 8]]
  content = listing(annotations=[{"image_id": 2, "category_id": 2, "bbox": box} for box in boxes])
  source = read(data_set(tmp_path, train=content), max_objects=2)
  objects = source.splits["train"].arrays()["objects"]
  assert objects.shape == (3, 2, 5)
  np.testing.assert_allclose(objects[1, :, :4] * 20, [[0, 0, 9, 9], [0, 0, 9, 8]], rtol=1e-6)
  assert source.splits["train"].arrays()["count"].tolist() == [0, 4, 0]
  assert source.report == {"box beyond max_objects": 2, "class without a training box (kept)": 1}


def annotation(**changes):
  return {"image_id": 2, "category_id": 2, "bbox": [1, 1, 2, 2], **changes}


@pytest.mark.parametrize("added,report,more", [
    (annotation(iscrowd=1), {"crowd annotation": 1}, 0),
    (annotation(image_id=99), {"annotation of an unknown image": 1}, 0),
    (annotation(image_id=[1]), {"annotation of an unknown image": 1}, 0),
    (annotation(category_id=99), {"annotation of an unknown category": 1}, 0),
    (annotation(category_id=None), {"annotation of an unknown category": 1}, 0),
    ("nonsense", {"annotation of an unknown image": 1}, 0),
    (ANNOTATIONS[2], {"box listed twice (read once)": 1}, 0),
    (annotation(bbox=[1, 1, 0, 2]), {boxes.NO_AREA: 1}, 0),
    (annotation(bbox=[5, 5, -2, 2]), {boxes.NO_AREA: 1}, 0),
    (annotation(bbox=[1, float("nan"), 2, 2]), {boxes.NOT_FINITE: 1}, 0),
    (annotation(bbox=[1, 1, float("inf"), 2]), {boxes.NOT_FINITE: 1}, 0),
    (annotation(bbox=[1, 1, 2]), {boxes.NOT_FINITE: 1}, 0),
    (annotation(bbox=["1", 1, 2, 2]), {boxes.NOT_FINITE: 1}, 0),
    (annotation(bbox=None), {boxes.NOT_FINITE: 1}, 0),
    (annotation(bbox=[30, 1, 2, 2]), {boxes.OUTSIDE: 1}, 0),
    (annotation(bbox=[15, 1, 20, 2]), {boxes.CLIPPED: 1}, 1),
    (annotation(bbox=[15, 1, 5.001, 2]), {}, 1),
])
def test_annotations_with_something_wrong(tmp_path, added, report, more):
  content = listing(annotations=[*ANNOTATIONS, added])
  source = read(data_set(tmp_path, train=content))
  assert source.report == report
  train = source.splits["train"].arrays()
  expected = np.nan if "crowd" in str(report) else 1 + more
  np.testing.assert_array_equal(train["count"], np.array([2, expected, 0], np.float32))
  assert (train["objects"][1, :, 4] >= 0).sum() == 1 + more
  assert train["objects"][..., :4].min() >= 0 and train["objects"][..., :4].max() <= 1


def test_crowds_count_as_appearing(tmp_path):
  crowd = annotation(image_id=3, category_id=7, iscrowd=1)
  source = read(data_set(tmp_path, train=listing(annotations=[*ANNOTATIONS, crowd])))
  example = source.splits["train"][2]
  assert example["classes"].tolist() == [0, 1] and np.isnan(example["count"])
  np.testing.assert_array_equal(example["objects"], [ABSENT, ABSENT])


def test_images_with_something_wrong(tmp_path):
  entries = [*IMAGES, {"id": 4, "file_name": "gone.png"}, {"id": 5, "file_name": "broken.png"},
             {"id": 6, "file_name": "empty.png"}, {"id": 1, "file_name": "other.png"}, {"id": 8},
             {"file_name": "x.png"}, "nonsense", {"id": 9, "file_name": "C:\\photos\\3.png"},
             {"id": 10, "file_name": "photos/plain.jpg"}, {"id": 11, "file_name": "half.png",
                                                          "width": 40, "height": 20},
             {"id": 12, "file_name": "turned.png", "width": 20, "height": 10}]
  boxed = [annotation(image_id=i, bbox=[10, 5, 10, 5]) for i in (10, 11, 12)]
  data_set(tmp_path, train=listing(images=entries, annotations=[*ANNOTATIONS, *boxed]))
  folder = tmp_path / "train"
  whole = (folder / "1.png").read_bytes()
  (folder / "broken.png").write_bytes(whole[:200])
  (folder / "empty.png").write_bytes(b"")
  draw(folder, 9, [{"id": i, "file_name": name, "width": width, "height": height}
                   for i, (name, width, height) in enumerate((
                       ("plain.png", 20, 10), ("half.png", 20, 10), ("turned.png", 10, 20)))])
  (folder / "plain.png").rename(folder / "plain.jpg")
  source = read(tmp_path)
  assert source.report == {
      "listed image that is not there": 1, "truncated or damaged image": 1, "empty file": 1,
      "image entry without its own id and name": 4, "file listed twice (read once)": 1,
      "wrong file extension (read)": 1, "image of another size than listed (boxes scaled)": 1,
      "image of another shape than listed": 1}
  names = [path.rpartition("/")[2] for path in source.splits["train"].paths]
  assert names == ["1.png", "2.png", "3.png", "plain.jpg", "half.png"]
  found = source.splits["train"].arrays()["objects"][3:, 0]
  np.testing.assert_allclose(found, [[0.5, 0.5, 1, 0.75, 0], [0.25, 0.375, 0.5, 0.5, 0]])


def test_orientation_and_listed_sizes(tmp_path):
  """Boxes refer to the upright image; those of the stored one can be had with upright=False."""
  data_set(tmp_path)
  exif = Image.Exif()
  exif[0x0112] = 6
  for split in ("train", "test"):
    stored = Image.open(tmp_path / split / "1.png")
    stored.save(tmp_path / split / "1.png", exif=exif)
  assert read(tmp_path).report == {"image of another shape than listed": 2,
                                   "class without a training box (kept)": 1}
  as_stored = read(tmp_path, upright=False)
  assert as_stored.report == {}
  np.testing.assert_array_equal(as_stored.splits["train"].arrays()["objects"][0], PADDED[1])


def test_categories_of_all_splits(tmp_path):
  test = listing(categories=[{"id": 3, "name": "cow"}, *CATEGORIES])
  test["annotations"][0]["category_id"] = 3
  source = read(data_set(tmp_path, test=test))
  assert source.labels["classes"].names == ("cat", "cow", "dog")
  assert source.report == {"class without a training box (kept)": 1}
  assert source.splits["test"].arrays()["objects"][0, :, 4].tolist() == [1, 0]
  assert source.splits["train"].arrays()["objects"][0, :, 4].tolist() == [2, 0]


def test_content_in_two_splits_is_left_out_of_train(tmp_path):
  data_set(tmp_path)
  shutil.copy(tmp_path / "test/2.png", tmp_path / "train/2.png")
  source = read(tmp_path)
  assert source.report == {"same content in a later split": 1}
  assert source.splits["train"].arrays()["count"].tolist() == [2, 0]


def test_cropping_cuts_boxes(tmp_path):
  left = annotation(image_id=1, bbox=[0, 0, 9, 20])  # 40 x 20 shows x from 10 to 30
  source = read(data_set(tmp_path, train=listing(annotations=[*ANNOTATIONS, left])), fit="crop")
  assert source.report == {boxes.CUT_AWAY: 1}
  np.testing.assert_array_equal(source.splits["train"][0]["objects"],
                                [[0, 0, 1, 0.5, 1], [0, 0.5, 1, 1, 0]])


def emptied(root):
  for path in root.rglob("*.png"):
    path.write_bytes(b"")


@pytest.mark.parametrize("prepare,message", [
    (lambda root: (root / "instances_train.json").unlink(), "instances_train.json or train/_ann"),
    (lambda root: shutil.copy(root / "instances_train.json", root / "instances_train2017.json"),
     "expected one JSON file for train, found instances_train.json and instances_train2017.json"),
    (lambda root: write(root / "instances_train.json", '{"images": [\n  {"id": 1'),
     "instances_train.json, line 2, column 11: expected JSON, found: Expecting"),
    (lambda root: (root / "instances_train.json").write_bytes(b'{"images": "\xff\xfe'),
     "expected JSON in UTF-8"),
    (lambda root: write(root / "instances_train.json", "[]"), "expected lists .* found no images"),
    (lambda root: write(root / "instances_train.json", {"images": [], "annotations": []}),
     "expected lists of .* found no categories"),
    (lambda root: write(root / "instances_train.json", listing(categories=[{"name": "x"}])),
     "expected categories with a whole number as id, found {'name': 'x'}"),
    (lambda root: write(root / "instances_train.json",
                        listing(categories=[*CATEGORIES, {"id": 2, "name": "lynx"}])),
     "one name for each category id, found 'cat' and 'lynx' for 2"),
    (lambda root: write(root / "instances_test.json",
                        listing(categories=[{"id": 2, "name": "lynx"}])),
     "test.json: expected the categories of the other splits, found 'lynx' in place of 'cat'"),
    (lambda root: [write(root / f"instances_{split}.json", listing(annotations=[]))
                   for split in ("train", "test")], "expected boxes, found none to use"),
    (lambda root: write(root / "instances_test.json", listing(images=[])),
     "instances_test.json: expected images .*, found none \\(3 annotation of an unknown image"),
    (lambda root: emptied(root / "test"), "usable images for test, found none \\(3 empty file\\)"),
    (lambda root: shutil.rmtree(root / "train"),
     "train.json: expected images that are in .*train, found none \\(3 listed image"),
    (lambda root: draw(root / "test", 1, [dict(entry, width=33) for entry in IMAGES]),
     "images for test, found none \\(3 image of another shape"),
])
def test_data_sets_that_are_refused(tmp_path, prepare, message):
  prepare(data_set(tmp_path))
  with pytest.raises(UserError, match=f"(?s){message}"):
    read(tmp_path)


@pytest.mark.parametrize("arguments,message", [
    ({"max_objects": 0}, "max_objects: expected at least 1, found 0"),
    ({"train": ("a.json",)}, "train: expected a JSON file and a folder of images, found a.json"),
    ({"test": ("instances_test.json", "test")}, "train: expected a JSON file .*, found none"),
    ({"train": ("none.json", "train")}, "expected a JSON file at .*none.json, found: No such file"),
    ({"train": ("instances_train.json", "no")}, "train: expected a folder at .*no, found nothing"),
    ({"path": "nowhere"}, "path: expected a folder at .*nowhere, found nothing there"),
])
def test_arguments_that_are_refused(tmp_path, arguments, message):
  with pytest.raises(UserError, match=message):
    coco("unused", **{"path": str(data_set(tmp_path)), "size": 20, **arguments})
