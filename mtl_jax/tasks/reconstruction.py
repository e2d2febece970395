"""Reconstruction: numbers a pixel, such as the image itself."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mtl_jax.tasks import arguments
from mtl_jax.tasks.metrics import MeanMetric
from mtl_jax.tasks.parts import filled, mean_of_parts, outputs_like, present
from mtl_jax.tasks.task import Task

LOSSES = {"mse": jnp.square, "l1": jnp.abs}
_LEAST = 2.0 ** -23  # of the range: float32 resolves no smaller error


def reconstruction(name: str, *, num_channels: int, loss: str = "mse",
                   value_range: Sequence[float] | float | None = None, stream: str | None = None,
                   label: str = "image", weight: float = 1.0) -> Task:
  """Numbers a pixel: squared or absolute error; mean squared error, PSNR.

  The head gives [B, H, W, num_channels] at the labels' resolution. Labels are float32
  [B, H, W, C], or [B, H, W] with one channel, each number missing on its own where NaN. An
  example's loss is the mean over the numbers it has, `mse` that over all evaluated numbers.
  `psnr` is each image's, -10 log10 of its mean squared error over `value_range`, then their mean,
  as restoration papers report it; an image without any error counts as 138 dB.

  Args:
    name: of the task.
    num_channels: C.
    loss: "mse" or "l1".
    value_range: greatest less least value that labels can have, one number a channel or one for
      all; without it there is no PSNR. A normalised image has the ranges 1 / std of its channels,
      with which the PSNR is that of the image before it was normalised.
    stream: whose images it reads; the task's name when left out.
    label: key of the labels in that stream; "image" is the stream's own image, normalised, and in
      training augmented, as the model sees it.
    weight: constant factor of the loss before any balancing.

  Raises:
    ValueError: for an unknown loss, or numbers that cannot be.

  >>> task = reconstruction("autoencoder", num_channels=1, label="photo")
  >>> task.loss(jnp.ones((1, 1, 3, 1)), jnp.array([[[1., 3., jnp.nan]]])).tolist()
  [2.0]
  """
  arguments.check(name, "num_channels", num_channels >= 1, "at least 1", num_channels)
  arguments.check_choice(name, "loss", loss, tuple(LOSSES))

  def error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return outputs_like(name, outputs, labels) - filled(labels).astype(jnp.float32)

  def losses(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return mean_of_parts(LOSSES[loss](error(outputs, labels)), present(labels))

  metrics = [MeanMetric("mse", lambda o, y: error(o, y) ** 2, "", False, present)]
  if value_range is not None:
    ranges = arguments.numbers(name, "value_range", value_range, num_channels, above=0)

    def decibels(outputs: jax.Array, labels: jax.Array) -> jax.Array:
      by_channel = (*labels.shape[:3], num_channels)
      relative = error(outputs, labels).reshape(by_channel) / ranges.reshape(1, 1, 1, -1)
      mean = mean_of_parts(relative ** 2, present(labels).reshape(by_channel))
      return -10 * jnp.log10(jnp.maximum(mean, _LEAST ** 2))

    metrics.append(MeanMetric("psnr", decibels, "dB", higher_is_better=True))
  return Task(name=name, stream=stream or name, label=label, loss=losses, num_outputs=num_channels,
              metrics=tuple(metrics), weight=weight, partial=True)
