"""Classification: one integer label an example."""

import jax
import jax.numpy as jnp
import optax

from mtl_jax.tasks.metrics import MeanMetric
from mtl_jax.tasks.task import Task


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)


def _is_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
  return jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels


def classification(name: str, *, num_classes: int, stream: str | None = None,
                   label: str = "label", weight: float = 1.0) -> Task:
  """One of `num_classes` classes an image: cross-entropy and accuracy.

  Args:
    name: of the task.
    num_classes: labels are 0 … num_classes - 1, or -1 where missing.
    stream: whose images it reads; the task's name when left out.
    label: key of the labels in that stream.
    weight: constant factor of the loss before any balancing.

  >>> task = classification("digit", num_classes=3)
  >>> logits, labels = jnp.array([[0., 0., 0.], [9., 0., 0.]]), jnp.array([1, 0])
  >>> [round(float(x), 4) for x in task.loss(logits, labels)]
  [1.0986, 0.0002]
  """
  if num_classes < 2:
    raise ValueError(f"{name}: num_classes: expected at least 2, found {num_classes}")
  accuracy = MeanMetric("accuracy", _is_correct, "fraction", higher_is_better=True)
  return Task(name=name, stream=stream or name, label=label, loss=_cross_entropy,
              num_outputs=num_classes, metrics=(accuracy,), weight=weight)
