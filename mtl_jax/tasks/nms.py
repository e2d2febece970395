"""From a detector's outputs to its detections, in fixed shapes on the device."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mtl_jax.tasks.box_geometry import iou


def detect(outputs: Mapping[str, jax.Array], *, max_detections: int = 100,
           score_threshold: float = 0.05, nms_iou: float = 0.6,
           candidates: int = 1000) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The objects that a detector finds, the surest first.

  The score of a class at a location is the geometric mean of its probability and the centre-ness.
  The best candidates go through greedy non-maximum suppression, each class on its own: the best
  one is kept, those of its class that overlap it by more than `nms_iou` go, and so on.

  Args:
    outputs: of the head: class [B, N, C] and centerness [B, N] logits, box [B, N, 4] fractions.
    max_detections: K, detections an image.
    score_threshold: a detection's score is above it.
    nms_iou: IoU above which two boxes of one class are the same object.
    candidates: pairs of location and class that enter the suppression, at most.

  Returns:
    boxes [B, K, 4] float32, cut to the image; scores [B, K] float32; classes [B, K] int32. Where
    there are fewer than K, the rest has boxes and scores 0 and class -1.

  >>> logit = jnp.array([[2., -9.], [1., -9.], [-9., 0.]])
  >>> outputs = {"class": logit[None], "centerness": jnp.full((1, 3), 9.),
  ...            "box": jnp.array([[[0., 0., .5, .5], [0., 0., .5, .6], [0., 0., .5, .5]]])}
  >>> boxes, scores, classes = jax.jit(detect)(outputs)
  >>> classes[0, :3].tolist(), [round(float(score), 2) for score in scores[0, :3]]
  ([0, 1, -1], [0.94, 0.71, 0.0])
  """
  logits = outputs["class"].astype(jnp.float32)
  centerness = outputs["centerness"].astype(jnp.float32)[..., None]
  scores = jnp.exp((jax.nn.log_sigmoid(logits) + jax.nn.log_sigmoid(centerness)) / 2)
  boxes = jnp.clip(outputs["box"].astype(jnp.float32), 0.0, 1.0)
  keep = jax.vmap(lambda s, b: _keep(s, b, max_detections, score_threshold, nms_iou, candidates))
  return keep(scores, boxes)


def _keep(scores: jax.Array, boxes: jax.Array, max_detections: int, score_threshold: float,
          nms_iou: float, candidates: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Detections of one image from scores [N, C] and boxes [N, 4]."""
  num_classes = scores.shape[1]
  best, index = jax.lax.top_k(scores.ravel(), min(candidates, scores.size))
  boxes = boxes[index // num_classes]
  classes = (index % num_classes).astype(jnp.int32)
  # A box that is not finite would overlap none and match any.
  left = jnp.where((best > score_threshold) & jnp.isfinite(boxes).all(axis=-1), best, 0.0)

  def take(left, _):
    i = jnp.argmax(left)
    found = left[i] > 0
    same = (classes == classes[i]) & (iou(boxes, boxes[i][None]) > nms_iou)
    taken = jnp.where(found, boxes[i], 0.0), left[i], jnp.where(found, classes[i], -1)
    return jnp.where(same, 0.0, left).at[i].set(0.0), taken

  return jax.lax.scan(take, left, length=max_detections)[1]
