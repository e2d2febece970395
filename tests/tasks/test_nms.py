"""Detections against plain non-maximum suppression in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.tasks import detect


def iou(a, b):
  w = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
  h = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
  shared = w * h
  return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def plain_nms(scores, boxes, count, threshold, overlap, candidates):
  """Rows (box, score, class) of one image, the surest first, from scores [N, C]."""
  pairs = sorted(((s, n, c) for n, row in enumerate(scores) for c, s in enumerate(row)),
                 key=lambda pair: -pair[0])[:candidates]
  kept = []
  for score, n, c in pairs:
    if score > threshold and all(c != k or iou(boxes[n], boxes[m]) <= overlap
                                 for _, m, k in kept):
      kept.append((score, n, c))
  return [(*boxes[n], score, c) for score, n, c in kept[:count]]


def outputs_of(seed, batch=2, count=40, classes=3):
  rng = np.random.default_rng(seed)
  size = rng.uniform(0.1, 0.5, (batch, count, 2))
  low = rng.uniform(0, 1 - size)
  arrays = {"class": rng.normal(-1, 2, (batch, count, classes)),
            "centerness": rng.normal(1, 1, (batch, count)),
            "box": np.concatenate([low, low + size], -1)}
  return {name: x.astype(np.float32) for name, x in arrays.items()}


@pytest.mark.parametrize("settings", [
    {}, {"nms_iou": 0.3}, {"score_threshold": 0.5}, {"max_detections": 5},
    {"candidates": 20}, {"nms_iou": 0.0, "score_threshold": 0.0},
])
def test_against_plain_suppression(settings):
  found_by = jax.jit(functools.partial(detect, **{"max_detections": 30, **settings}))
  for seed in range(3):
    outputs = outputs_of(seed)
    boxes, scores, classes = map(np.asarray, found_by(outputs))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    expected_scores = np.sqrt(sigmoid(outputs["class"]) * sigmoid(outputs["centerness"])[..., None])
    for b in range(2):
      expected = plain_nms(expected_scores[b], outputs["box"][b],
                           settings.get("max_detections", 30),
                           settings.get("score_threshold", 0.05), settings.get("nms_iou", 0.6),
                           settings.get("candidates", 1000))
      found = np.concatenate([boxes[b], scores[b, :, None], classes[b, :, None]], -1)
      assert len(expected) > 2
      np.testing.assert_allclose(found[:len(expected)], expected, rtol=1e-5)
      np.testing.assert_array_equal(found[len(expected):, :5], 0)
      np.testing.assert_array_equal(found[len(expected):, 5], -1)


def test_classes_do_not_suppress_each_other():
  box = jnp.tile(jnp.array([0.1, 0.1, 0.5, 0.5]), (1, 2, 1))
  outputs = {"class": jnp.array([[[3.0, -9.0], [-9.0, 2.0]]]), "centerness": jnp.full((1, 2), 5.0),
             "box": box}
  assert jax.jit(detect)(outputs)[2][0, :3].tolist() == [0, 1, -1]


def test_boxes_end_at_the_image_and_what_is_not_finite_is_left_out():
  outputs = {"class": jnp.array([[[3.0], [4.0], [5.0]]]), "centerness": jnp.zeros((1, 3)),
             "box": jnp.array([[[-1, 0.5, 0.5, 2], [0, jnp.nan, 1, 1], [0, 0, jnp.inf, 0.4]]])}
  boxes, scores, classes = jax.jit(detect)(outputs)
  assert classes[0, :3].tolist() == [0, 0, -1]
  np.testing.assert_array_equal(boxes[0, :2], np.float32([[0, 0, 1, 0.4], [0, 0.5, 0.5, 1]]))


def test_half_precision_logits():
  outputs = {name: jnp.asarray(x, jnp.bfloat16) for name, x in outputs_of(0).items()}
  boxes, scores, classes = jax.eval_shape(detect, outputs)
  assert (boxes.shape, scores.shape, classes.shape) == ((2, 100, 4), (2, 100), (2, 100))
  assert (boxes.dtype, scores.dtype, classes.dtype) == (jnp.float32, jnp.float32, jnp.int32)
