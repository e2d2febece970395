"""Several labels an image, each there or not: attributes."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.tasks import arguments
from mtl_jax.tasks.class_counts import f1_scores, mean_of_defined
from mtl_jax.tasks.metrics import CountMetric
from mtl_jax.tasks.parts import filled, mean_of_parts, outputs_like, present
from mtl_jax.tasks.task import Task


def multilabel(name: str, *, num_labels: int, positive_weights: Sequence[float] | None = None,
               per_label: bool = False, names: Sequence[str] = (), stream: str | None = None,
               label: str = "attributes", weight: float = 1.0) -> Task:
  """Yes or no for each of L labels an image: sigmoid cross-entropy; mean F1, accuracy.

  The head gives logits [B, num_labels]; a label is predicted where its logit is above 0. Labels
  are int32 [B, L], each missing on its own where -1. An example's loss is the mean over the labels
  it has. Both metrics are of each label over all examples that have it, then the mean over labels:
  `f1`, of the positives, leaves out labels that are never positive and never predicted; `accuracy`
  is the one reported on CelebA.

  Args:
    name: of the task.
    num_labels: L.
    positive_weights: one factor a label, of the loss where it is positive.
    per_label: whether there are also the metrics `f1_<label>` and `accuracy_<label>` of each.
    names: of the labels, for these; their numbers when left out.
    stream: whose images it reads; the task's name when left out.
    label: key of the labels in that stream.
    weight: constant factor of the loss before any balancing.

  Raises:
    ValueError: for no label at all, or weights or names that are not one a label.

  >>> task = multilabel("face", num_labels=2)
  >>> logits, labels = jnp.array([[0., 0.], [0., 9.]]), jnp.array([[1, 0], [-1, 1]])
  >>> [round(float(x), 4) for x in task.loss(logits, labels)]
  [0.6931, 0.0001]

  Differences:
    scikit-learn counts a label that is never positive and never predicted as an F1 of 0.
  """
  arguments.check(name, "num_labels", num_labels >= 1, "at least 1", num_labels)
  arguments.check(name, "names", len(names) in (0, num_labels), f"{num_labels} names or none",
                  tuple(names))
  weights = None if positive_weights is None else arguments.numbers(
      name, "positive_weights", positive_weights, num_labels, above=0)

  def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    logits, positive = outputs_like(name, logits, labels), filled(labels) == 1
    losses = jnp.where(positive, -jax.nn.log_sigmoid(logits), -jax.nn.log_sigmoid(-logits))
    if weights is not None:
      losses *= jnp.where(positive, weights.reshape(1, -1), 1)
    return mean_of_parts(losses, present(labels))

  def counts(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    there = mask[:, None] & present(labels)
    predicted, positive = there & (logits > 0), there & (labels == 1)
    columns = {"count": there, "predicted": predicted, "labelled": positive,
               "hits": predicted & positive}
    return {what: column.sum(axis=0, dtype=jnp.int32) for what, column in columns.items()}

  metrics = []
  for kind, scores in (("f1", f1_scores), ("accuracy", accuracies)):
    metrics.append(CountMetric(kind, counts, _mean(scores), "fraction", higher_is_better=True))
  if per_label:
    for i, each in enumerate(names or range(num_labels)):
      for kind, scores in (("f1", f1_scores), ("accuracy", accuracies)):
        metrics.append(CountMetric(f"{kind}_{each}", _column(counts, i), _mean(scores), "fraction",
                                   higher_is_better=True))
  return Task(name=name, stream=stream or name, label=label, loss=loss, num_outputs=num_labels,
              metrics=tuple(metrics), weight=weight, partial=True)


def accuracies(counts: Mapping[str, np.ndarray]) -> np.ndarray:
  """Accuracy of each label, [L]; NaN where no example has it."""
  wrong = counts["predicted"] + counts["labelled"] - 2 * counts["hits"]
  return np.where(counts["count"] > 0, 1 - wrong / np.maximum(counts["count"], 1), np.nan)


def _mean(scores: Callable) -> Callable[[Mapping[str, np.ndarray]], float]:
  return lambda counts: mean_of_defined(scores(counts))


def _column(counts: Callable, i: int) -> Callable[..., dict[str, jax.Array]]:
  """Counts of the label `i` alone."""
  return lambda logits, labels, mask: counts(logits[:, i:i + 1], labels[:, i:i + 1], mask)
