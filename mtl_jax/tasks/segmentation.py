"""Semantic segmentation: a class a pixel."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mtl_jax.tasks import arguments
from mtl_jax.tasks.class_counts import class_counts, mean_iou
from mtl_jax.tasks.classification import cross_entropy, is_correct
from mtl_jax.tasks.metrics import CountMetric, MeanMetric
from mtl_jax.tasks.parts import filled, mean_of_parts, present
from mtl_jax.tasks.task import Task


def segmentation(name: str, *, num_classes: int, class_weights: Sequence[float] | None = None,
                 stream: str | None = None, label: str = "mask", weight: float = 1.0) -> Task:
  """One of `num_classes` classes a pixel: cross-entropy; mean IoU, pixel accuracy.

  The head gives logits [B, H, W, num_classes] at the labels' resolution. Labels are int32
  [B, H, W], each pixel missing on its own where -1. An example's loss is the mean over the pixels
  it has. `miou` is the mean over classes of intersection over union, both counted over all
  evaluated pixels; a class that is neither predicted nor a label is left out.

  Args:
    name: of the task.
    num_classes: labels are 0 … num_classes - 1, or -1 where missing.
    class_weights: one factor a class, of the loss of its pixels; the mean over pixels stays plain.
    stream: whose images it reads; the task's name when left out.
    label: key of the labels in that stream.
    weight: constant factor of the loss before any balancing.

  Raises:
    ValueError: for fewer than two classes, or weights that cannot be.

  >>> task = segmentation("scene", num_classes=2)
  >>> logits = jnp.array([[[[0., 0.], [9., 0.]]]])
  >>> [round(float(x), 4) for x in task.loss(logits, jnp.array([[[1, -1]]]))]  # log 2
  [0.6931]

  Differences:
    LibMTL counts over all pixels as here, but a class that appears nowhere makes its mean IoU NaN.
    MTAN takes the mean IoU and pixel accuracy of each image, over the classes in it, then the mean
    over images, then over batches, whatever their size. Both take the loss over a batch's pixels,
    so that images with more labelled pixels weigh more; here every image weighs the same.
  """
  arguments.check(name, "num_classes", num_classes >= 2, "at least 2", num_classes)
  weights = None if class_weights is None else arguments.numbers(
      name, "class_weights", class_weights, num_classes, least=0)

  def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    if logits.shape != (*labels.shape, num_classes):
      raise ValueError(f"task {name}: expected outputs {[*labels.shape, num_classes]} for its "
                       f"labels {list(labels.shape)}, found {list(logits.shape)}")
    return mean_of_parts(cross_entropy(logits, filled(labels), weights), present(labels))

  def counts(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    there = mask[:, None, None] & present(labels)
    return class_counts(jnp.argmax(logits, axis=-1), labels, there, num_classes)

  metrics = (CountMetric("miou", counts, mean_iou, "fraction", higher_is_better=True),
             MeanMetric("pixel_accuracy", is_correct, "fraction", True, present))
  return Task(name=name, stream=stream or name, label=label, loss=loss, num_outputs=num_classes,
              metrics=metrics, weight=weight, partial=True)
