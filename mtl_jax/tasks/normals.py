"""Surface normals: a direction a pixel."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.tasks.metrics import CountMetric, MeanMetric
from mtl_jax.tasks.parts import filled, mean_of_parts, outputs_like, present
from mtl_jax.tasks.task import Task

BINS_PER_DEGREE = 100
WITHIN = {"within_11.25": 11.25, "within_22.5": 22.5, "within_30": 30.0}


def normals(name: str, *, stream: str | None = None, label: str = "normals",
            weight: float = 1.0) -> Task:
  """A direction a pixel: 1 - cosine; mean and median angle, shares within 11.25°, 22.5° and 30°.

  The head gives [B, H, W, 3] at the labels' resolution, of any length: only directions count.
  (The loss divides by a length of at least 0.001, so that an output of 0 has a gradient.) Labels
  are float32 [B, H, W, 3], unit vectors, each pixel missing where NaN. An example's loss is the
  mean over the pixels it has, metrics are over all evaluated pixels. The median is read from
  counts of angles in steps of 0.01°, so it is exact to 0.005°.

  Together with `segmentation` (mIoU, pixel accuracy) and `depth` (absolute and relative error)
  these are the nine metrics of NYUv2.

  Args:
    name: of the task.
    stream: whose images it reads; the task's name when left out.
    label: key of the labels in that stream.
    weight: constant factor of the loss before any balancing.

  >>> task = normals("normals")
  >>> labels = jnp.array([[[[0., 0., 1.], [1., 0., 0.]]]])
  >>> task.loss(jnp.array([[[[0., 0., 5.], [0., 0., 1.]]]]), labels).tolist()
  [0.5]

  Reference:
    Liu, Johns, Davison: End-to-End Multi-Task Learning with Attention. CVPR 2019, arXiv:1803.10704.

  Differences:
    MTAN and LibMTL take the loss over a batch's pixels, so that images with more labelled pixels
    weigh more; here every image weighs the same. MTAN's metrics are the mean of the batches'.
    Their arccosine rounds angles below 0.02° in float32; here angles are from the chords.
  """
  def loss(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    predicted = _unit(outputs_like(name, outputs, labels), least=1e-3)
    return mean_of_parts(1 - (predicted * _unit(filled(labels))).sum(axis=-1), pixels(labels))

  def counts(outputs: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    num_bins = 180 * BINS_PER_DEGREE
    bins = (angles(outputs, labels) * BINS_PER_DEGREE).astype(jnp.int32)
    there = mask[:, None, None] & pixels(labels)
    indices = jnp.where(there, jnp.minimum(bins, num_bins - 1), num_bins).reshape(-1)
    return {"angles": jnp.zeros(num_bins, jnp.int32).at[indices].add(1, mode="drop")}

  metrics = [MeanMetric("mean_angle", angles, "°", False, pixels),
             CountMetric("median_angle", counts, _median, "°", higher_is_better=False)]
  for each, most in WITHIN.items():
    metrics.append(MeanMetric(each, lambda o, y, most=most: angles(o, y) < most, "fraction", True,
                              pixels))
  return Task(name=name, stream=stream or name, label=label, loss=loss, num_outputs=3,
              metrics=tuple(metrics), weight=weight, partial=True)


def pixels(labels: jax.Array) -> jax.Array:
  """Which pixels have a normal: [B, H, W, 3] -> bool [B, H, W]."""
  return present(labels).all(axis=-1)


def angles(outputs: jax.Array, labels: jax.Array) -> jax.Array:
  """Angles between directions [..., 3], in degrees, [...]; 90 for an output without direction.

  >>> up, right = jnp.array([0., 0., 1.]), jnp.array([2., 0., 0.])
  >>> [round(float(angles(x, up)), 3) for x in (up, right, -up, jnp.zeros(3))]
  [0.0, 90.0, 180.0, 90.0]
  """
  a, b = _unit(outputs.astype(jnp.float32)), _unit(filled(labels))
  length = lambda vectors: jnp.sqrt((vectors ** 2).sum(axis=-1))
  return jnp.degrees(2 * jnp.arctan2(length(a - b), length(a + b)))


def _unit(vectors: jax.Array, least: float = 1e-15) -> jax.Array:
  """Vectors over their length, or over `least` where that is more, which bounds gradients."""
  squares = (vectors ** 2).sum(axis=-1, keepdims=True)
  return vectors * jax.lax.rsqrt(jnp.maximum(squares, least ** 2))


def _median(counts: Mapping[str, np.ndarray]) -> float:
  """The middle of the bin of the middle angle, or the mean of two such."""
  until = np.cumsum(counts["angles"])
  total = int(until[-1])
  if not total:
    return float("nan")
  middle = [(total - 1) // 2, total // 2]
  bins = np.searchsorted(until, middle, side="right")
  return float((bins + 0.5).mean() / BINS_PER_DEGREE)
