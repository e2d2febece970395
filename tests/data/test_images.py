"""Images of every kind are read upright, opaque and of one size, and their boxes follow."""

import io

import numpy as np
from PIL import Image
import pytest

from mtl_jax.data import boxes, images
from mtl_jax.errors import UserError

WHITE, RED = (255, 255, 255), (254, 0, 0)
# What turns an upright image into one whose EXIF orientation turns it back.
STORED = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
          4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
          6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_270}


def content(image, format="PNG", **options):
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def read(image, format="PNG", size=8, options=None, **how):
  file = content(image, format, **(options or {}))
  return images.decode(file, images.reading(size, **how)).pixels


def plain(mode, colour):
  return Image.new(mode, (8, 8), colour)


@pytest.mark.parametrize("image,format,expected", [
    (plain("RGB", RED), "PNG", RED),
    (plain("RGB", RED), "JPEG", RED),
    (plain("RGB", RED), "BMP", RED),
    (plain("L", 7), "PNG", (7, 7, 7)),
    (plain("1", 1), "PNG", WHITE),
    (plain("LA", (7, 255)), "PNG", (7, 7, 7)),
    (plain("RGB", RED).convert("P", palette=Image.Palette.ADAPTIVE), "GIF", RED),
    (plain("RGBA", (*RED, 0)), "PNG", WHITE),
    (plain("RGBA", (0, 0, 0, 51)), "PNG", (204, 204, 204)),  # 51 / 255 of black on white
    (plain("CMYK", (0, 255, 255, 0)), "JPEG", RED),
    (plain("CMYK", (0, 0, 0, 255)), "TIFF", (0, 0, 0)),
])
def test_every_mode_becomes_rgb(image, format, expected):
  found = read(image, format)
  assert found.shape == (8, 8, 3) and found.dtype == np.uint8
  np.testing.assert_allclose(found.astype(int), np.broadcast_to(expected, (8, 8, 3)), atol=2)


def test_sixteen_bits_keep_their_range():
  values = np.array([[0, 257, 128, 129], [65535, 32768, 65407, 65406]], np.uint16)
  expected = [[0, 1, 0, 1], [255, 128, 255, 254]]  # value / 257, rounded
  for format in ("PNG", "TIFF"):
    found = read(Image.fromarray(values), format, size=(2, 4), channels=1)
    assert found[..., 0].tolist() == expected
  assert read(Image.fromarray(values), size=(2, 4)).tolist() == [
      [[value] * 3 for value in row] for row in expected]


def test_transparent_palettes_and_backgrounds():
  image = plain("P", 0)
  image.putpalette([10, 20, 30, 40, 50, 60])
  found = read(image, options={"transparency": 0}, background="#000102")
  assert np.unique(found.reshape(-1, 3), axis=0).tolist() == [[0, 1, 2]]
  assert (read(image, options={"transparency": 0}, channels=1, background="white") == 255).all()


def test_the_first_frame_counts():
  frames = [plain("L", 10), plain("L", 200)]
  found = read(frames[0], "GIF", options={"save_all": True, "append_images": frames[1:]})
  assert (found == 10).all()


@pytest.mark.parametrize("orientation", STORED)
def test_images_are_turned_upright(orientation):
  upright = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10)
  turn = STORED[orientation]
  stored = upright if turn is None else upright.transpose(turn)
  exif = Image.Exif()
  exif[0x0112] = orientation
  options = {"exif": exif}
  found = read(stored, size=(4, 6), channels=1, options=options)
  np.testing.assert_array_equal(found[..., 0], np.asarray(upright))
  as_stored = read(stored, size=(stored.height, stored.width), channels=1, upright=False,
                   options=options)
  np.testing.assert_array_equal(as_stored[..., 0], np.asarray(stored))


def drawn(width, height, box):
  """A black box, x1, y1, x2, y2 in pixels, on white."""
  pixels = np.full((height, width, 3), 255, np.uint8)
  pixels[box[1]:box[3], box[0]:box[2]] = 0
  return Image.fromarray(pixels)


def measured(pixels):
  """The box that is black on white, from the edges' own grey: x1, y1, x2, y2 in pixels."""
  dark = 1 - pixels[..., 0].astype(np.float64) / 255
  edges = []
  for profile in (dark.max(axis=0), dark.max(axis=1)):
    centre = (profile * (np.arange(len(profile)) + 0.5)).sum() / profile.sum()
    edges.append((centre - profile.sum() / 2, centre + profile.sum() / 2))
  (x1, x2), (y1, y2) = edges
  return np.array([x1, y1, x2, y2])


@pytest.mark.parametrize("fit", images.FITS)
@pytest.mark.parametrize("format,orientation", [("PNG", 1), ("PNG", 5), ("JPEG", 1), ("JPEG", 8)])
@pytest.mark.parametrize("width,height", [(640, 481), (299, 800), (61, 40)])
def test_boxes_follow_their_image(fit, format, orientation, width, height):
  """What was drawn is where the label says it is, whatever the way to the size."""
  box = (int(0.4 * width), int(0.45 * height), int(0.6 * width), int(0.7 * height))
  upright = drawn(width, height, box)
  exif = Image.Exif()
  exif[0x0112] = orientation
  turn = STORED[orientation]
  stored = upright if turn is None else upright.transpose(turn)
  options = {"exif": exif, **({"quality": 95} if format == "JPEG" else {})}
  how = images.reading((48, 64), fit=fit)
  found = images.decode(content(stored, format, **options), how)
  assert (found.width, found.height) == (width, height)
  shown, used, report = boxes.placed(np.array([box], np.float64), width, height, how)
  assert used.all() and not sum(report.values())
  np.testing.assert_allclose(shown[0] * (64, 48, 64, 48), measured(found.pixels), atol=0.35)


def test_boxes_are_clipped_or_left_out():
  how = images.reading(10, fit="crop")  # of 20 x 10 shows x from 5 to 15
  given = np.array([[0, 0, 10, 10],        # its left half is cut off
                    [-5, 2, 8, 30],        # juts out of the image, and is cut off besides
                    [0, 0, 4, 10],         # in what is cut off
                    [9, 9, 9, 10],         # no width
                    [9, 9, 8, 10],         # negative width
                    [np.nan, 0, 1, 1],
                    [0, 0, np.inf, 1],
                    [21, 0, 25, 5],        # outside
                    [5, -0.001, 15, 5]])   # juts out by rounding only
  shown, used, report = boxes.placed(given, 20, 10, how)
  np.testing.assert_allclose(shown, [[0, 0, 0.5, 1], [0, 0.2, 0.3, 1], [0, 0, 1, 0.5]], rtol=1e-6)
  assert used.tolist() == [True, True] + [False] * 6 + [True]
  assert report == {boxes.CLIPPED: 1, boxes.CUT_AWAY: 1, boxes.NO_AREA: 2, boxes.NOT_FINITE: 2,
                    boxes.OUTSIDE: 1}


def noise():
  return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))


@pytest.mark.parametrize("file,reason", [
    (b"", images.EMPTY),
    (b"a text, not an image", images.NOT_AN_IMAGE),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", images.NOT_AN_IMAGE),
    (content(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), images.TOO_DEEP),
    (content(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"), images.TOO_DEEP),
    (b"P5 20000 20000 255\n", images.TOO_LARGE),
    *[(content(noise(), format)[:-size], images.DAMAGED)
      for format, size in (("PNG", 500), ("JPEG", 500), ("BMP", 500), ("GIF", 500), ("TIFF", 4000),
                           ("WEBP", 100), ("PPM", 1))],
])
def test_what_is_wrong_with_a_file_is_said(tmp_path, file, reason):
  with pytest.raises(images.Unusable, match=f"^{reason}$"):
    images.decode(file, images.reading(8))
  path = tmp_path / "broken.png"
  path.write_bytes(file)
  with pytest.raises(UserError, match=f"(?s)broken.png to be an image, found: {reason}.*restore"):
    images.read_image(path, images.reading(8))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "GIF", "PPM", "WEBP"])
def test_random_damage_gives_an_image_or_a_reason(format):
  rng = np.random.default_rng(1)
  whole = content(noise(), format)
  for _ in range(60):
    broken = bytearray(whole)
    for place in rng.integers(0, min(300, len(whole)), 4):
      broken[place] = rng.integers(256)
    try:
      images.decode(bytes(broken), images.reading(8))
    except images.Unusable as error:
      assert str(error)


@pytest.mark.parametrize("arguments,message", [
    ({"size": None}, "size: expected pixels, or height and width, found None"),
    ({"size": (3, 4, 5)}, "found \\(3, 4, 5\\)"),
    ({"size": 0}, "found 0"),
    ({"size": 8, "fit": "zoom"}, "fit: expected one of stretch, crop, pad, found 'zoom'"),
    ({"size": 8, "channels": 4}, "channels: expected 3"),
    ({"size": 8, "background": "whitish"}, "background: expected a colour"),
])
def test_arguments_are_checked(arguments, message):
  with pytest.raises(UserError, match=message):
    images.reading(**arguments)
