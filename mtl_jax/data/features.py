"""How the features of a TFDS data set become labels.

| feature | label |
|---|---|
| `ClassLabel` | class |
| `Tensor` or `Scalar` of bool | class of 2 (scalar), binary (vector) |
| `Tensor` or `Scalar` of floats | number (scalar or vector), map (as high and wide as the image) |
| dictionary of bools, such as CelebA's attributes | binary, in the order of their names |
| `BBoxFeature`: ymin, xmin, ymax, xmax | box: x1, y1, x2, y2 |
| `Sequence` of dictionaries with one box | objects |
| `Image` of one uint8 channel beside the image, `LabeledImage` | mask |

The class of an object is the only `ClassLabel` of its dictionary, or the one called `label`; where
there is none, all objects are of one class. Objects marked `is_crowd` are left out. A pixel of 255
in a mask is a missing label, where there are not that many classes.

Anything else is no label, and neither is a number or a map whose size is not fixed.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import io
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mtl_jax.data.source import Label
from mtl_jax.data.stacking import nearest

if TYPE_CHECKING:
  from tensorflow_datasets import features as tfds_features

_IGNORED = 255  # what masks of one byte a pixel hold where nobody knows


class Place(NamedTuple):
  """Height and width of an image as it is stored, and as it is read."""

  original: tuple[int, int]
  result: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Column:
  """How one feature becomes a label.

  Attributes:
    label: what it becomes.
    convert: from the feature's value and the image's place to the label's value.
    count: where only all examples together say how many classes a mask has, or how many objects an
      image shows at most: this, of one value. None where nothing needs to be counted.
    counted: the column for the greatest count.
  """

  label: Label
  convert: Callable[[Any, Place], np.ndarray]
  count: Callable[[Any], int] | None = None
  counted: Callable[[int], "Column"] | None = None


def column(feature: "tfds_features.FeatureConnector",
           image: "tfds_features.Image") -> Column | None:
  """The column of a feature that stands beside an image; None where it is no label.

  >>> from tensorflow_datasets import features
  >>> animal = column(features.ClassLabel(names=["cat", "dog"]), features.Image())
  >>> animal.label.kind, animal.label.names, animal.convert(1, Place((8, 8), (8, 8))).tolist()
  ('class', ('cat', 'dog'), 1)
  >>> column(features.Text(), features.Image()) is None
  True
  """
  from tensorflow_datasets import features as kinds
  if isinstance(feature, kinds.ClassLabel):
    if feature.num_classes is None:
      return None
    return Column(Label("class", feature.num_classes, tuple(feature.names)), _class)
  if isinstance(feature, kinds.BBoxFeature):
    return Column(Label("box"), _box) if _is_yxyx(feature) else None
  if isinstance(feature, kinds.Image):
    return _mask_column(feature)
  if isinstance(feature, kinds.FeaturesDict):
    names = tuple(sorted(feature))
    if not names or not all(_is_flag(part) for part in feature.values()):
      return None
    return Column(Label("binary", names=names), functools.partial(_flags, names=names))
  if isinstance(feature, kinds.Sequence):
    return _objects_column(feature.feature)
  if type(feature) in (kinds.Tensor, kinds.Scalar):
    return _tensor_column(feature, image.shape[:2])
  return None


def _is_flag(feature: "tfds_features.FeatureConnector") -> bool:
  from tensorflow_datasets import features as kinds
  return isinstance(feature, kinds.Tensor) and (feature.shape, feature.np_dtype) == ((), np.bool_)


def _tensor_column(feature: "tfds_features.Tensor",
                   size: tuple[int | None, int | None]) -> Column | None:
  shape, dtype = feature.shape, feature.np_dtype
  if len(shape) <= 1 and None not in shape:
    if dtype == np.bool_:
      flags = Label("binary", names=tuple(map(str, range(*shape)))) if shape else None
      return Column(flags or Label("class", 2, ("false", "true")), _class)
    return Column(Label("number"), _number) if np.issubdtype(dtype, np.floating) else None
  is_map = len(shape) in (2, 3) and np.issubdtype(dtype, np.floating) and None not in shape[2:]
  if is_map and all(ours in (None, theirs) for ours, theirs in zip(shape[:2], size)):
    return Column(Label("map"), _map)
  return None


def _mask_column(feature: "tfds_features.Image") -> Column | None:
  if feature.shape[-1] != 1 or feature.np_dtype != np.uint8:
    return None
  classes = getattr(feature, "num_classes", None)
  if classes is not None:
    return Column(Label("mask", classes, tuple(feature.names)),
                  functools.partial(_mask, classes=classes))

  def counted(classes: int) -> Column:
    return Column(Label("mask", classes), functools.partial(_mask, classes=classes))

  def count(value: bytes) -> int:
    pixels = _pixels(value)
    return int(pixels.max(where=pixels != _IGNORED, initial=0)) + 1

  return Column(Label("mask"), _mask, count, counted)


def _objects_column(feature: "tfds_features.FeatureConnector") -> Column | None:
  from tensorflow_datasets import features as kinds
  if not isinstance(feature, kinds.FeaturesDict):
    return None
  boxes = [name for name, part in feature.items()
           if isinstance(part, kinds.BBoxFeature) and _is_yxyx(part)]
  classes = [name for name, part in feature.items() if isinstance(part, kinds.ClassLabel)]
  if "label" in classes:
    classes = ["label"]
  if len(boxes) != 1 or len(classes) > 1:
    return None
  of_class = feature[classes[0]] if classes else None
  label = Label("objects", of_class.num_classes if classes else 1,
                tuple(of_class.names) if classes else ())
  convert = functools.partial(_objects, box=boxes[0], of_class=classes[0] if classes else None)
  return Column(label, convert, lambda value: len(_shown(value, boxes[0])),
                lambda most: Column(label, functools.partial(convert, most=most)))


def _is_yxyx(feature: "tfds_features.BBoxFeature") -> bool:
  """Whether coordinates are fractions, y first; older TFDS does not say."""
  from tensorflow_datasets.core.features.bounding_boxes_utils import BBoxFormat
  return feature.bbox_format in (None, BBoxFormat.REL_YXYX)


# ---- Values. What does not fit is a ValueError.


def _class(value: Any, place: Place) -> np.ndarray:
  return np.asarray(value, np.int32)


def _number(value: Any, place: Place) -> np.ndarray:
  return np.asarray(value, np.float32)


def _flags(value: Any, place: Place, *, names: Sequence[str]) -> np.ndarray:
  return np.array([value[name] for name in names], np.int32)


def _box(value: Any, place: Place) -> np.ndarray:
  box = np.asarray(value, np.float32).reshape(-1, 4)[:, [1, 0, 3, 2]].reshape(np.shape(value))
  if not ((0 <= box) & (box <= 1)).all():
    raise ValueError("expected boxes as fractions of the image, "
                     f"found {np.asarray(value).tolist()}")
  return box


def _objects(value: Any, place: Place, *, box: str, of_class: str | None, most: int) -> np.ndarray:
  objects = np.zeros((most, 5), np.float32)
  objects[:, 4] = -1
  shown = _shown(value, box)
  for row, index in enumerate(shown):
    objects[row, :4] = _box(value[box][index], place)
    objects[row, 4] = value[of_class][index] if of_class else 0
  return objects


def _shown(value: Any, box: str) -> list[int]:
  """Which of the objects are single ones."""
  crowds = value.get("is_crowd", [False] * len(value[box]))
  return [index for index, crowd in enumerate(crowds) if not crowd]


def _mask(value: bytes, place: Place, *, classes: int) -> np.ndarray:
  mask = _at_result(_pixels(value), place).astype(np.int32)
  return np.where((mask == _IGNORED) & (classes <= _IGNORED), np.int32(-1), mask)


def _map(value: Any, place: Place) -> np.ndarray:
  return _at_result(np.asarray(value), place).astype(np.float32)


def _pixels(value: bytes) -> np.ndarray:
  from PIL import Image
  try:
    with Image.open(io.BytesIO(value)) as image:
      return np.asarray(image)
  except OSError as error:
    raise ValueError(f"expected masks as images, found one damaged: {error}") from error


def _at_result(pixels: np.ndarray, place: Place) -> np.ndarray:
  if pixels.shape[:2] != place.original:
    raise ValueError("expected labels of pixels to be of the size of their image, "
                     f"{list(place.original)}, found {list(pixels.shape[:2])}")
  return nearest(pixels, place.result)
