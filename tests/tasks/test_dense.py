"""Segmentation, depth, normals and reconstruction against values computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import tasks


def values_of(task, outputs, labels):
  batch = {task.stream: {task.label: np.asarray(labels)}}
  outputs = {task.name: np.asarray(outputs, np.float32)}
  states = jax.jit(lambda outputs, batch: tasks.task_metrics((task,), outputs, batch))
  return tasks.compute_metrics((task,), states(outputs, batch))


def loss_of(task, outputs, labels):
  return jax.jit(task.loss)(jnp.asarray(outputs, jnp.float32), jnp.asarray(labels))


# Two images of four pixels and four classes, of which the last is nowhere.
MASKS = np.array([[[0, 0, 1, 1]], [[2, -1, -1, 0]]], np.int32)
PREDICTED = np.array([[[0, 1, 1, 1]], [[0, 2, 3, 0]]])


def test_mean_iou_and_pixel_accuracy_by_hand():
  task = tasks.segmentation("t", num_classes=4)
  found = values_of(task, np.eye(4)[PREDICTED], MASKS)
  # intersections 2, 2, 0 and unions 4, 3, 1; what is predicted without a label does not count
  np.testing.assert_allclose(found["t/miou"], (2 / 4 + 2 / 3 + 0) / 3)
  np.testing.assert_allclose(found["t/pixel_accuracy"], 4 / 6)


def test_mean_iou_is_that_of_scikit_learn():
  from sklearn.metrics import jaccard_score
  rng = np.random.default_rng(0)
  labels, predicted = rng.integers(-1, 5, (3, 8, 8)), rng.integers(0, 5, (3, 8, 8))
  found = values_of(tasks.segmentation("t", num_classes=6), np.eye(6)[predicted],
                    labels.astype(np.int32))["t/miou"]
  there = labels >= 0
  np.testing.assert_allclose(found, jaccard_score(labels[there], predicted[there], average="macro"))


def test_the_loss_of_a_mask_is_the_mean_over_its_labelled_pixels():
  task = tasks.segmentation("t", num_classes=2, class_weights=(1, 3))
  logits = np.zeros((3, 1, 2, 2))
  logits[1, 0, 1] = [9, 0]  # without a label
  labels = np.array([[[0, 1]], [[1, -1]], [[-1, -1]]], np.int32)
  np.testing.assert_allclose(loss_of(task, logits, labels),
                             [(1 + 3) / 2 * np.log(2), 3 * np.log(2), 0], rtol=1e-6)


def test_every_image_weighs_the_same_in_the_loss_of_a_batch():
  task = tasks.depth("t", label="y")
  labels = jnp.array([[[1., 1., 1., 1.]], [[1., jnp.nan, jnp.nan, jnp.nan]],
                      [[jnp.nan] * 4]])
  outputs = jnp.stack([jnp.full((1, 4, 1), x) for x in (2., 4., 9.)])
  losses, active = tasks.task_losses((task,), {"t": outputs}, {"t": {"y": labels}})
  assert active.all()
  np.testing.assert_allclose(losses, (1 + 3) / 2)


def test_depth_errors_by_hand():
  labels = np.array([[[2., 4., np.nan]], [[10., np.nan, 0.]]], np.float32)
  outputs = np.array([[[3., 2., 5.]], [[10., 1., 1.]]])[..., None]
  found = values_of(tasks.depth("t"), outputs, labels)
  np.testing.assert_allclose(found["t/absolute_error"], (1 + 2 + 0 + 1) / 4)
  np.testing.assert_allclose(found["t/relative_error"], (1 / 2 + 2 / 4 + 0) / 3)  # not of a depth 0
  np.testing.assert_allclose(found["t/rmse"], np.sqrt((1 + 4 + 0 + 1) / 4))


def at_angles(degrees):
  """Unit vectors at these angles from (0, 0, 1), and that one as label: [1, 1, N, 3] each."""
  turns = np.radians(np.asarray(degrees, np.float64))
  vectors = np.stack([np.sin(turns), np.zeros_like(turns), np.cos(turns)], axis=-1)
  labels = np.broadcast_to(np.array([0., 0., 1.], np.float32), vectors.shape)
  return vectors[None, None], labels[None, None]


def test_normals_by_hand():
  outputs, labels = at_angles([0, 10, 20, 25, 90])
  found = values_of(tasks.normals("t"), 7 * outputs, labels)
  np.testing.assert_allclose(found["t/mean_angle"], 29, rtol=1e-5)
  np.testing.assert_allclose(found["t/median_angle"], 20, atol=0.0051)
  shares = [found[f"t/within_{degrees}"] for degrees in ("11.25", "22.5", "30")]
  np.testing.assert_allclose(shares, [2 / 5, 3 / 5, 4 / 5])
  expected = 1 - np.cos(np.radians([0, 10, 20, 25, 90])).mean()
  np.testing.assert_allclose(loss_of(tasks.normals("t"), 7 * outputs, labels), [expected],
                             rtol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 1000])
def test_the_median_angle_is_exact_to_its_resolution(n):
  degrees = np.random.default_rng(n).uniform(0, 180, n)
  found = values_of(tasks.normals("t"), *at_angles(degrees))["t/median_angle"]
  np.testing.assert_allclose(found, np.median(degrees), atol=0.0051)


def test_small_angles_are_precise():
  found = values_of(tasks.normals("t"), *at_angles([0.001, 0.01]))["t/mean_angle"]
  np.testing.assert_allclose(found, 0.0055, rtol=1e-3)


def test_an_output_without_direction_is_off_by_a_right_angle_and_has_a_gradient():
  task, (_, labels) = tasks.normals("t"), at_angles([0])
  outputs = jnp.zeros((1, 1, 1, 3))
  assert values_of(task, outputs, labels)["t/mean_angle"] == 90
  loss, gradient = jax.value_and_grad(lambda o: loss_of(task, o, labels).sum())(outputs)
  assert loss == 1
  np.testing.assert_allclose(gradient[0, 0, 0], [0, 0, -1000], rtol=1e-5)


@pytest.mark.parametrize("loss, expected", [("mse", 2.0), ("l1", 4 / 3)])
def test_reconstruction_losses_by_hand(loss, expected):
  task = tasks.reconstruction("t", num_channels=2, loss=loss, label="y")
  labels = np.array([[[[1., 2.], [np.nan, 4.]]]], np.float32)
  found = loss_of(task, np.array([[[[2., 2. + 1], [9., 6.]]]]), labels)
  np.testing.assert_allclose(found, [expected])


def test_psnr_is_that_of_the_image_before_it_was_normalised():
  rng = np.random.default_rng(0)
  image, restored = rng.uniform(size=(2, 3, 4, 4, 3))
  mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.25, 0.3])
  task = tasks.reconstruction("t", num_channels=3, value_range=tuple(1 / std))
  found = values_of(task, (restored - mean) / std, ((image - mean) / std).astype(np.float32))
  each = -10 * np.log10(((image - restored) ** 2).mean(axis=(1, 2, 3)))
  np.testing.assert_allclose(found["t/psnr"], each.mean(), rtol=1e-5)


def test_psnr_without_error_is_finite():
  task = tasks.reconstruction("t", num_channels=1, value_range=1.0, label="y")
  image = np.ones((1, 2, 2), np.float32)
  np.testing.assert_allclose(values_of(task, image, image)["t/psnr"], 138.47, atol=0.01)


def test_the_image_itself_is_a_label():
  task = tasks.reconstruction("t", num_channels=3, stream="s")
  image = jnp.ones((2, 4, 4, 3))
  batch = {"s": {"image": image, "present": jnp.array([True, False])}}
  losses, _ = tasks.task_losses((task,), {"t": image + 2}, batch)
  np.testing.assert_allclose(losses, 4)
