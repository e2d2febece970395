"""Box arithmetic against values computed by hand, and its properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.tasks import box_geometry

MEASURES = {"iou": box_geometry.iou, "giou": box_geometry.giou, "diou": box_geometry.diou}


def random_boxes(seed, *shape):
  points = np.random.default_rng(seed).uniform(size=(*shape, 2, 2))
  return jnp.asarray(np.sort(points, axis=-2).reshape(*shape, 4), jnp.float32)


# a, b, and IoU, GIoU, DIoU by hand from areas of intersection, union and enclosing box.
@pytest.mark.parametrize("a, b, expected", [
    ([0, 0, 2, 2], [1, 1, 3, 3], (1 / 7, 1 / 7 - 2 / 9, 1 / 7 - 2 / 18)),
    ([0, 0, 1, 1], [2, 0, 3, 1], (0, -1 / 3, -4 / 10)),  # apart
    ([0, 0, 4, 4], [1, 1, 3, 3], (4 / 16, 4 / 16, 4 / 16)),  # one inside the other, one centre
    ([0, 0, 1, 1], [1, 0, 2, 1], (0, 0, -1 / 5)),  # an edge in common
    ([0, 0, 1, 2], [0, 0, 1, 2], (1, 1, 1)),
    ([1, 1, 1, 1], [1, 1, 1, 1], (0, 0, 0)),  # a point twice
    ([1, 1, 1, 1], [0, 0, 2, 2], (0, 0, 0)),  # a point in a box's middle
])
def test_measures_by_hand(a, b, expected):
  a, b = jnp.array(a, jnp.float32), jnp.array(b, jnp.float32)
  for measure, value in zip(MEASURES.values(), expected):
    np.testing.assert_allclose(measure(a, b), value, atol=1e-6)


@pytest.mark.parametrize("name", MEASURES)
def test_measures_are_symmetric_bounded_and_one_for_equal_boxes(name):
  a, b = random_boxes(0, 200), random_boxes(1, 200)
  values = MEASURES[name](a, b)
  np.testing.assert_allclose(values, MEASURES[name](b, a), atol=1e-6)
  assert (values <= 1).all() and (values > (-1 if name != "iou" else -1e-9)).all()
  assert (values <= MEASURES["iou"](a, b) + 1e-6).all()
  np.testing.assert_allclose(MEASURES[name](a, a), 1, atol=1e-5)


@pytest.mark.parametrize("name", ["iou", "giou"])
def test_fractions_and_pixels_agree(name):
  a, b = random_boxes(2, 50), random_boxes(3, 50)
  size = jnp.array([[640., 480., 640., 480.]])
  np.testing.assert_allclose(MEASURES[name](a * size, b * size), MEASURES[name](a, b), atol=1e-4)


def test_pairwise_is_each_with_each():
  a, b = random_boxes(4, 2, 3), random_boxes(5, 2, 5)
  found = box_geometry.pairwise_iou(a, b)
  assert found.shape == (2, 3, 5)
  np.testing.assert_allclose(found[1, 2, 4], box_geometry.iou(a[1, 2], b[1, 4]), atol=1e-7)


def test_corners_and_centre_size_undo_each_other():
  boxes = random_boxes(6, 20)
  np.testing.assert_allclose(box_geometry.corners(box_geometry.centre_size(boxes)), boxes,
                             atol=1e-6)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("a", [[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 1, 1], [0, 0, 1, 1]])
@pytest.mark.parametrize("b", [[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]])
def test_degenerate_boxes_have_finite_values_and_gradients(name, a, b):
  a, b = jnp.array(a, jnp.float32), jnp.array(b, jnp.float32)
  value, gradients = jax.value_and_grad(MEASURES[name], argnums=(0, 1))(a, b)
  assert -1 <= value <= 1
  assert jnp.isfinite(jnp.stack(gradients)).all()


@pytest.mark.parametrize("name", ["giou", "diou"])
def test_boxes_apart_are_drawn_together(name):
  a, b = jnp.array([0., 0., 1., 1.]), jnp.array([3., 0., 4., 1.])
  towards = jax.grad(MEASURES[name])(a, b)
  assert MEASURES[name](a + 0.1 * towards, b) > MEASURES[name](a, b)
  assert (jax.grad(MEASURES["iou"])(a, b) == 0).all()


def test_low_precision_boxes_are_measured_in_float32():
  a = jnp.array([0, 0, 2, 2], jnp.bfloat16)
  for measure in MEASURES.values():
    assert measure(a, a).dtype == jnp.float32
  assert box_geometry.area(a).dtype == jnp.float32
