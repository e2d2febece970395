"""Classification: one integer label an example."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.tasks import arguments
from mtl_jax.tasks.class_counts import class_counts, mean_f1
from mtl_jax.tasks.metrics import CountMetric, MeanMetric
from mtl_jax.tasks.task import Task


def cross_entropy(logits: jax.Array, labels: jax.Array, class_weights: np.ndarray | None = None,
                  label_smoothing: float = 0.0) -> jax.Array:
  """Softmax cross-entropy of logits [..., C] with integer labels [...] -> [...] float32.

  Args:
    logits: computed in float32 whatever their type.
    labels: 0 … C - 1.
    class_weights: [C] factors of the loss by its label's class.
    label_smoothing: share of the target that is spread evenly over all classes.

  >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
  >>> [round(float(x), 4) for x in cross_entropy(logits, jnp.array([0]))]  # log 2
  [0.6931]
  """
  logits = logits.astype(jnp.float32)
  logits -= jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))  # cancels, and saves digits
  total = jnp.log(jnp.exp(logits).sum(axis=-1))
  losses = total - _at(logits, labels)
  if label_smoothing:
    spread = total - logits.mean(axis=-1)
    losses = (1 - label_smoothing) * losses + label_smoothing * spread
  if class_weights is not None:
    losses *= jnp.asarray(class_weights, jnp.float32)[labels]
  return losses


def _at(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Of logits [..., C] those at the labels [...]; NaN where a label is no class.

  Not by an index, whose gradient is a scatter, which adds one by one.
  """
  is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.bool_)
  found = jnp.where(is_label, logits, 0).sum(axis=-1)
  return jnp.where((labels >= 0) & (labels < logits.shape[-1]), found, jnp.nan)


def is_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Whether the greatest of logits [..., C] is at the label [...]."""
  return jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels


def _in_top5(logits: jax.Array, labels: jax.Array) -> jax.Array:
  _, best = jax.lax.top_k(logits, 5)
  return (best.astype(labels.dtype) == labels[:, None]).any(axis=-1)


def classification(name: str, *, num_classes: int, class_weights: Sequence[float] | None = None,
                   label_smoothing: float = 0.0, stream: str | None = None, label: str = "label",
                   weight: float = 1.0) -> Task:
  """One of `num_classes` classes an image: cross-entropy; accuracy, top-5 accuracy, macro F1.

  The head gives logits [B, num_classes].

  Top-5 accuracy is there where classes are more than five. Macro F1 is the mean of the classes' F1
  over the classes that are predicted or a label at all, as in scikit-learn.

  Args:
    name: of the task.
    num_classes: labels are 0 … num_classes - 1, or -1 where missing.
    class_weights: one factor a class. An example's loss is its own factor times its cross-entropy,
      and the mean over examples stays the plain one, so that a factor means the same in every
      batch. PyTorch instead divides by the sum of the batch's factors, and with label smoothing
      gives each class of the spread target its own factor.
    label_smoothing: share of the target that is spread evenly over all classes (Szegedy et al.,
      CVPR 2016, arXiv:1512.00567).
    stream: whose images it reads; the task's name when left out.
    label: key of the labels in that stream.
    weight: constant factor of the loss before any balancing.

  Raises:
    ValueError: for fewer than two classes, or weights or a smoothing that cannot be.

  >>> task = classification("digit", num_classes=3)
  >>> logits, labels = jnp.array([[0., 0., 0.], [9., 0., 0.]]), jnp.array([1, 0])
  >>> [round(float(x), 4) for x in task.loss(logits, labels)]
  [1.0986, 0.0002]
  """
  arguments.check(name, "num_classes", num_classes >= 2, "at least 2", num_classes)
  arguments.check(name, "label_smoothing", 0 <= label_smoothing < 1, "a share in [0, 1)",
                  label_smoothing)
  weights = None if class_weights is None else arguments.numbers(
      name, "class_weights", class_weights, num_classes, least=0)

  def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return cross_entropy(logits, labels, weights, label_smoothing)

  def counts(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    return class_counts(jnp.argmax(logits, axis=-1), labels, mask, num_classes)

  metrics = [MeanMetric("accuracy", is_correct, "fraction", higher_is_better=True),
             CountMetric("macro_f1", counts, mean_f1, "fraction", higher_is_better=True)]
  if num_classes > 5:
    metrics.insert(1, MeanMetric("top5_accuracy", _in_top5, "fraction", higher_is_better=True))
  return Task(name=name, stream=stream or name, label=label, loss=loss, num_outputs=num_classes,
              metrics=tuple(metrics), weight=weight)
