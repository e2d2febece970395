"""Augmentation: what lies in an image moves with it."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.data import augmentation, geometry, streams
from mtl_jax.data.augmentation import augment, parse
from mtl_jax.data.source import Label

H, W, B = 40, 32, 16
LABELS = {"class": Label("class", 3), "number": Label("number"), "box": Label("box"),
          "objects": Label("objects", 3), "mask": Label("mask", 2), "map": Label("map"),
          "depth": Label("map", depth=True), "normals": Label("normals")}
MOVING = [("crop", "flip"), ("rotate:20",), ("scale:0.7",),
          ("shift", "flip", "rotate:25", "scale:0.8:1.2")]
IDENTITIES = [("crop:0", "shift:0", "flip:0"), ("rotate:0", "scale:1"), ("color:0", "erase:0")]

resample = jax.jit(geometry.resample, static_argnums=(2, 3))
augmented = jax.jit(lambda columns, key, names: augment(columns, key, names, LABELS),
                    static_argnums=2)


def scenes(seed=0, height=H, width=W, near_centre=True):
  """A white rectangle a scene on black, and what the labels say of it."""
  rng = np.random.default_rng(seed)
  share = 4 if near_centre else 2
  half = np.stack([rng.integers(3, width // 8 + 2, B), rng.integers(3, height // 8 + 2, B)], 1)
  middle = np.array([width // 2, height // 2]) + np.stack(
      [rng.integers(-width // share + 6, width // share - 5, B),
       rng.integers(-height // share + 6, height // share - 5, B)], 1)
  low, high = middle - half, middle + half
  x, y = np.arange(width)[None, None, :], np.arange(height)[None, :, None]
  at = lambda bound, axis: bound[:, axis, None, None]
  inside = ((x >= at(low, 0)) & (x < at(high, 0)) & (y >= at(low, 1)) & (y < at(high, 1)))
  box = (np.concatenate([low, high], 1) / [width, height, width, height]).astype(np.float32)
  objects = np.zeros((B, 3, 5), np.float32)
  objects[..., 4] = -1
  objects[:, 1] = np.concatenate([box, np.full((B, 1), 2)], 1)
  normals = np.tile(np.array([0.6, 0, 0.8], np.float32), (B, height, width, 1))
  return jax.tree.map(jnp.asarray, {
      "image": np.repeat((200 * inside[..., None]).astype(np.uint8), 3, axis=-1),
      "class": rng.integers(0, 3, B).astype(np.int32),
      "number": rng.normal(size=(B, 2)).astype(np.float32),
      "box": box, "objects": objects, "mask": inside.astype(np.int32),
      "map": np.where(inside, 2, 5).astype(np.float32),
      "depth": np.where(inside, 2, 5).astype(np.float32), "normals": normals})


def box_of(inside):
  """The box around what is inside, as pixels."""
  rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
  return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def assert_same(one, other, **tolerance):
  assert set(one) == set(other)
  for name, value in one.items():
    assert value.dtype == other[name].dtype
    np.testing.assert_allclose(value, other[name], err_msg=name, **tolerance)


@pytest.mark.parametrize("names, expected", [
    (("crop", "flip"), (855324133, 1329778151)), (("crop:4", "flip:0.5"), (855324133, 1329778151)),
    (("flip", "shift"), (141226235, 2836019896)),
    (("crop", "shift", "flip"), (1702960276, 530485867))])
def test_crops_shifts_and_flips_of_earlier_runs_go_on(names, expected):
  """CRC-32 as of version 0.1.0 before labels moved: resumed runs see the images they would have."""
  images = np.random.default_rng(0).integers(0, 256, (16, 12, 10, 3)).astype(np.uint8)
  run = jax.jit(lambda key: augment({"image": jnp.asarray(images)}, key, names, {})["image"])
  found = [run(jax.random.key(seed)) for seed in (0, 1)]
  assert tuple(zlib.crc32(np.asarray(image).tobytes()) for image in found) == expected


@pytest.mark.parametrize("names", MOVING, ids="+".join)
def test_boxes_masks_and_maps_move_with_the_image(names):
  moved = augmented(scenes(), jax.random.key(1), names)
  kinds = lambda columns: {name: (x.shape, x.dtype) for name, x in columns.items()}
  assert kinds(moved) == kinds(scenes())
  moved = {name: np.asarray(value) for name, value in moved.items()}
  compared = 0
  for i in range(B):
    white, inside = moved["image"][i, ..., 0] > 100, moved["mask"][i] == 1
    assert (white ^ inside).mean() < 0.02
    box, found = moved["box"][i] * [W, H, W, H], moved["objects"][i]
    np.testing.assert_array_equal(found[1, :4], moved["box"][i])
    assert found[1, 4] == 2 and (found[[0, 2]] == [0, 0, 0, 0, -1]).all()
    if (box > 0).all() and (box < [W, H, W, H]).all():
      compared += 1
      np.testing.assert_allclose(box, box_of(inside), atol=1)
      np.testing.assert_allclose(box, box_of(white), atol=1)
    outside = moved["mask"][i] == -1
    np.testing.assert_array_equal(np.isnan(moved["map"][i]), outside)
    np.testing.assert_array_equal(np.isnan(moved["normals"][i]).any(-1), outside)
    np.testing.assert_array_equal(moved["map"][i] == 2, inside)
    assert (moved["image"][i][outside] <= 100).all()
  assert compared > B // 2
  np.testing.assert_array_equal(moved["class"], scenes()["class"])
  np.testing.assert_array_equal(moved["number"], scenes()["number"])


@pytest.mark.parametrize("name", ["crop:24", "scale:1:4"])
def test_a_box_that_leaves_the_image_is_missing_or_absent(name):
  """How much of it is left is counted on the mask, the zoom read off the depth."""
  before = scenes(near_centre=False)
  moved = {key: np.asarray(value) for key, value in
           augmented(before, jax.random.key(3), (name,)).items()}
  zoom = 5 / np.nanmax(moved["depth"], (1, 2))
  area = np.asarray((before["mask"] == 1).sum((1, 2))) * zoom ** 2
  visible = (moved["mask"] == 1).sum((1, 2)) / area
  clear = abs(visible - geometry.LEAST_VISIBLE) > 0.08
  gone = np.isnan(moved["box"]).all(-1)
  np.testing.assert_array_equal(gone[clear], (visible < geometry.LEAST_VISIBLE)[clear])
  assert 2 < gone.sum() < B - 2
  assert (moved["objects"][gone] == [0, 0, 0, 0, -1]).all()
  np.testing.assert_array_equal(moved["objects"][~gone, 1, :4], moved["box"][~gone])
  assert (moved["box"][~gone] >= 0).all() and (moved["box"][~gone] <= 1).all()


@pytest.mark.parametrize("box, part", [((0.0, 0.0, 0.4, 1.0), 0.26), ((0.0, 0.0, 0.4, 1.0), 0.24),
                                       ((0.3, 0.0, 0.3, 1.0), 1.0), ((0.3, 0.0, 0.3, 1.0), 0.0)])
def test_a_quarter_of_a_box_is_enough(box, part):
  """Pushed out to the left until `part` of it is in view; a box without a width is in or out."""
  width = box[2] - box[0]
  left = box[0] + (1 - part) * width + (0 if width else 0.5 * (1 - part))
  right = geometry.Affine(jnp.eye(2)[None], jnp.array([[-50 * left, 0.0]]))
  moved, visible = geometry.move_boxes(jnp.array([[box]]), right, 20, 50)
  assert bool(visible[0, 0]) == (part >= 0.25)
  if visible[0, 0] and width:
    np.testing.assert_allclose(moved[0, 0], (0, 0, part * width, 1), atol=1e-6)


def test_a_quarter_turn_is_exact():
  rng = np.random.default_rng(0)
  columns = scenes(height=W)
  columns["image"] = jnp.asarray(rng.integers(0, 256, (B, W, W, 3)).astype(np.uint8))
  turn = geometry.rotation(jnp.full(B, 90.0), W, W)
  for name, fill, order in (("image", None, 1), ("image", 0, 1), ("mask", -1, 0),
                            ("map", np.nan, 0)):
    found = columns[name]
    for quarters in (1, 2, 3, 4):
      found = resample(found, turn, fill, order)
      np.testing.assert_array_equal(found, np.rot90(columns[name], -quarters, (1, 2)))
  boxes, visible = geometry.move_boxes(columns["box"][:, None], turn, W, W)
  inside = np.rot90(columns["mask"], -1, (1, 2)) == 1
  assert visible.all()
  np.testing.assert_allclose(boxes[:, 0] * W, [box_of(one) for one in inside], atol=1e-4)
  normals = geometry.turned(jnp.tile(jnp.array([0.6, 0.0, 0.8]), (B, 1, 1, 1)), turn.matrix)
  np.testing.assert_allclose(normals[0, 0, 0], (0, 0.6, 0.8), atol=1e-6)  # from right to down


def test_twice_as_near_is_exact(monkeypatch):
  """The upper left quarter fills the image; its distances halve where they are known as such."""
  monkeypatch.setitem(geometry.MOVES, "scale", lambda key, shape: geometry.zoom(
      jnp.full(B, 2.0), jnp.zeros((B, 2)), *shape[1:3]))
  before = scenes()
  moved = jax.jit(lambda columns: augment(columns, jax.random.key(0), ("scale",), LABELS))(before)
  twice = lambda x: np.repeat(np.repeat(np.asarray(x)[:, :H // 2, :W // 2], 2, 1), 2, 2)
  for name in ("mask", "map"):
    np.testing.assert_array_equal(moved[name], twice(before[name]))
  np.testing.assert_array_equal(moved["depth"], twice(before["depth"]) / 2)
  np.testing.assert_allclose(moved["normals"], twice(before["normals"]), rtol=1e-6)
  seen = ~np.isnan(np.asarray(moved["box"])).any(-1)
  np.testing.assert_allclose(moved["box"][seen], np.clip(2 * before["box"], 0, 1)[seen], atol=1e-6)


@pytest.mark.parametrize("degrees, mirrored", [(0.0, True), (30.0, False), (-75.0, True)])
def test_normals_stay_those_of_the_surface(degrees, mirrored):
  """Those of a wavy surface, moved, are those computed anew from the moved surface."""
  y, x = np.mgrid[:64, :64].astype(np.float32)
  surface = np.sin(x / 9) * 12 + np.cos(y / 13 + x / 20) * 9

  def normals_of(surface):
    down, right = np.gradient(surface)
    normals = np.stack([-right, -down, np.ones_like(right)], -1)
    return normals / np.linalg.norm(normals, axis=-1, keepdims=True)

  move = geometry.rotation(jnp.array([degrees]), 64, 64)
  if mirrored:
    move = geometry.then(geometry.Affine(jnp.array([[[-1.0, 0], [0, 1]]]), jnp.array([[64.0, 0]])),
                         move)
  expected = normals_of(np.asarray(resample(jnp.asarray(surface)[None], move, np.nan, 1)[0]))
  found = resample(jnp.asarray(normals_of(surface))[None], move, np.nan, 0)
  found = np.asarray(geometry.turned(found, move.matrix)[0])
  both = ~np.isnan(found + expected).any(-1)
  assert both.mean() > 0.5
  apart = np.abs(found - expected)[both]
  assert apart.max() < 0.15 and apart.mean() < 0.02
  np.testing.assert_allclose(np.linalg.norm(found[both], axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize("names", IDENTITIES, ids="+".join)
def test_no_strength_changes_nothing(names):
  before = scenes()
  before["image"] = jax.random.bits(jax.random.key(0), (B, H, W, 3), jnp.uint8)
  assert_same(augmented(before, jax.random.key(5), names), before, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("names", [MOVING[0], MOVING[3]], ids="+".join)
def test_what_is_missing_stays_missing(names):
  before = scenes()
  before["box"] = before["box"].at[0].set(jnp.nan)
  before["objects"] = before["objects"].at[0].set(jnp.nan)
  before["mask"] = jnp.where(before["mask"] == 1, -1, before["mask"])
  before["map"] = jnp.where(before["map"] == 2, jnp.nan, before["map"])
  moved = augmented(before, jax.random.key(2), names)
  assert np.isnan(moved["box"][0]).all() and not np.isnan(moved["box"][1:]).any()
  assert np.isnan(moved["objects"][0]).all() and not np.isnan(moved["objects"][1:]).any()
  assert set(np.unique(moved["mask"])) == {-1, 0}
  np.testing.assert_array_equal(np.isnan(moved["map"]), moved["mask"] == -1)


def test_two_flips_are_none():
  before = scenes()
  once = augmented(before, jax.random.key(0), ("flip:1",))
  np.testing.assert_array_equal(once["image"], before["image"][:, :, ::-1])
  np.testing.assert_array_equal(once["normals"][..., 0], -before["normals"][..., 0])
  for twice in (augmented(once, jax.random.key(1), ("flip:1",)),
                augmented(before, jax.random.key(0), ("flip:1", "flip:1"))):
    assert_same(twice, before, atol=1e-6)


@pytest.mark.parametrize("names", [("box", "mask"), ("mask",)], ids="+".join)
def test_sampled_and_whole_movements_agree(names):
  """With a rotation by nothing, all is sampled once; a box decides between black and reflection."""
  labels = {name: LABELS[name] for name in names}
  before = {name: value for name, value in scenes().items() if name in {"image", *labels}}
  before["image"] = jax.random.bits(jax.random.key(0), (B, H, W, 3), jnp.uint8)
  run = jax.jit(lambda names: augment(before, jax.random.key(4), names, labels), static_argnums=0)
  sampled, whole = run(("crop", "flip", "rotate:0")), run(("crop", "flip"))
  assert_same(sampled, whole, atol=1e-6)
  dark = (np.asarray(whole["image"]) == 0).all(-1) == (np.asarray(whole["mask"]) == -1)
  assert dark.all() == ("box" in labels)


@pytest.mark.parametrize("name", augmentation.AUGMENTATIONS)
def test_a_key_tells_all(name):
  before = {"image": jax.random.bits(jax.random.key(0), (B, H, W, 3), jnp.uint8),
            "box": scenes()["box"]}
  run = jax.jit(lambda key: augment(before, key, (name,), {"box": LABELS["box"]}))
  one, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
  assert_same(one, again, rtol=0)
  assert not np.array_equal(one["image"], other["image"])
  assert not np.array_equal(one["image"], before["image"])
  assert np.array_equal(one["box"], before["box"]) == (name in ("color", "erase"))


@pytest.mark.parametrize("names", [("crop",), ("rotate", "color")], ids="+".join)
def test_images_may_be_floats(names):
  images = jax.random.bits(jax.random.key(0), (B, H, W, 3), jnp.uint8)
  run = jax.jit(lambda image: augment({"image": image}, jax.random.key(0), names, {})["image"])
  found = run(images.astype(jnp.float32))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, run(images).astype(jnp.float32), atol=1.4)


def test_draws_are_spread_as_they_say():
  shape = (4000, 10, 10, 3)
  matrices = geometry.rotate_map(jax.random.key(0), shape, 30.0).matrix
  angles = np.degrees(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
  assert np.abs(angles).max() <= 30.001
  np.testing.assert_allclose(np.histogram(angles, 4, (-30, 30))[0] / 4000, 0.25, atol=0.03)
  zoomed = geometry.scale_map(jax.random.key(0), shape, 0.5)
  zooms = np.asarray(zoomed.matrix[:, 0, 0])
  np.testing.assert_allclose(np.histogram(np.log2(zooms), 4, (-1, 1))[0] / 4000, 0.25, atol=0.03)
  places = np.asarray(zoomed.offset)[:, 0] / (10 - 10 * zooms)  # 0 and 1: at the image's borders
  np.testing.assert_allclose(np.histogram(places, 4, (0, 1))[0] / 4000, 0.25, atol=0.03)
  zooms = np.asarray(geometry.scale_map(jax.random.key(0), shape, 1.0, 1.5).matrix[:, 0, 0])
  assert 1 <= zooms.min() < 1.01 and 1.49 < zooms.max() <= 1.5001
  mirrored = geometry.flip_map(jax.random.key(0), shape, 0.2).matrix[:, 0, 0] < 0
  assert abs(float(mirrored.mean()) - 0.2) < 0.02


def test_erasing_takes_one_rectangle_of_the_papers_sizes():
  images = jnp.full((2000, 24, 30, 1), 1000.0)
  lost = np.asarray(jax.jit(augmentation.erase)(images, jax.random.key(0)) < 1000)[..., 0]
  hit = lost.any((1, 2))
  assert abs(hit.mean() - 0.5) < 0.05
  areas = lost[hit].mean((1, 2))
  assert 0.015 < areas.min() < 0.04 and 0.3 < areas.max() < 0.42
  for one in lost[hit][:100]:
    x1, y1, x2, y2 = box_of(one)
    assert one.sum() == (x2 - x1) * (y2 - y1)
  assert lost.any(0).all()  # no place is spared for ever


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_colors_change_one_by_one_as_together(channels):
  """Against brightness, contrast and saturation applied one after another by the book."""
  rng = np.random.default_rng(0)
  images = rng.uniform(90, 130, (6, 5, 4, channels)).astype(np.float32)  # so that nothing is cut
  luma = {3: [0.299, 0.587, 0.114]}.get(channels, np.full(channels, 1 / channels))
  key = jax.random.key(0)
  factors = np.asarray(jax.random.uniform(key, (3, 6, 1, 1, 1), jnp.float32, 0.7, 1.3))
  assert np.ptp(factors) > 0.3
  x = factors[0] * images
  x = factors[1] * x + (1 - factors[1]) * (x @ luma).mean((1, 2), keepdims=True)[..., None]
  x = factors[2] * x + (1 - factors[2]) * (x @ luma)[..., None]
  np.testing.assert_allclose(augmentation.color(jnp.asarray(images), key, 0.3), x, rtol=1e-5)


@pytest.mark.parametrize("text, expected", [
    ("spin", "expected one of crop, shift, flip, rotate, scale, color, erase; found 'spin'"),
    ("rotate:x", "augmentation rotate: expected degrees .*; found 'rotate:x'"),
    ("rotate:", "rotate: expected degrees"), ("rotate:200", "from 0 to 180"),
    ("rotate:-5", "from 0 to 180"), ("rotate:nan", "from 0 to 180"), ("rotate:5:6", "0 to 180"),
    ("crop:1.5", "crop: expected whole pixels"), ("crop:-1", "whole pixels"),
    ("flip:2", "flip: expected a probability"), ("erase:inf", "erase: expected a probability"),
    ("color:1.1", "color: expected a strength from 0 to 1"), ("scale:0", "expected the smallest"),
    ("scale:1.5", "smallest and largest"), ("scale:2:1", "smallest and largest"),
    ("scale:0.5:1:2", "smallest and largest")])
def test_a_strength_that_cannot_be_is_said(text, expected):
  with pytest.raises(ValueError, match=expected):
    parse(text)


def test_a_mask_of_another_size_is_said():
  columns = {"image": jnp.zeros((1, 8, 8, 3), jnp.uint8), "mask": jnp.zeros((1, 4, 4), jnp.int32)}
  with pytest.raises(ValueError, match=r"mask: expected a mask of the size of the images, \[8"):
    augment(columns, jax.random.key(0), ("flip",), {"mask": Label("mask", 2)})


def test_preprocess_moves_labels_in_training_only():
  columns = {**scenes(), "present": jnp.ones(B, bool)}
  run = lambda names: jax.jit(lambda step: streams.preprocess(
      {"s": columns}, jnp.asarray(0), step, augmentation=names, labels={"s": LABELS},
      statistics={"s": {"mean": (0.0,) * 3, "std": (1.0,) * 3}})["s"])(jnp.asarray(0))
  found = run({"s": ("rotate", "flip:1", "color")})
  assert found["image"].dtype == jnp.float32 and found["present"].all()
  for name in ("box", "mask", "normals"):
    assert not np.array_equal(found[name], columns[name])
  assert_same({**run(None), "image": columns["image"]}, columns, rtol=0)
