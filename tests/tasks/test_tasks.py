"""Losses and metrics against hand-computed values."""

import jax
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


def test_cross_entropy_of_large_logits_keeps_its_digits():
  found = TASK.loss(jnp.array([[1e6, 1e6 - 0.5, 0]]), jnp.array([1]))
  np.testing.assert_allclose(found, [np.log1p(np.exp(0.5))], rtol=1e-6)


def test_cross_entropy_of_a_label_that_is_no_class_is_nan():
  losses = TASK.loss(jnp.zeros((3, 3)), jnp.array([3, 0, -1]))
  assert np.isnan(losses).tolist() == [True, False, True]


def test_the_gradient_of_cross_entropy_does_not_scatter():
  loss = lambda logits: TASK.loss(logits, jnp.arange(4) % 3).sum()
  program = str(jax.make_jaxpr(jax.grad(loss))(jnp.zeros((4, 3))))
  assert "exp" in program and "scatter" not in program


def test_missing_labels_count_for_nothing():
  found = tasks.compute_metrics((TASK,), states([[9, 0, 0], [0, 9, 0], [0, 0, 9]], [0, 0, -1]))
  assert found["t/accuracy"] == 0.5
  np.testing.assert_allclose(found["t/loss"], (np.log1p(2 * np.exp(-9)) * 2 + 9) / 2, rtol=1e-5)


def test_no_label_at_all_is_nan_never_zero():
  found = tasks.compute_metrics((TASK,), states([[9, 0, 0]], [-1]))
  assert np.isnan(found["t/accuracy"]) and np.isnan(found["t/loss"])


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


def values_of(task, outputs, labels):
  batch = {task.stream: {task.label: labels}}
  states = jax.jit(lambda outputs, batch: tasks.task_metrics((task,), outputs, batch))
  return tasks.compute_metrics((task,), states({task.name: outputs}, batch))


def test_class_weights_scale_each_example_and_the_mean_stays_plain():
  task = tasks.classification("t", num_classes=2, class_weights=(1, 3))
  losses, _ = tasks.task_losses((task,), {"t": jnp.zeros((2, 2))},
                                {"t": {"label": jnp.array([0, 1])}})
  np.testing.assert_allclose(losses, (1 + 3) / 2 * np.log(2), rtol=1e-6)


def test_label_smoothing_by_hand():
  task = tasks.classification("t", num_classes=4, label_smoothing=0.2)
  p = np.array([0.1, 0.2, 0.3, 0.4])  # of the target 0.85 lies on class 2, 0.05 on each other
  expected = -(np.array([0.05, 0.05, 0.85, 0.05]) * np.log(p)).sum()
  found = task.loss(jnp.log(jnp.asarray(p[None], jnp.float32)), jnp.array([2]))
  np.testing.assert_allclose(found, [expected], rtol=1e-6)


def test_top5_accuracy_breaks_ties_as_accuracy_does():
  task = tasks.classification("t", num_classes=8)
  logits = jnp.zeros((8, 8))  # the first five classes come first
  found = values_of(task, logits, np.arange(8, dtype=np.int32))
  assert (found["t/accuracy"], found["t/top5_accuracy"]) == (1 / 8, 5 / 8)
  assert "top5_accuracy" not in {metric.name for metric in TASK.metrics}


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 4], [0, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 2, 2]])
def test_macro_f1_is_that_of_scikit_learn(labels):
  from sklearn.metrics import f1_score
  predicted = np.array([0, 1, 1, 0, 1, 1])  # never 2, 3 or 4; no label is 3
  labels = np.array(labels, np.int32)
  task = tasks.classification("t", num_classes=5)
  found = values_of(task, jnp.eye(5)[predicted], labels)["t/macro_f1"]
  there = labels >= 0
  expected = f1_score(labels[there], predicted[there], average="macro", zero_division=0)
  np.testing.assert_allclose(found, expected, rtol=1e-12)


LABELS = np.array([[1, 1, 0, -1], [0, 1, 0, -1], [1, -1, 0, 1], [0, 0, 0, 1]], np.int32)
LOGITS = np.array([[2, -1, -1, 3], [1, 2, -2, 1], [2, 9, -1, -1], [-1, 1, -3, 1]], np.float32)


def test_multilabel_metrics_by_hand():
  task = tasks.multilabel("t", num_labels=4, label="y", per_label=True)
  found = values_of(task, LOGITS, LABELS)
  f1 = [2 * 2 / (3 + 2), 2 * 1 / (2 + 2), np.nan, 2 * 1 / (1 + 2)]  # the third is never there
  accuracy = [3 / 4, 1 / 3, 1, 1 / 2]
  np.testing.assert_allclose([found[f"t/f1_{i}"] for i in range(4)], f1)
  np.testing.assert_allclose([found[f"t/accuracy_{i}"] for i in range(4)], accuracy)
  np.testing.assert_allclose(found["t/f1"], np.nanmean(f1))
  np.testing.assert_allclose(found["t/accuracy"], np.mean(accuracy))


def test_multilabel_f1_is_that_of_scikit_learn():
  from sklearn.metrics import f1_score
  rng = np.random.default_rng(0)
  labels, logits = rng.integers(0, 2, (50, 6)), rng.normal(size=(50, 6))
  task = tasks.multilabel("t", num_labels=6)
  found = values_of(task, jnp.asarray(logits, jnp.float32), labels.astype(np.int32))
  np.testing.assert_allclose(found["t/f1"], f1_score(labels, logits > 0, average="macro"))
  np.testing.assert_allclose(found["t/accuracy"], (labels == (logits > 0)).mean(axis=0).mean())


def test_multilabel_loss_by_hand():
  task = tasks.multilabel("t", num_labels=2, positive_weights=(1, 3))
  logits = jnp.log(jnp.array([[1., 4.], [3., 5.], [1., 1.]]))  # p = 1/2 and 4/5, 3/4
  labels = jnp.array([[0, 1], [1, -1], [-1, -1]])
  expected = [(np.log(2) + 3 * np.log(5 / 4)) / 2, np.log(4 / 3), 0]
  np.testing.assert_allclose(task.loss(logits, labels), expected, rtol=1e-5)
  far = task.loss(jnp.array([[200., -200.]]), jnp.array([[0, 1]]))
  np.testing.assert_allclose(far, [(200 + 3 * 200) / 2])
