"""Detection: any number of objects an image, each a box and a class."""

from collections.abc import Mapping
import functools

import jax
import jax.numpy as jnp
import optax

from mtl_jax.tasks.average_precision import AveragePrecision
from mtl_jax.tasks.box_geometry import giou
from mtl_jax.tasks.nms import detect
from mtl_jax.tasks.point_assignment import assign
from mtl_jax.tasks.task import Task


def detection_losses(outputs: Mapping[str, jax.Array], objects: jax.Array, *, alpha: float = 0.25,
                     gamma: float = 2.0, radius: float = 1.5) -> dict[str, jax.Array]:
  """The three parts of the loss of each image.

  Args:
    outputs: of the head, see `detection`.
    objects: [B, M, 5] boxes in fractions and class; -1 where there is none.
    alpha: weight of positives in the focal loss; negatives have 1 - alpha.
    gamma: exponent by which the focal loss passes over what is known well.
    radius: of the centre of an object that its locations lie in, in cells; see `assign`.

  Returns:
    Each [B] float32, over the P locations of an image that have an object:

    * class: the focal loss summed over all locations and classes, over max(P, 1);
    * box: the mean of 1 - GIoU, each location weighted by how central it is; 0 if P = 0;
    * centerness: the mean binary cross-entropy; 0 if P = 0.
  """
  where = [jax.lax.stop_gradient(outputs[name][0]) for name in ("points", "stride", "reach")]
  own, central = jax.vmap(lambda rows: assign(*where, rows, radius))(objects)
  positive = (own >= 0).astype(jnp.float32)
  count = jnp.maximum(positive.sum(axis=1), 1.0)
  rows = jnp.take_along_axis(objects, jnp.maximum(own, 0)[..., None], axis=1)

  logits = outputs["class"].astype(jnp.float32)
  truth = jax.nn.one_hot(rows[..., 4].astype(jnp.int32), logits.shape[-1]) * positive[..., None]
  focal = optax.losses.sigmoid_focal_loss(logits, truth, alpha=alpha, gamma=gamma)
  apart = (1 - giou(outputs["box"], rows[..., :4])) * central
  uncertain = optax.losses.sigmoid_binary_cross_entropy(
      outputs["centerness"].astype(jnp.float32), central) * positive
  return {"class": focal.sum(axis=(1, 2)) / count,
          "box": apart.sum(axis=1) / jnp.maximum(central.sum(axis=1), 1e-6),
          "centerness": uncertain.sum(axis=1) / count}


def detection(name: str, *, num_classes: int, stream: str | None = None, label: str = "objects",
              weight: float = 1.0, box_weight: float = 1.0, centerness_weight: float = 1.0,
              focal_alpha: float = 0.25, focal_gamma: float = 2.0, centre_radius: float = 1.5,
              max_detections: int = 100, score_threshold: float = 0.05, nms_iou: float = 0.6,
              candidates: int = 1000, per_class: bool = False) -> Task:
  """All objects of an image, learned without anchors: FCOS's losses, COCO's average precision.

  The outputs are a dict as the head `detection` gives: class [B, N, C] and centerness [B, N]
  logits and box [B, N, 4] at N locations, and what these are: points, stride and reach
  [1, N, 2]. Labels are [B, M, 5]: boxes (x1, y1, x2, y2) in fractions of the image and their
  class, -1 in rows without object. An image without objects counts: there is nothing to find.

  Metrics are mAP, over IoUs from 0.5 to 0.95, and mAP50, at 0.5; `detect` gives the detections.

  Args:
    name: of the task.
    num_classes: C.
    stream: whose images it reads; the task's name when left out.
    label: key of the labels in that stream.
    weight: constant factor of the loss before any balancing.
    box_weight: of the part for boxes beside that for classes.
    centerness_weight: of the part for centre-ness.
    focal_alpha: weight of positives in the focal loss.
    focal_gamma: exponent of the focal loss.
    centre_radius: how far from an object's centre its locations may lie, in cells.
    max_detections: detections an image in the metrics, of which 100 of a class count.
    score_threshold: of detections in the metrics.
    nms_iou: IoU above which two detections of one class are one.
    candidates: that enter non-maximum suppression, at most.
    per_class: whether there are metrics AP_0, AP_1, … too. Each keeps the detections of all
      evaluated images on the host, 24 bytes a detection; meant for few classes.

  >>> task = detection("things", num_classes=2)
  >>> outputs = {"class": jnp.zeros((1, 1, 2)), "box": jnp.array([[[0., 0., 1., .5]]]),
  ...            "centerness": jnp.zeros((1, 1)), "points": jnp.full((1, 1, 2), .5),
  ...            "stride": jnp.ones((1, 1, 2)), "reach": jnp.array([[[0., jnp.inf]]])}
  >>> whole = jnp.array([[[0., 0., 1., 1., 1.]]])
  >>> round(float(jax.jit(task.loss)(outputs, whole)[0]), 4)  # log(2) (1/16 + 3/16 + 1) + 1/2
  1.3664

  Reference:
    Tian, Shen, Chen, He: FCOS: Fully Convolutional One-Stage Object Detection. ICCV 2019,
    arXiv:1904.01355. Lin, Goyal, Girshick, He, Dollár: Focal Loss for Dense Object Detection.
    ICCV 2017, arXiv:1708.02002.

  Differences:
    The authors divide by the locations with an object in the whole batch, so that an image with
    many objects counts for more. A task's losses here are of one example each: every image counts
    the same, whatever it is batched with. The paper's box loss is the IoU; GIoU is from the
    authors' later code, as is `centre_radius`. Every object has a location here, see `assign`.
    `score_threshold` is on the final score, where the authors' is on the class's probability.
  """
  for argument, count in (("num_classes", num_classes), ("max_detections", max_detections),
                          ("candidates", candidates)):
    if count < 1:
      raise ValueError(f"{name}: {argument}: expected at least 1, found {count}")
  for argument, value in (("score_threshold", score_threshold), ("nms_iou", nms_iou),
                          ("focal_alpha", focal_alpha)):
    if not 0 <= value <= 1:
      raise ValueError(f"{name}: {argument}: expected a number from 0 to 1, found {value}")
  for argument, value in (("box_weight", box_weight), ("centerness_weight", centerness_weight),
                          ("focal_gamma", focal_gamma), ("centre_radius", centre_radius)):
    if not value >= 0:
      raise ValueError(f"{name}: {argument}: expected a number not below 0, found {value}")

  def loss(outputs: Mapping[str, jax.Array], labels: jax.Array) -> jax.Array:
    parts = detection_losses(outputs, labels, alpha=focal_alpha, gamma=focal_gamma,
                             radius=centre_radius)
    return (parts["class"] + box_weight * parts["box"]
            + centerness_weight * parts["centerness"])

  found = functools.partial(detect, max_detections=max_detections, nms_iou=nms_iou,
                            score_threshold=score_threshold, candidates=candidates)
  metrics = [AveragePrecision("mAP", num_classes, found),
             AveragePrecision("mAP50", num_classes, found, ious=(0.5,))]
  if per_class:
    metrics += [AveragePrecision(f"AP_{i}", num_classes, found, only=i)
                for i in range(num_classes)]
  return Task(name=name, stream=stream or name, label=label, loss=loss, num_outputs=num_classes,
              metrics=tuple(metrics), weight=weight)
