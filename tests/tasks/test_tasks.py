"""Losses and metrics against hand-computed values."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import tasks

TASK = tasks.classification("t", num_classes=3, stream="s", label="y")


def states(logits, labels):
  return tasks.task_metrics((TASK,), {"t": jnp.asarray(logits, jnp.float32)},
                            {"s": {"y": jnp.asarray(labels, jnp.int32)}})


def test_cross_entropy_by_hand():
  logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
  np.testing.assert_allclose(TASK.loss(logits, jnp.array([0, 1])), [np.log(2), np.log(10)],
                             rtol=1e-6)


def test_missing_labels_count_for_nothing():
  found = tasks.compute_metrics((TASK,), states([[9, 0, 0], [0, 9, 0], [0, 0, 9]], [0, 0, -1]))
  assert found["t/accuracy"] == 0.5
  np.testing.assert_allclose(found["t/loss"], (np.log1p(2 * np.exp(-9)) * 2 + 9) / 2, rtol=1e-5)


def test_no_label_at_all_is_nan_never_zero():
  found = tasks.compute_metrics((TASK,), states([[9, 0, 0]], [-1]))
  assert np.isnan(found["t/accuracy"]) and np.isnan(found["t/loss"])


def test_accuracy_is_exact_over_any_split():
  rng = np.random.default_rng(0)
  logits, labels = rng.normal(size=(101, 3)), rng.integers(-1, 3, 101)
  whole = tasks.compute_metrics((TASK,), states(logits, labels))["t/accuracy"]
  for cuts in ([50], [1, 2, 3], [10, 90]):
    parts = [states(a, b) for a, b in zip(np.split(logits, cuts), np.split(labels, cuts))]
    total = parts[0]
    for part in parts[1:]:
      total = tasks.merge_metrics((TASK,), total, part)
    assert tasks.compute_metrics((TASK,), total)["t/accuracy"] == whole
  present = labels >= 0
  assert whole == (logits.argmax(1) == labels)[present].sum() / present.sum()


def test_metrics_know_unit_and_direction():
  loss, accuracy = TASK.all_metrics[:2]
  assert (loss.higher_is_better, accuracy.higher_is_better) == (False, True)
  assert accuracy.unit == "fraction"


def test_bfloat16_logits_give_a_float32_loss():
  values = TASK.loss(jnp.zeros((2, 3), jnp.bfloat16), jnp.array([0, 1]))
  assert values.dtype == jnp.float32
  np.testing.assert_allclose(values, np.log(3), rtol=1e-6)


@pytest.mark.parametrize("kwargs, message", [
    ({"num_classes": 1}, "t: num_classes: expected at least 2, found 1"),
    ({"num_classes": 3, "weight": 0.0}, "t: weight: expected a number > 0, found 0.0"),
])
def test_bad_arguments(kwargs, message):
  with pytest.raises(ValueError, match=message):
    tasks.classification("t", **kwargs)
