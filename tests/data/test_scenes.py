"""Digit scenes: labels true to the pixels, separate handwriting, the same bytes always."""

import functools
import hashlib

import numpy as np
import pytest

from mtl_jax.data import scenes, sources
from mtl_jax.data.handwriting import ONE, PX, Handwriting, Random, by_split
from mtl_jax.errors import UserError

ONE_DIGIT = {"digit": (), "angle": (), "scale": (), "box": (4,)}
SEVERAL = {**ONE_DIGIT, "count": (), "objects": (4, 5)}
DENSE = {"mask": (48, 48), "depth": (48, 48)}


@functools.cache
def columns(objects=1, dense=False, split="train", size=48, examples=200):
  source = scenes.digit_scenes("", objects=objects, size=size, dense=dense,
                               train_examples=examples, test_examples=examples)
  return source.splits[split].arrays()


@pytest.mark.parametrize("objects, dense, shapes", [
    (1, False, ONE_DIGIT), (1, True, {**ONE_DIGIT, **DENSE}),
    (4, False, SEVERAL), (4, True, {**SEVERAL, **DENSE})])
def test_schema(objects, dense, shapes):
  source = sources.SOURCES["digit_scenes"]("", download=False, objects=objects, dense=dense,
                                           train_examples=30, test_examples=20)
  assert source.origin == "sample:digit_scenes" and tuple(source.augmentation) == ()
  assert set(source.labels) == set(shapes)
  kinds = {"digit": "class", "angle": "number", "scale": "number", "count": "number",
           "depth": "map"}
  assert {name: label.kind for name, label in source.labels.items()} == {
      name: kinds.get(name, name) for name in shapes}
  classes = {"digit": 10, "objects": 10, "mask": 11}
  for split, count in (("train", 30), ("test", 20)):
    found = source.splits[split].arrays()
    assert found["image"].shape == (count, 48, 48, 3) and found["image"].dtype == np.uint8
    assert set(found) == {"image", *shapes}
    for name, shape in shapes.items():
      assert found[name].shape == (count, *shape), name
      assert found[name].dtype == (np.int32 if name in ("digit", "mask") else np.float32), name
      assert source.labels[name].num_classes == classes.get(name)
      assert np.isfinite(found[name]).all()


def test_classes_and_counts_are_balanced():
  found = columns(4)
  np.testing.assert_array_equal(np.bincount(found["digit"]), 20)
  np.testing.assert_array_equal(np.bincount(found["count"].astype(int)), [0, 50, 50, 50, 50])
  there = found["objects"][..., 4] >= 0
  np.testing.assert_array_equal(there.sum(1), found["count"])
  assert not found["objects"][~there][:, :4].any() and (found["objects"][~there][:, 4] == -1).all()


def test_one_digit_is_where_its_box_is():
  """The mask, which is the ink, ends where the box does, and has the digit's number."""
  found = columns(1, dense=True)
  for mask, box, digit in zip(found["mask"], found["box"], found["digit"]):
    y, x = np.nonzero(mask)
    assert set(mask[y, x]) == {digit + 1}
    np.testing.assert_allclose(
        48 * box, [x.min(), y.min(), x.max() + 1, y.max() + 1], atol=1e-4)


def test_the_image_shows_ink_within_the_box_only(monkeypatch):
  """Painted white on black, without clutter and noise, what is light is what is labelled."""
  black = lambda handwriting, n, objects, size, random: (
      np.zeros((n, 3, size, size), np.int16), np.full((n, objects, 3), 255, np.int16))
  monkeypatch.setattr(scenes, "_paper", black)
  monkeypatch.setattr(Random, "noise", lambda self, size: np.zeros(size, np.int16))
  found = columns.__wrapped__(1, dense=True, examples=50)
  light = found["image"][..., 0] >= 127
  np.testing.assert_array_equal(light, found["mask"] > 0)
  several = columns.__wrapped__(4, dense=True, examples=50)
  light = several["image"][..., 0] >= 127
  assert not (~light & (several["mask"] > 0)).any()
  assert (light & (several["mask"] == 0)).sum() < 100  # where the edges of two digits add up
  for mask, objects in zip(several["mask"] > 0, several["objects"]):
    covered = np.zeros_like(mask)
    for x1, y1, x2, y2 in np.rint(48 * objects[objects[:, 4] >= 0, :4]).astype(int):
      inside = mask[y1:y2, x1:x2]  # some ink along each side, its own or what hides it
      assert inside[0].any() and inside[-1].any()
      assert inside[:, 0].any() and inside[:, -1].any()
      covered[y1:y2, x1:x2] = True
    assert not (mask & ~covered).any()


def test_the_nearer_digit_hides_the_farther():
  """Objects come the nearest first; each pixel of several boxes shows one of them, whose depth it
  has; the nearest is seen entire."""
  found = columns(4, dense=True)
  hidden = ties = 0
  for i in np.flatnonzero(found["count"] > 1):
    objects, mask, depth = found["objects"][i], found["mask"][i], found["depth"][i]
    objects = objects[objects[:, 4] >= 0]
    boxes = np.rint(48 * objects[:, :4]).astype(int)
    x1, y1, x2, y2 = boxes[0]
    nearest = mask == objects[0, 4] + 1
    nearest &= depth == depth.min()
    y, x = np.nonzero(nearest)
    assert (x.min(), y.min(), x.max() + 1, y.max() + 1) == (x1, y1, x2, y2)
    seen = sorted(set(depth[mask > 0]))
    ties += len(seen) < len(objects)
    for distance, box, kind in zip(seen, boxes, objects[:, 4]) if len(seen) == len(objects) else ():
      y, x = np.nonzero(depth == distance)
      assert set(mask[y, x]) == {kind + 1}
      assert x.min() >= box[0] and y.min() >= box[1] and x.max() < box[2] and y.max() < box[3]
      hidden += (x.min(), y.min(), x.max() + 1, y.max() + 1) != tuple(box)
    assert found["digit"][i] == objects[0, 4]
    np.testing.assert_array_equal(found["box"][i], objects[0, :4])
  assert hidden > 20 and ties < 10  # nearly always, every digit is seen at a distance of its own


def test_depth_is_that_of_digits_equally_large():
  found = columns(4, dense=True)
  assert ((found["depth"] == 1) == (found["mask"] == 0)).all()
  assert 0.3 < found["depth"].min() and found["depth"][found["mask"] > 0].max() < 0.9
  product = found["depth"].min((1, 2)) * found["scale"]
  np.testing.assert_allclose(product, product[0], rtol=1e-6)


def test_little_of_a_digit_is_hidden():
  found = columns(4, examples=1000)["objects"].astype(np.float64)
  share = []
  for k in range(1, 4):
    for j in range(k):
      sides = (np.minimum(found[:, j, 2:4], found[:, k, 2:4])
               - np.maximum(found[:, j, :2], found[:, k, :2])).clip(0)
      area = (found[:, k, 2:4] - found[:, k, :2]).prod(1)
      share += [*(sides.prod(1)[area > 0] / area[area > 0])]
  assert np.mean(np.array(share) > 0.27) < 0.02 and 0.2 < np.mean(np.array(share) > 0) < 0.5


@pytest.mark.parametrize("objects, size", [(1, 32), (1, 48), (8, 48), (4, 96)])
def test_digits_keep_off_the_border(objects, size):
  found = columns(objects, size=size)
  boxes = (found["box"][:, None] if objects == 1 else found["objects"])[..., :4] * size
  boxes = boxes[boxes[..., 2] > 0]
  assert boxes.min() > 2.999 and boxes.max() < size - 2.999
  sides = boxes[:, 2:] - boxes[:, :2]
  assert sides.min() > size / 16 and sides.max() < size
  assert boxes[:, 0].min() < 5 and boxes[:, 1].min() < 5  # they go everywhere


def _patch(height, angle, sheet):
  """A digit of a height in pixels on its patch, and its extents."""
  one = np.ones((1, 1), np.int32)
  random = Random("a test")
  random.integers = lambda low, high, size: np.zeros(size, np.int32)
  digits = scenes._Digits(0 * one, sheet * one, height * PX * one, angle * one)
  patches, extents = scenes._patches(by_split()["train"], digits, random)
  return patches[0, 0].astype(np.float64), extents[0, 0]


def _moments(patch):
  """Mean place and covariance of the ink, in pixels."""
  y, x = np.indices(patch.shape)
  weight = patch / patch.sum()
  cy, cx = (weight * y).sum(), (weight * x).sum()
  return np.array([cy, cx]), np.array([[(weight * (y - cy)**2).sum(),
                                        (weight * (y - cy) * (x - cx)).sum()],
                                       [0, (weight * (x - cx)**2).sum()]])


@pytest.mark.parametrize("sheet", [1, 11, 200, 777])
@pytest.mark.parametrize("angle", [-30, -9, 15, 30])
def test_the_angle_is_that_of_the_ink(angle, sheet):
  """The long axis of what is written turns anticlockwise by the angle."""
  def axis(turned):
    _, covariance = _moments(_patch(96, turned, sheet)[0])
    (yy, yx), (_, xx) = covariance
    return np.rad2deg(0.5 * np.arctan2(-2 * yx, xx - yy))  # from the right, anticlockwise
  difference = (axis(angle) - axis(0) + 90) % 180 - 90
  assert abs(difference - angle) < 1


@pytest.mark.parametrize("sheet", [1, 11, 200, 777])
def test_the_scale_is_that_of_the_ink(sheet):
  """Twice the height: twice the sides of the box, four times the ink."""
  small, large = _patch(48, 20, sheet), _patch(96, 20, sheet)
  sides = [e[2:] - e[:2] for _, e in (small, large)]
  np.testing.assert_allclose(sides[1], 2 * sides[0], atol=2)
  np.testing.assert_allclose(large[0].sum(), 4 * small[0].sum(), rtol=0.02)


def test_heights_reach_from_end_to_end():
  """The sheets' 8 pixels of handwriting are `height` high: most digits fill them."""
  tall = [np.diff(_patch(80, 0, sheet)[1][[1, 3]])[0] for sheet in range(0, 1700, 100)]
  assert 74 < np.median(tall) < 90


def test_a_patch_has_an_empty_border():
  random = Random("a test")
  handwriting = by_split()["train"]
  digits = scenes._chosen(handwriting, 500, 1, (7 * 32, 11 * 32), random)
  patches, _ = scenes._patches(handwriting, digits, random)
  for edge in (patches[:, :, 0], patches[:, :, -1], patches[..., 0], patches[..., -1]):
    assert not edge.any()


def test_angles_and_scales_cover_their_range():
  found = columns(1, examples=1000)
  counts = np.histogram(found["angle"], 6, (-30, 30))[0]
  assert (abs(counts - 1000 / 6) < 50).all() and abs(found["angle"]).max() <= 30
  counts = np.histogram(found["scale"], 4, (7 / 16, 11 / 16))[0]
  assert (abs(counts - 250) < 60).all() and counts.sum() == 1000


def test_train_and_test_show_different_handwriting(monkeypatch):
  """Of the digits and of the scraps about them."""
  drawn = {}
  original = Handwriting.ink
  def recording(handwriting, sheet, *arguments):
    drawn[split].update(sheet.tolist())
    return original(handwriting, sheet, *arguments)
  monkeypatch.setattr(Handwriting, "ink", recording)
  for split, handwriting in by_split().items():
    drawn[split] = set()
    scenes._columns(handwriting, 300, 4, 48, False, Random("a test"))
    assert drawn[split] <= set(np.concatenate(handwriting.by_class).tolist())
  assert not drawn["train"] & drawn["test"] and len(drawn["train"]) > 400


def test_digits_are_of_their_class():
  from sklearn.datasets import load_digits
  digits = scenes._chosen(by_split()["test"], 300, 4, (200, 300), Random("a test"))
  np.testing.assert_array_equal(load_digits().target[digits.sheet], digits.digit)
  assert (np.diff(digits.height, axis=1) <= 0).all()


def test_dense_labels_change_nothing_else():
  for name, column in columns(4).items():
    np.testing.assert_array_equal(columns(4, dense=True)[name], column)


def test_no_sine_is_near_a_tie():
  """Rounding a sine gives one integer on every machine, whatever the last bits of its sine."""
  turned = ONE * np.sin(np.deg2rad(np.arange(-30, 31)))
  turned = np.concatenate([turned, ONE * np.cos(np.deg2rad(np.arange(-30, 31)))])
  assert abs(turned % 1 - 0.5).min() > 1e-6


@pytest.mark.parametrize("objects, train, test", [
    (1, "2194dbf2ff6006b6", "9b199664d4dea1b9"),
    (4, "12d409617aa91e14", "843793b25a00be5b"),
])
def test_every_machine_draws_the_same_bytes(objects, train, test):
  for split, expected in (("train", train), ("test", test)):
    found = hashlib.sha256()
    for name, column in sorted(columns(objects, dense=True, split=split).items()):
      found.update(name.encode() + column.tobytes())
    assert found.hexdigest()[:16] == expected, split


@pytest.mark.parametrize("arguments, message", [
    ({"objects": 0}, "objects: expected 1 … 8, found 0"),
    ({"objects": 9}, "objects: expected 1 … 8, found 9"),
    ({"size": 28}, "size: expected 32 … 512, found 28"),
    ({"train_examples": 0}, "train_examples: expected at least 1, found 0"),
])
def test_what_cannot_be_drawn(arguments, message):
  with pytest.raises(UserError, match=message):
    scenes.digit_scenes("", **arguments)
