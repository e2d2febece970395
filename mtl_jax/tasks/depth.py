"""Depth: a distance a pixel."""

import math

import jax
import jax.numpy as jnp

from mtl_jax.tasks.metrics import MeanMetric
from mtl_jax.tasks.parts import filled, mean_of_parts, outputs_like, present
from mtl_jax.tasks.task import Task


def depth(name: str, *, unit: str = "", stream: str | None = None, label: str = "depth",
          weight: float = 1.0) -> Task:
  """A distance, or its inverse, a pixel: absolute error; absolute and relative error, RMSE.

  The head gives [B, H, W, 1] at the labels' resolution, in the labels' unit. Labels are float32
  [B, H, W], each pixel missing on its own where NaN; data sets write 0 for that, which readers
  turn into NaN. An example's loss is the mean over the pixels it has, metrics are means over all
  evaluated pixels; `relative_error` divides each error by its label and leaves out labels that
  are not above 0.

  Args:
    name: of the task.
    unit: of the labels, "m", as shown beside the absolute error and the RMSE.
    stream: whose images it reads; the task's name when left out.
    label: key of the labels in that stream.
    weight: constant factor of the loss before any balancing.

  >>> task = depth("depth", unit="m")
  >>> task.loss(jnp.ones((1, 1, 3, 1)), jnp.array([[[2., 4., jnp.nan]]])).tolist()
  [2.0]

  Differences:
    MTAN and LibMTL take the loss over a batch's pixels, so that images with more measured pixels
    weigh more; here every image weighs the same. Their metrics are the mean of the batches' means
    (LibMTL's weighted by pixels, hence the same as here).
  """
  def error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.abs(outputs_like(name, outputs, labels) - filled(labels))

  def loss(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return mean_of_parts(error(outputs, labels), present(labels))

  def relative(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return error(outputs, labels) / jnp.where(labels > 0, labels, 1)

  metrics = (
      MeanMetric("absolute_error", error, unit, False, present),
      MeanMetric("relative_error", relative, "", False, lambda labels: labels > 0),
      MeanMetric("rmse", lambda o, y: error(o, y) ** 2, unit, False, present, math.sqrt),
  )
  return Task(name=name, stream=stream or name, label=label, loss=loss, num_outputs=1,
              metrics=metrics, weight=weight, partial=True)
