"""Arithmetic of boxes (x1, y1, x2, y2): pure, broadcasting, with finite gradients everywhere.

All functions compute in float32. A box whose corners are out of order has no width or height, and
a quotient of nothing by nothing is 0 with a gradient of 0, so that degenerate boxes harm no sum.

IoU and GIoU are the same for boxes in pixels and in fractions of width and height; DIoU, which
measures distances, is so only for square images.
"""

import jax
import jax.numpy as jnp


def centre_size(boxes: jax.Array) -> jax.Array:
  """Corners as centre and size: (x1, y1, x2, y2) [..., 4] -> (cx, cy, w, h) [..., 4].

  >>> centre_size(jnp.array([0.25, 0., 0.75, 0.5])).tolist()
  [0.5, 0.25, 0.5, 0.5]
  """
  boxes = boxes.astype(jnp.float32)
  low, high = boxes[..., :2], boxes[..., 2:]
  return jnp.concatenate([(low + high) / 2, high - low], axis=-1)


def corners(boxes: jax.Array) -> jax.Array:
  """Centre and size as corners: (cx, cy, w, h) [..., 4] -> (x1, y1, x2, y2) [..., 4].

  >>> corners(jnp.array([0.5, 0.5, 1., 0.5])).tolist()
  [0.0, 0.25, 1.0, 0.75]
  """
  boxes = boxes.astype(jnp.float32)
  centre, half = boxes[..., :2], boxes[..., 2:] / 2
  return jnp.concatenate([centre - half, centre + half], axis=-1)


def area(boxes: jax.Array) -> jax.Array:
  """Areas of boxes [..., 4] -> [...]; 0 where corners are out of order.

  >>> area(jnp.array([[0., 0., 2., 3.], [1., 1., 0., 5.]])).tolist()
  [6.0, 0.0]
  """
  sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0).astype(jnp.float32)
  return sides[..., 0] * sides[..., 1]


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
  """Intersection over union of boxes [..., 4] that broadcast -> [...] in [0, 1].

  >>> round(float(iou(jnp.array([0., 0., 2., 2.]), jnp.array([1., 1., 3., 3.]))), 4)  # 1 / 7
  0.1429
  """
  shared, union = _overlap(a.astype(jnp.float32), b.astype(jnp.float32))
  return _quotient(shared, union)


def giou(a: jax.Array, b: jax.Array) -> jax.Array:
  """Generalised IoU of boxes [..., 4] that broadcast -> [...] in (-1, 1].

  IoU less the part of the smallest enclosing box that neither box covers, so that boxes apart have
  a gradient towards each other.

  >>> round(float(giou(jnp.array([0., 0., 2., 2.]), jnp.array([1., 1., 3., 3.]))), 4)  # 1/7 - 2/9
  -0.0794

  Reference:
    Rezatofighi, Tsoi, Gwak, Sadeghian, Reid, Savarese: Generalized Intersection over Union: A
    Metric and A Loss for Bounding Box Regression. CVPR 2019, arXiv:1902.09630.
  """
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  shared, union = _overlap(a, b)
  around = area(_enclosing(a, b))
  return _quotient(shared, union) - _quotient(around - union, around)


def diou(a: jax.Array, b: jax.Array) -> jax.Array:
  """Distance IoU of boxes [..., 4] that broadcast -> [...] in (-1, 1].

  IoU less the squared distance of the centres over the squared diagonal of the smallest enclosing
  box. For boxes in fractions of a width and a height that differ, the distances are those of the
  image stretched to a square.

  >>> round(float(diou(jnp.array([0., 0., 2., 2.]), jnp.array([1., 1., 3., 3.]))), 4)  # 1/7 - 2/18
  0.0317

  Reference:
    Zheng, Wang, Liu, Li, Ye, Ren: Distance-IoU Loss: Faster and Better Learning for Bounding Box
    Regression. AAAI 2020, arXiv:1911.08287.
  """
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  shared, union = _overlap(a, b)
  around = _enclosing(a, b)
  apart = centre_size(a)[..., :2] - centre_size(b)[..., :2]
  diagonal = around[..., 2:] - around[..., :2]
  distance = _quotient((apart ** 2).sum(axis=-1), (diagonal ** 2).sum(axis=-1))
  return _quotient(shared, union) - distance


def pairwise_iou(a: jax.Array, b: jax.Array) -> jax.Array:
  """IoU of each of N boxes with each of M: [..., N, 4] and [..., M, 4] -> [..., N, M].

  >>> boxes = jnp.array([[0., 0., 1., 1.], [0., 0., 2., 1.], [5., 5., 6., 6.]])
  >>> pairwise_iou(boxes[:2], boxes).tolist()
  [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0]]
  """
  return iou(a[..., :, None, :], b[..., None, :, :])


def _overlap(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Areas of intersection and union."""
  shared = area(jnp.concatenate([jnp.maximum(a[..., :2], b[..., :2]),
                                 jnp.minimum(a[..., 2:], b[..., 2:])], axis=-1))
  return shared, area(a) + area(b) - shared


def _enclosing(a: jax.Array, b: jax.Array) -> jax.Array:
  """The smallest box around all corners, in whatever order those are."""
  low = lambda box: jnp.minimum(box[..., :2], box[..., 2:])
  high = lambda box: jnp.maximum(box[..., :2], box[..., 2:])
  return jnp.concatenate([jnp.minimum(low(a), low(b)), jnp.maximum(high(a), high(b))], axis=-1)


def _quotient(part: jax.Array, whole: jax.Array) -> jax.Array:
  there = whole > 0
  return jnp.where(there, part / jnp.where(there, whole, 1), 0)
