"""Folders of images: layouts, tables of labels, and every defect, counted or refused."""

import collections
import io
import os
import pickle
import shutil
import warnings

import numpy as np
from PIL import Image
import pytest

from mtl_jax.data import image_files, images, streams
from mtl_jax.data.folders import image_folder
from mtl_jax.data.source import Label
from mtl_jax.errors import UserError


def image(seed, size=(6, 9)):
  return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def fill(root, names, start=0):
  """A different image at each name."""
  for seed, name in enumerate(names, start):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image(seed).save(path)


def read(root, size=6, **arguments):
  return image_folder("unused", path=str(root), size=size, **arguments)


def names(source, split):
  return [path.rpartition("/")[2] for path in source.splits[split].paths]


SPLIT_FILES = [f"{split}/{animal}/{i}.png" for split in ("train", "test")
               for animal in ("dog", "cat") for i in range(3)]


def test_split_and_class_folders(tmp_path):
  fill(tmp_path / "pets", [*SPLIT_FILES, "train/dog/deep/er/9.png", "Valid/cat/v.png"])
  source = read(tmp_path / "pets", fit="stretch")
  assert {split: len(examples) for split, examples in source.splits.items()} == {
      "train": 7, "validation": 1, "test": 6}
  assert source.labels == {"label": Label("class", 2, ("cat", "dog"))}
  assert source.report == {}
  assert source.augmentation == ("crop",)
  train = source.splits["train"]
  assert names(source, "train") == ["0.png", "1.png", "2.png", "0.png", "1.png", "2.png", "9.png"]
  assert train.arrays()["label"].tolist() == [0, 0, 0, 1, 1, 1, 1]
  assert train.arrays()["image"].shape == (7, 6, 6, 3)
  example = train[6]
  np.testing.assert_array_equal(
      example["image"], images.read_image(tmp_path / "pets/train/dog/deep/er/9.png",
                                          images.reading(6, fit="stretch")))
  assert example["label"].dtype == np.int32
  streams.check_labels("pets", train.arrays(), source.labels)
  assert source.origin.startswith("folder:pets:14:")


def test_nothing_depends_on_threads_memory_or_place(tmp_path):
  fill(tmp_path / "pets", SPLIT_FILES)
  kept, again = read(tmp_path / "pets"), read(tmp_path / "pets", memory_gb=0.0)
  shutil.copytree(tmp_path / "pets", tmp_path / "elsewhere" / "pets")
  moved = read(tmp_path / "elsewhere" / "pets")
  assert kept.origin == again.origin == moved.origin
  assert kept.splits["train"].kept is not None and again.splits["train"].kept is None
  for other in (again, moved, pickle.loads(pickle.dumps(again)), pickle.loads(pickle.dumps(kept))):
    for split, examples in kept.splits.items():
      for i in range(len(examples)):
        np.testing.assert_array_equal(examples[i]["image"], other.splits[split][i]["image"])
      np.testing.assert_array_equal(examples.arrays()["image"],
                                    other.splits[split].arrays()["image"])
  one, many = (image_files.scan(tmp_path / "pets", SPLIT_FILES, [""] * 12, images.reading(6),
                                collections.Counter(), memory_gb=1, threads=threads)
               for threads in (1, 8))
  np.testing.assert_array_equal(one.images, many.images)
  assert one.digests == many.digests and one.names == many.names == SPLIT_FILES


def test_the_origin_tells_other_data_apart(tmp_path):
  root = tmp_path / "pets"
  fill(root, SPLIT_FILES)
  origins = [read(root).origin]
  image(99).save(root / "train/cat/0.png")
  origins.append(read(root).origin)
  (root / "train/cat/0.png").rename(root / "train/dog/00.png")
  origins.append(read(root).origin)
  (root / "test/cat").rename(root / "test/lynx")
  origins.append(read(root).origin)
  assert len(set(origins)) == 4


def test_test_is_cut_from_a_folder_without_splits(tmp_path):
  people = {"ann": 8, "bob": 12, "eve": 1}
  files = [f"{person}/{person}_{i:04d}.jpg" for person in people for i in range(people[person])]
  fill(tmp_path, files)
  source = read(tmp_path, test_fraction=0.25)
  assert [len(source.splits[split]) for split in ("train", "test")] == [16, 5]
  assert np.bincount(source.splits["test"].arrays()["label"], minlength=3).tolist() == [2, 3, 0]
  assert sorted(names(source, "train") + names(source, "test")) == sorted(
      file.rpartition("/")[2] for file in files)
  assert names(source, "test") == names(read(tmp_path, test_fraction=0.25), "test")
  assert names(source, "test") != names(read(tmp_path, test_fraction=0.25, seed=1), "test")
  assert source.labels["label"].names == ("ann", "bob", "eve")


@pytest.mark.parametrize("fraction", [0.01, 0.1, 1 / 3, 0.5])
def test_every_group_gives_its_share_and_keeps_one(fraction):
  groups = [group for group in range(40) for _ in range(group + 1)]
  files = [f"{i}.jpg" for i in range(len(groups))]
  held = image_files.held_out(files, groups, fraction, seed=3)
  for group in range(40):
    count = held[np.array(groups) == group].sum()
    assert abs(count - fraction * (group + 1) * (group > 0)) < 1 and count <= max(group, 0)
  assert abs(held.sum() - fraction * (len(groups) - 1)) <= 1


def test_validation_stands_in_for_test(tmp_path):
  fill(tmp_path, [name.replace("test", "val") for name in SPLIT_FILES])
  source = read(tmp_path)
  assert set(source.splits) == {"train", "test"} and len(source.splits["test"]) == 6
  assert source.report == {"validation image read as test": 6}


def test_nested_folders_are_labels_of_several_tasks(tmp_path):
  fill(tmp_path, [f"{split}/{shape}/{colour}/{split}{i}.png" for split in ("train", "test")
                  for shape in ("square", "disc") for colour in ("red", "blue", "green")
                  for i in range(1)] + ["train/disc/astray.png", "train/readme.png", "lost.png"])
  source = read(tmp_path, levels=("shape", "colour"))
  assert source.labels == {"shape": Label("class", 2, ("disc", "square")),
                           "colour": Label("class", 3, ("blue", "green", "red"))}
  arrays = source.splits["train"].arrays()
  assert arrays["shape"].tolist() == [0, 0, 0, 1, 1, 1]
  assert arrays["colour"].tolist() == [0, 1, 2, 0, 1, 2]
  assert source.report == {"file outside any class folder": 2, "file outside the split folders": 1}


# ---- Tables of labels.


def table(root, text, name="labels.csv", encoding="utf-8"):
  (root / name).write_bytes(text.encode(encoding))
  return name


def test_a_table_gives_labels_of_every_kind(tmp_path):
  """Originals are 9 wide and 6 high; cropped to a square they show x from 1.5 to 7.5."""
  fill(tmp_path, ["a/1.png", "a/2.png", "b/3.png", "4.png", "unlisted.png"])
  labels = table(tmp_path, "\n".join([
      "size,file,animal,legs,face_x1,face_y1,face_x2,face_y2,split",
      "0.5,a/1.png,dog,10,3,0,6,3,train",
      "nan,2.png,,9,0,0,1,6,train",
      ',C:\\data\\b\\3.png,"cat, big",NA,,0,1,1,val',
      "2,./4.png,dog,9,0,0,9,6,test",
      "3,5.png,dog,9,0,0,9,6,test", ""]))
  source = read(tmp_path, labels=labels)
  assert source.labels == {"size": Label("number"), "face": Label("box"),
                           "animal": Label("class", 2, ("cat, big", "dog")),
                           "legs": Label("class", 2, ("9", "10"))}
  columns = {split: examples.arrays() for split, examples in source.splits.items()}
  np.testing.assert_array_equal(columns["train"]["size"], np.array([0.5, np.nan], np.float32))
  assert columns["train"]["animal"].tolist() == [1, -1]
  assert columns["train"]["legs"].tolist() == [1, 0]
  np.testing.assert_allclose(columns["train"]["face"], [[0.25, 0, 0.75, 0.5], [np.nan] * 4])
  assert columns["validation"]["animal"].tolist() == [0]
  assert columns["validation"]["legs"].tolist() == [-1] and np.isnan(columns["validation"]["size"])
  np.testing.assert_allclose(columns["test"]["face"], [[0, 0, 1, 1]])
  assert source.report == {
      "box in a part that fit=crop cuts off": 1, "line of labels without a file": 1,
      "class without a training image (kept)": 1, "file not listed in the labels": 1}
  assert source.augmentation == ()


@pytest.mark.parametrize("cells,kinds,expected", [
    (["1", "2", "1", "3"], (), Label("class", 3, ("1", "2", "3"))),
    ([str(i) for i in range(21)], (), Label("number")),
    ([str(i) for i in range(21)], ("x:class",), Label("class", 21, tuple(map(str, range(21))))),
    (["1", "2", "1", "3"], ("x:number",), Label("number")),
    (["1.0", "2.0", "1.0"], (), Label("number")),
    (["red", "blue", "7", "none"], (), Label("class", 4, ("7", "blue", "none", "red"))),
])
def test_kinds_of_columns_are_guessed_or_given(tmp_path, cells, kinds, expected):
  files = [f"{i:02d}.png" for i in range(len(cells))]
  fill(tmp_path, files)
  labels = table(tmp_path, "\ufefffile;x\r\n" + "".join(
      f"{file};{cell}\r\n" for file, cell in zip(files, cells)))
  source = read(tmp_path, labels=labels, kinds=kinds, test_fraction=0.5)
  assert source.labels == {"x": expected}
  everything = [cells[int(name[:2])] for split in ("train", "test")
                for name in names(source, split)]
  found = np.concatenate([source.splits[split].arrays()["x"] for split in ("train", "test")])
  assert found.tolist() == [expected.names.index(cell) if expected.kind == "class" else float(cell)
                            for cell in everything]


def test_class_folders_beside_a_table(tmp_path):
  fill(tmp_path, SPLIT_FILES)
  labels = table(tmp_path, "file\tx1\ty1\tx2\ty2\tage\ntrain/dog/0.png\t0\t0\t.5\t1\t3.5\n")
  source = read(tmp_path, labels=labels, levels=("label",), boxes="fractions", fit="pad",
                size=(6, 18))
  train = source.splits["train"].arrays()
  assert train["label"].tolist() == [0, 0, 0, 1, 1, 1]
  np.testing.assert_array_equal(train["age"], np.array([np.nan] * 3 + [3.5] + [np.nan] * 2, "f4"))
  expected = np.full((6, 4), np.nan)
  expected[3] = 4 / 18, 0, 4 / 18 + 0.25, 1  # 9 x 6 keeps its size, 4 pixels from the left
  np.testing.assert_allclose(train["box"], expected, rtol=1e-6)
  assert source.report == {"file not listed in the labels": 11}


def test_what_is_wrong_with_a_table_is_counted(tmp_path):
  fill(tmp_path, ["a/1.png", "a/2.png", "b/1.png", "b/3.png", "b/4.png", "b/5.png"])
  (tmp_path / "b/6.png").write_bytes(b"")
  labels = table(tmp_path, "\n".join([
      "file,x,y,empty", "a/1.png,1.5,1,", "a/1.png,1.5,1,", "2.png,2.5,1,", "b/2.png,7,1,",
      "1.png,3.5,1,", "b/3.png,4.5,1,", "b/3.png,5.5,1,", "b/4.png,,,", "b/5.png,inf,3,",
      "b/6.png,1e39,3,", "zzz.png,1,1,"]))
  source = read(tmp_path, labels=labels, test_fraction=0.5)
  assert source.report == {
      "file listed twice (read once)": 1, "file listed twice with different labels": 1,
      "line of labels that fits several files": 1, "line of labels without a file": 2,
      "file not listed in the labels": 1, "file without any label": 1, "empty file": 1,
      "label column without a value": 1, "class without a training image (kept)": 1,
      "cell that is not a finite number (missing)": 1}
  assert sorted(names(source, "train") + names(source, "test")) == ["1.png", "2.png", "5.png"]


@pytest.mark.parametrize("text,arguments,message", [
    ("file,age\n1.png,1\n2.png,2.5\n3.png,ten\n4.png,4\n", {}, "line 4: age: expected a number as"),
    ("file,age\n1.png,1\n2.png\n", {}, "line 3: expected 2 cells, found 1"),
    ("file,age\n1.png,1\n\n2.png,1,7\n", {}, "line 4: expected 2 cells, found 3"),
    ('file,age\n1.png,"1\n', {}, "line 2: expected a CSV file, found: unexpected end of data"),
    ("file,age\n1.png,5\n2.png,é\n", {"encoding": "latin-1"}, "line 3: expected UTF-8"),
    ("", {}, "line 1: expected a column for files"),
    ("file\n1.png\n", {}, "line 1: expected a column for files and columns of labels"),
    ("file,age,age\n1.png,5,5\n", {}, "line 1: expected a name of its own .* found 'age'"),
    ("file,present\n1.png,5\n", {}, "line 1: .* found 'present'"),
    ("file,age,split\n1.png,5,holdout\n", {}, "line 2: split: expected train, .* found 'holdout'"),
    ("file,age\n1.png,5\n", {"kinds": ("size:number",)}, "kinds: .* columns age; found 'size:nu"),
    ("file,age\n1.png,5\n", {"kinds": ("age:box",)}, "kinds: .* found 'age:box'"),
    ("file,age\n1.png,5\n", {"boxes": "feet"}, "boxes: expected pixels or fractions"),
    ("file,a,a_x1,a_y1,a_x2,a_y2\n1.png,5,0,0,5,5\n", {}, "line 1: .* found 'a' for a box"),
    ("file,x1,y1,x2,y2\n1.png,0,0,0.5,1\n", {}, "found none beyond 1\nset boxes=fractions"),
    ("file,x1,y1,x2,y2\n1.png,0,0,5,one\n", {}, "line 2: box: expected numbers .* 'one'"),
    ("file,x1,y1,x2,y2\n1.png,5,5,4,4\n", {}, "box: .* found none to use .*1 box without area"),
    ("file,age\n9.png,5\n", {}, "expected usable images, found none .*1 line of labels with"),
    ("file,age\n1.png,\n", {}, "expected usable images, found none .*1 file without any label"),
])
def test_tables_that_are_refused(tmp_path, text, arguments, message):
  fill(tmp_path, [f"{i}.png" for i in range(1, 5)])
  arguments = dict(arguments)
  labels = table(tmp_path, text, encoding=arguments.pop("encoding", "utf-8"))
  with pytest.raises(UserError, match=f"(?s){message}"):
    read(tmp_path, labels=labels, **arguments)


def test_a_missing_table_is_refused(tmp_path):
  fill(tmp_path, SPLIT_FILES)
  with pytest.raises(UserError, match="labels: expected a CSV file at .*nothing.csv, found: No"):
    read(tmp_path, labels="nothing.csv")


# ---- Dirty archives.


def png(seed):
  file = io.BytesIO()
  image(seed, (30, 30)).save(file, "PNG")
  return file.getvalue()


DEFECTS = [
    ("train/cat/.DS_Store", b"x", {"hidden file": 1}),
    ("train/cat/._0.png", b"x", {"hidden file": 1}),
    ("__MACOSX/cat/x.png", png(50), {"hidden file": 1}),
    ("train/cat/e.png", b"", {"empty file": 1}),
    ("train/cat/readme.txt", b"a text", {"not an image": 1}),
    ("train/cat/page.jpg", b"<html>404</html>", {"not an image": 1}),
    ("train/cat/t.png", png(51)[:-900], {"truncated or damaged image": 1}),
    ("train/cat/bomb.pgm", b"P5 20000 20000 255\n", {"image of too many pixels": 1}),
    ("train/cat/w.jpg", png(52), {"wrong file extension (read)": 1}),
    ("train/cat/w", png(52), {"wrong file extension (read)": 1}),
    ("train/lynx/e.png", b"", {"empty file": 1, "class without a usable image": 1}),
    ("test/lynx/l.png", png(53), {"class without a training image (kept)": 1}),
    ("extra/cat/x.png", png(54), {"file outside the split folders": 1}),
    ("train/x.png", png(55), {"file outside any class folder": 1}),
]


@pytest.mark.parametrize("name,content,report", DEFECTS, ids=[name for name, _, _ in DEFECTS])
def test_each_defect_is_counted_and_does_no_harm(tmp_path, name, content, report):
  fill(tmp_path, SPLIT_FILES)
  (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
  (tmp_path / name).write_bytes(content)
  source = read(tmp_path)
  assert source.report == report
  more = any(word in ("wrong file extension (read)", "class without a training image (kept)")
             for word in report)
  assert sum(map(len, source.splits.values())) == 12 + more
  for examples in source.splits.values():
    assert {len(column) for column in examples.arrays().values()} == {len(examples)}


def test_links_loops_and_empty_folders(tmp_path):
  fill(tmp_path, SPLIT_FILES)
  (tmp_path / "train/empty").mkdir()
  (tmp_path / "train/cat/broken.png").symlink_to(tmp_path / "nowhere.png")
  (tmp_path / "train/cat/loop").symlink_to(tmp_path / "train")
  fill(tmp_path.parent / f"{tmp_path.name}_other", ["a.png"], start=60)
  (tmp_path / "train/dog/linked").symlink_to(tmp_path.parent / f"{tmp_path.name}_other")
  source = read(tmp_path)
  assert source.report == {"empty folder": 1, "file that cannot be opened": 1}
  assert names(source, "train")[-1] == "a.png"


def test_content_in_two_splits_counts_for_the_later_one(tmp_path):
  fill(tmp_path, [*SPLIT_FILES, "val/cat/v.png", "val/dog/w.png"])
  shutil.copy(tmp_path / "test/cat/0.png", tmp_path / "train/cat/copy.png")
  shutil.copy(tmp_path / "test/cat/0.png", tmp_path / "val/cat/copy.png")
  shutil.copy(tmp_path / "val/cat/v.png", tmp_path / "train/dog/0.png")
  shutil.copy(tmp_path / "train/dog/1.png", tmp_path / "train/cat/again.png")
  source = read(tmp_path)
  assert source.report == {"same content in a later split": 3,
                           "same content twice in a split (read)": 1}
  assert names(source, "train") == ["0.png", "1.png", "2.png", "again.png", "1.png", "2.png"]
  assert names(source, "validation") == ["v.png", "w.png"]
  assert len(source.splits["test"]) == 6


def test_everything_wrong_at_once_gives_one_source(tmp_path):
  fill(tmp_path, SPLIT_FILES)
  expected = {}
  for name, content, report in DEFECTS:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    for word, count in report.items():
      expected[word] = expected.get(word, 0) + count
  source = read(tmp_path, memory_gb=0.0)
  del expected["class without a usable image"]  # test has one of it
  assert source.report == {**expected, "same content twice in a split (read)": 1}
  assert {split: examples.arrays()["image"].shape for split, examples in source.splits.items()} == {
      "train": (8, 6, 6, 3), "test": (7, 6, 6, 3)}


def test_pillows_warnings_do_not_reach_the_user(tmp_path):
  fill(tmp_path, SPLIT_FILES)
  large = b"P5 10000 10000 255\n" + bytes(10 ** 8)  # warned of above 90 million
  (tmp_path / "train/cat/large.pgm").write_bytes(large)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert len(read(tmp_path).splits["train"]) == 7


def test_a_file_that_fails_later_is_named(tmp_path):
  fill(tmp_path, SPLIT_FILES)
  source = read(tmp_path, memory_gb=0.0)
  (tmp_path / "train/cat/1.png").write_bytes(png(0)[:60])
  (tmp_path / "train/cat/2.png").unlink()
  with pytest.raises(UserError, match="cat/1.png to be an image, found: truncated or damaged"):
    source.splits["train"][1]
  with pytest.raises(UserError, match="cat/2.png to be an image, found: No such file"):
    source.splits["train"][2]
  with pytest.raises(UserError, match="cat/1.png"):
    source.splits["train"].arrays()


def emptied(root):
  for path in root.rglob("*.png"):
    path.write_bytes(b"")


@pytest.mark.parametrize("prepare,message", [
    (shutil.rmtree, "path: expected a folder at .*, found nothing there"),
    (lambda root: (shutil.rmtree(root), root.write_bytes(b"x")), "found a file \\(unpack an arch"),
    (lambda root: (shutil.rmtree(root), root.mkdir()), "usable images, found none \\(nothing else"),
    (emptied, "expected usable images for test, found none \\(12 empty file\\)"),
    (lambda root: emptied(root / "test"), "expected usable images for test, found none"),
    (lambda root: (shutil.rmtree(root / "test"), (root / "test").mkdir()),
     "test: expected images in class folders, found none\nfill the folder, or remove it"),
    (lambda root: (root / "train").rename(root / "valid"), "a train folder beside test, valid"),
    (lambda root: shutil.copytree(root / "test", root / "testing"),
     "expected one folder for test, found test and testing"),
    (lambda root: [shutil.rmtree(root / split / "dog") for split in ("train", "test")],
     "expected folders of two classes or more as label, found only cat\ncheck that path"),
    (lambda root: [shutil.copytree(root, root / "deeper/pets"), shutil.rmtree(root / "train"),
                   shutil.rmtree(root / "test")], "found only deeper\ncheck that path"),
    (lambda root: (shutil.rmtree(root / "train"), shutil.copytree(root / "test", root / "train")),
     "expected usable images for train, found none \\(6 same content in a later split"),
])
def test_folders_that_are_refused(tmp_path, prepare, message):
  root = tmp_path / "pets"
  fill(root, SPLIT_FILES)
  prepare(root)
  with pytest.raises(UserError, match=f"(?s){message}"):
    read(root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permissions(tmp_path):
  fill(tmp_path, SPLIT_FILES)
  (tmp_path / "train/cat/0.png").chmod(0)
  assert read(tmp_path).report == {"file that cannot be opened": 1}
  (tmp_path / "train/cat").chmod(0)
  with pytest.raises(UserError, match="train/cat to be readable, found: Permission denied"):
    read(tmp_path)
  (tmp_path / "train/cat").chmod(0o700)


@pytest.mark.parametrize("arguments,message", [
    ({"path": None}, "path: expected a folder, found none given"),
    ({"test_fraction": 0.7}, "test_fraction: expected more than 0 and at most 0.5, found 0.7"),
    ({"test_fraction": 0.01}, "enough images of one class to cut a fraction of 0.01 from, found 3"),
    ({"levels": ("image",)}, "levels: expected names"),
    ({"levels": ("age", "age")}, "levels: expected names that no other label has, found age, age"),
    ({"levels": ("age",), "labels": "ages.csv"}, "levels: expected names .* found age"),
    ({"size": None}, "size: expected pixels"),
])
def test_arguments_that_are_refused(tmp_path, arguments, message):
  fill(tmp_path, [f"{animal}/{i}.png" for animal in "ab" for i in range(3)])
  table(tmp_path, "file,age\na/1.png,5\n", "ages.csv")
  with pytest.raises(UserError, match=message):
    image_folder("unused", **{"path": str(tmp_path), "size": 6, **arguments})
