"""COCO's average precision of detections."""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import io
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

COCO_IOU = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


class Detected(NamedTuple):
  """Detections and objects of B images."""

  detections: Any  # shape=(B, K, 6), float32: box, score, class; class -1 where there is none
  objects: Any  # shape=(B, M, 5), float32: box, class; class -1 where there is none
  mask: Any  # shape=(B,), bool, False for images that do not count


def average_precisions(detected: Detected, num_classes: int,
                       ious: Sequence[float] = COCO_IOU) -> np.ndarray:
  """Average precision of each class, by pycocotools: [num_classes], NaN where it has no object.

  A detection is right if it overlaps an object of its class, that no surer detection has, by at
  least the threshold. Precision is averaged over 101 levels of recall, and over the thresholds.
  As in COCO the 100 surest detections of an image and class count, and objects of all sizes.
  The images are sorted by what is in them first, so that their order does not matter even where
  scores are equal.

  Args:
    detected: of all images; boxes without area are no objects.
    num_classes: classes are 0 … num_classes - 1.
    ious: thresholds of the IoU from which on a detection is right.

  >>> objects = np.array([[[0, 0, .5, .5, 0]]])
  >>> detections = np.array([[[.6, .6, 1, 1, .9, 0], [0, 0, .5, .5, .8, 0]]])
  >>> average_precisions(Detected(detections, objects, np.array([True])), 2).tolist()
  [0.5, nan]

  Reference:
    Lin et al.: Microsoft COCO: Common Objects in Context. ECCV 2014, arXiv:1405.0312.
  """
  from pycocotools.coco import COCO
  from pycocotools.cocoeval import COCOeval
  images = [(found[found[:, 5] >= 0], objects[_is_object(objects)])
            for found, objects, counts in zip(*map(np.asarray, detected)) if counts]
  images.sort(key=lambda image: (image[0].tobytes(), image[1].tobytes()))
  results = np.full(num_classes, np.nan)
  if not any(len(objects) for _, objects in images):
    return results
  with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress there
    sides = []
    for side in (1, 0):
      coco = COCO()
      coco.dataset = _dataset([image[side] for image in images], num_classes)
      coco.createIndex()
      sides.append(coco)
    evaluation = COCOeval(*sides, "bbox")
    evaluation.params.iouThrs = np.array(ious)
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, np.inf]], ["all"]
    evaluation.params.maxDets = [100]
    evaluation.evaluate()
    evaluation.accumulate()
  precision = evaluation.eval["precision"][..., 0, 0]  # threshold, recall, class; -1: no object
  there = (precision > -1).all(axis=(0, 1))
  results[there] = precision[..., there].mean(axis=(0, 1))
  return results


def _is_object(rows: np.ndarray) -> np.ndarray:
  return (rows[:, 4] >= 0) & (rows[:, 2] > rows[:, 0]) & (rows[:, 3] > rows[:, 1])


def _dataset(images: Sequence[np.ndarray], num_classes: int) -> Mapping[str, Any]:
  """COCO's records of rows (x1, y1, x2, y2, [score,] class) by image."""
  annotations = []
  for image, rows in enumerate(images):
    for x1, y1, x2, y2, *score, label in rows.astype(np.float64).tolist():
      box = [x1, y1, x2 - x1, y2 - y1]
      annotations.append({"id": len(annotations) + 1, "image_id": image, "category_id": int(label),
                          "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
                          "score": score[0] if score else 1.0})
  return {"images": [{"id": image} for image in range(len(images))],
          "categories": [{"id": label} for label in range(num_classes)],
          "annotations": annotations}


@dataclasses.dataclass(frozen=True)
class AveragePrecision:
  """The mean over classes of the average precision, as a metric that gathers detections.

  Attributes:
    name: as shown, "mAP".
    num_classes: classes are 0 … num_classes - 1.
    detect: `detect(outputs) -> boxes [B, K, 4], scores [B, K], classes [B, K]`.
    ious: thresholds of the IoU from which on a detection is right.
    only: the class that counts; None for the mean of all that have objects.
  """

  name: str
  num_classes: int
  detect: Callable[[Any], tuple[jax.Array, jax.Array, jax.Array]]
  ious: Sequence[float] = COCO_IOU
  only: int | None = None
  unit = "fraction"
  higher_is_better = True
  gathered = True

  def update(self, outputs: Any, labels: jax.Array, mask: jax.Array) -> Detected:
    """Detections of one batch beside its objects `labels` [B, M, 5]."""
    boxes, scores, classes = self.detect(outputs)
    rows = jnp.concatenate([boxes, scores[..., None], classes.astype(jnp.float32)[..., None]],
                           axis=-1)
    return Detected(rows, labels, mask)

  def merge(self, a: Detected, b: Detected) -> Detected:
    """Detections of the images of both."""
    return Detected(*(np.concatenate([x, y]) for x, y in zip(a, b)))

  def compute(self, state: Detected) -> float:
    """The value in [0, 1]; NaN where no image that counts has an object."""
    values = average_precisions(state, self.num_classes, self.ious)
    values = values[~np.isnan(values)] if self.only is None else values[[self.only]]
    return float(values.mean()) if len(values) else float("nan")
