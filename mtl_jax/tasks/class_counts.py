"""Scores from what is counted of each class: F1 and intersection over union.

Of a confusion matrix these need only its diagonal and its two margins, which stay small where
classes are many, as with identities.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np


def class_counts(predicted: jax.Array, labels: jax.Array, there: jax.Array,
                 num_classes: int) -> dict[str, jax.Array]:
  """How often each class was predicted, was the label, and was both.

  Args:
    predicted: integer classes, of any shape.
    labels: integer classes, of the same shape.
    there: bool of the same shape; where False nothing is counted.
    num_classes: C.

  Returns:
    int32 [C] each: "hits", "predicted", "labelled".

  >>> counts = class_counts(jnp.array([0, 1, 1, 2]), jnp.array([0, 1, 0, -1]),
  ...                       jnp.array([True, True, True, False]), 3)
  >>> {what: n.tolist() for what, n in counts.items()}
  {'hits': [1, 1, 0], 'predicted': [1, 2, 0], 'labelled': [2, 1, 0]}
  """
  predicted = predicted.astype(labels.dtype)

  def bins(classes: jax.Array, where: jax.Array) -> jax.Array:
    indices = jnp.where(where, classes, num_classes).reshape(-1)
    return jnp.zeros(num_classes, jnp.int32).at[indices].add(1, mode="drop")

  return {"hits": bins(labels, there & (predicted == labels)), "predicted": bins(predicted, there),
          "labelled": bins(labels, there)}


def f1_scores(counts: Mapping[str, np.ndarray]) -> np.ndarray:
  """F1 of each class, [C], the harmonic mean of precision and recall.

  It is 2 hits / (predicted + labelled), NaN for a class that is neither predicted nor a label.
  """
  return _quotients(2 * counts["hits"], counts["predicted"] + counts["labelled"])


def ious(counts: Mapping[str, np.ndarray]) -> np.ndarray:
  """Intersection over union of each class, [C]; NaN where neither predicted nor a label."""
  return _quotients(counts["hits"], counts["predicted"] + counts["labelled"] - counts["hits"])


def mean_f1(counts: Mapping[str, np.ndarray]) -> float:
  """Mean F1 over the classes that are predicted or a label: scikit-learn's macro average.

  >>> round(mean_f1({"hits": np.array([1, 1, 0]), "predicted": np.array([1, 2, 0]),
  ...                "labelled": np.array([2, 1, 0])}), 4)  # (2/3 + 2/3) / 2
  0.6667
  """
  return mean_of_defined(f1_scores(counts))


def mean_iou(counts: Mapping[str, np.ndarray]) -> float:
  """Mean intersection over union over the classes that are predicted or a label."""
  return mean_of_defined(ious(counts))


def mean_of_defined(values: np.ndarray) -> float:
  """The mean of what is not NaN; NaN where nothing is."""
  defined = values[~np.isnan(values)]
  return float(defined.mean()) if defined.size else float("nan")


def _quotients(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
  return np.where(wholes > 0, parts / np.maximum(wholes, 1), np.nan)
