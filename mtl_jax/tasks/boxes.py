"""One box an image: where the one object is."""

import jax
import jax.numpy as jnp

from mtl_jax.tasks import arguments
from mtl_jax.tasks.box_geometry import corners, diou, giou, iou
from mtl_jax.tasks.metrics import MeanMetric
from mtl_jax.tasks.parts import outputs_like
from mtl_jax.tasks.task import Task

LOSSES = {
    "iou": lambda boxes, labels: 1 - iou(boxes, labels),
    "giou": lambda boxes, labels: 1 - giou(boxes, labels),
    "diou": lambda boxes, labels: 1 - diou(boxes, labels),
    "l1": lambda boxes, labels: jnp.abs(boxes - labels).mean(axis=-1),
}


def boxes(name: str, *, loss: str = "giou", stream: str | None = None, label: str = "box",
          weight: float = 1.0) -> Task:
  """One box an image: mean IoU, and how many boxes hit with an IoU of at least 0.5 and 0.75.

  The head gives [B, 4]; the sigmoids of these are the box's centre and size (cx, cy, w, h) as
  fractions of width and height, so that every output is a box with a width and a height. Labels
  are float32 [B, 4], (x1, y1, x2, y2) as fractions, NaN where missing.

  Args:
    name: of the task.
    loss: 1 - "iou", which has no gradient where boxes are apart, 1 - "giou", 1 - "diou" (see
      `box_geometry`), or "l1", the mean absolute error of the four corners' coordinates.
    stream: whose images it reads; the task's name when left out.
    label: key of the labels in that stream.
    weight: constant factor of the loss before any balancing.

  Raises:
    ValueError: for an unknown loss.

  >>> task = boxes("plate", loss="iou")  # outputs of 0 are the box 0.25, 0.25, 0.75, 0.75
  >>> task.loss(jnp.zeros((1, 4)), jnp.array([[0., 0., 1., 1.]])).tolist()
  [0.75]
  """
  arguments.check_choice(name, "loss", loss, tuple(LOSSES))

  def predicted(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return corners(jax.nn.sigmoid(outputs_like(name, outputs, labels)))

  def losses(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return LOSSES[loss](predicted(outputs, labels), labels)

  def overlap(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return iou(predicted(outputs, labels), labels)

  metrics = (
      MeanMetric("iou", overlap, "fraction", higher_is_better=True),
      MeanMetric("hit_rate_50", lambda o, y: overlap(o, y) >= 0.5, "fraction", True),
      MeanMetric("hit_rate_75", lambda o, y: overlap(o, y) >= 0.75, "fraction", True),
  )
  return Task(name=name, stream=stream or name, label=label, loss=losses, num_outputs=4,
              metrics=metrics, weight=weight)
