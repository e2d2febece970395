"""Regression against values computed by hand and by scikit-learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from mtl_jax import tasks


def values_of(task, outputs, labels):
  batch = {task.stream: {task.label: np.asarray(labels, np.float32)}}
  outputs = {task.name: np.asarray(outputs, np.float32)}
  states = jax.jit(lambda outputs, batch: tasks.task_metrics((task,), outputs, batch))
  return tasks.compute_metrics((task,), states(outputs, batch))


@pytest.mark.parametrize("loss, delta, expected", [
    ("mse", 1.0, [0.25, 9.0]),
    ("l1", 1.0, [0.5, 3.0]),
    ("huber", 1.0, [0.125, 2.5]),  # half the square, and from delta on delta (e - delta / 2)
    ("huber", 2.0, [0.125, 4.0]),
])
def test_losses_by_hand_in_scaled_units(loss, delta, expected):
  task = tasks.regression("t", size=1, loss=loss, delta=delta, mean=100.0, std=10.0)
  # targets are 1 and -2
  found = task.loss(jnp.array([[1.5], [1.0]]), jnp.array([110.0, 80.0]))
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_partly_missing_label_counts_for_its_other_parts():
  task = tasks.regression("t", size=2, scale_targets=False)
  labels = jnp.array([[1., jnp.nan], [0., 0.]])
  np.testing.assert_allclose(task.loss(jnp.array([[3., 9.], [1., 2.]]), labels), [4, 2.5])
  found = values_of(task, [[3, 9], [1, 2]], labels)
  np.testing.assert_allclose(found["t/mae"], (2 + 1 + 2) / 3)
  np.testing.assert_allclose(found["t/rmse"], np.sqrt((4 + 1 + 4) / 3))


def test_metrics_are_in_the_labels_unit():
  task = tasks.regression("t", size=1, mean=100.0, std=10.0, unit="years")
  found = values_of(task, [[0.0], [1.0]], [103.0, 114.0])  # predictions are 100 and 110
  np.testing.assert_allclose([found["t/mae"], found["t/rmse"]], [3.5, np.sqrt(12.5)], rtol=1e-5)
  np.testing.assert_allclose(found["t/r2"], 1 - 25 / (2 * 5.5 ** 2), rtol=1e-5)


@pytest.mark.parametrize("scaling", [{"scale_targets": False}, {"mean": 9e3, "std": 30.0}])
@pytest.mark.parametrize("sizes", [
    pytest.param((1,) * 40, marks=pytest.mark.slow), (7, 0, 93, 0, 900)])
def test_r2_far_from_zero_is_that_of_scikit_learn_over_any_split(scaling, sizes):
  rng = np.random.default_rng(len(sizes))
  labels = rng.normal(1e4, 1.0, sum(sizes)).astype(np.float32)
  predicted = (labels + rng.normal(0, 0.5, sum(sizes))).astype(np.float32)
  task = tasks.regression("t", size=1, **scaling)
  outputs = ((predicted.astype(np.float64) - scaling.get("mean", 0)) / scaling.get("std", 1)
             ).astype(np.float32)[:, None]
  metric = task.metrics[2]
  longest = max(sizes)
  states = []
  for at, size in zip(np.cumsum((0, *sizes)), sizes):
    chosen = np.arange(at, at + longest) % sum(sizes)
    states.append(update(metric, outputs[chosen], labels[chosen], np.arange(longest) < size))
  found = metric.compute(functools.reduce(jax.jit(metric.merge), states))
  np.testing.assert_allclose(found, sklearn_metrics.r2_score(labels, predicted), atol=2e-4)


def update(metric, outputs, labels, mask):
  return jax.jit(metric.update)(jnp.asarray(outputs), jnp.asarray(labels), jnp.asarray(mask))


def test_r2_keeps_its_precision_over_many_merges():
  rng = np.random.default_rng(0)
  labels = rng.normal(1e4, 1.0, (2000, 8)).astype(np.float32)
  errors = rng.normal(0, 0.5, (2000, 8)).astype(np.float32)
  metric = tasks.regression("t", size=1, scale_targets=False).metrics[2]
  states = jax.jit(jax.vmap(metric.update))(jnp.asarray(labels + errors)[..., None], labels,
                                            np.ones_like(labels, bool))
  first = jax.tree.map(lambda x: x[0], states)
  rest = jax.tree.map(lambda x: x[1:], states)
  total, _ = jax.jit(lambda a, b: jax.lax.scan(lambda s, x: (metric.merge(s, x), None), a, b))(
      first, rest)
  expected = sklearn_metrics.r2_score(labels.reshape(-1), (labels + errors).reshape(-1))
  np.testing.assert_allclose(metric.compute(total), expected, atol=1e-5)


def test_r2_of_several_columns_is_their_mean():
  rng = np.random.default_rng(1)
  labels = rng.normal(size=(60, 3)) * [1, 10, 100]
  outputs = labels + rng.normal(size=(60, 3)) * [0.1, 5, 90]
  found = values_of(tasks.regression("t", size=3, scale_targets=False), outputs, labels)["t/r2"]
  np.testing.assert_allclose(found, sklearn_metrics.r2_score(labels, outputs), rtol=1e-5)


def test_r2_of_labels_that_do_not_vary_is_nan():
  assert np.isnan(values_of(tasks.regression("t", size=1, scale_targets=False),
                            [[1.], [2.]], [3., 3.])["t/r2"])


@pytest.mark.parametrize("period", [360.0, 2 * np.pi])
def test_angles_are_measured_the_short_way_round(period):
  task = tasks.regression("t", size=1, period=period)
  assert task.num_outputs == 2 and [m.name for m in task.metrics] == ["mae"]
  predicted, labels = np.array([359., 10., 180., 90.]), np.array([1., 350., -180., 720. + 90])
  turns = predicted / 360 * 2 * np.pi
  outputs = 3 * np.stack([np.sin(turns), np.cos(turns)], axis=1)  # any length
  found = values_of(task, outputs, labels / 360 * period)["t/mae"]
  np.testing.assert_allclose(found, (2 + 20 + 0 + 0) / 4 / 360 * period, rtol=1e-4)


def test_the_loss_of_angles_compares_sine_and_cosine():
  task = tasks.regression("t", size=2, period=360.0)
  outputs = jnp.array([[0., 1., 0., 1.], [0., 1., 9., 9.]])  # 0° and 0°
  found = task.loss(outputs, jnp.array([[0., 90.], [180., jnp.nan]]))
  np.testing.assert_allclose(found, [(0 + 0 + 1 + 1) / 4, (0 + 4) / 2], atol=1e-6)


def test_a_wrong_size_is_refused():
  with pytest.raises(ValueError, match="task t: size: expected that of its labels, 2, found 3"):
    values_of(tasks.regression("t", size=3, scale_targets=False), np.zeros((1, 3)), [[1., 2.]])
