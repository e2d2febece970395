"""Verification: are two images of one identity, by the cosine of their embeddings?"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NUM_FOLDS = 10


@dataclasses.dataclass(frozen=True)
class PairMetric:
  """A score of pairs of the evaluated examples, half of one identity and half of two.

  The pairs are all those of one identity, or `most_pairs` drawn from them, and as many drawn from
  those of two; fewer where there are fewer of two. Examples are ordered by label and embedding
  before the draw, so that the pairs do not depend on the order of evaluation.

  Attributes:
    name: as shown.
    score: `score(cosines, same) -> float` of pairs in an order drawn at random; both [P].
    most_pairs: of one identity.
  """

  name: str
  score: Callable[[np.ndarray, np.ndarray], float]
  most_pairs: int
  unit = "fraction"
  higher_is_better = True
  gathered = True

  def update(self, outputs: Mapping[str, jax.Array], labels: jax.Array,
             mask: jax.Array) -> dict[str, jax.Array]:
    """Embeddings [B, D], labels and mask [B] of one batch."""
    embeddings = outputs["embedding"].astype(jnp.float32)
    return {"embedding": embeddings, "label": labels, "mask": mask}

  def merge(self, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The examples of both."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), a, b)

  def compute(self, state: Mapping[str, Any]) -> float:
    """The score; NaN without two pairs of each kind, or with an embedding that is not finite."""
    mask = np.asarray(state["mask"])
    embeddings, labels = (np.asarray(state[what])[mask] for what in ("embedding", "label"))
    order = np.argsort(_as_bytes(embeddings), kind="stable")
    order = order[np.argsort(labels[order], kind="stable")]
    embeddings, labels = embeddings[order], labels[order]
    first, second, same = pairs(labels, self.most_pairs)
    if len(same) < 4 or not np.isfinite(embeddings).all():
      return float("nan")
    return float(self.score((embeddings[first] * embeddings[second]).sum(axis=1), same))


def _as_bytes(rows: np.ndarray) -> np.ndarray:
  """Rows [N, D] as N strings of bytes, which sort in one order whatever it means."""
  return np.ascontiguousarray(rows).view(f"V{rows.itemsize * rows.shape[1]}").reshape(-1)


def pairs(labels: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Pairs of examples, half of one label and half of two, the same ones every time.

  Args:
    labels: sorted integers [N].
    most: pairs of one label that are wanted; all of them if there are fewer.

  Returns:
    Indices of the first and of the second of each pair, and whether their labels agree, all [P],
    in an order drawn at random.

  >>> first, second, same = pairs(np.array([0, 0, 1, 1]), 9)
  >>> sorted((int(i), int(j), bool(s)) for i, j, s in zip(first, second, same) if s)
  [(0, 1, True), (2, 3, True)]
  >>> int((~same).sum())
  2
  """
  rng = np.random.default_rng(0)
  here = np.arange(len(labels))
  ends = np.searchsorted(labels, labels, side="right")  # where the next label begins
  num_same, num_different = ends - here - 1, len(labels) - ends
  count = min(int(num_same.sum()), int(num_different.sum()), most)
  first, second = (np.concatenate(ends) for ends in zip(
      _drawn(rng, here + 1, num_same, count), _drawn(rng, ends, num_different, count)))
  order = rng.permutation(2 * count)
  return first[order], second[order], order < count


def _drawn(rng: np.random.Generator, begins: np.ndarray, sizes: np.ndarray,
           count: int) -> tuple[np.ndarray, np.ndarray]:
  """`count` different pairs (i, j) of those with begins[i] <= j < begins[i] + sizes[i]."""
  until = np.cumsum(sizes)
  chosen = rng.choice(int(until[-1]), count, replace=False) if count else np.zeros(0, np.int64)
  first = np.searchsorted(until, chosen, side="right")
  return first, begins[first] + chosen - (until[first] - sizes[first])


def best_threshold_accuracy(cosines: np.ndarray, same: np.ndarray) -> float:
  """Accuracy of the best threshold, found on nine folds of the pairs and used on the tenth.

  Pairs whose cosine is at least the threshold are taken for one identity; the mean over folds. The
  folds are those of Labeled Faces in the Wild, but for one thing: there no identity is in two of
  them. One number is learnt from nine folds, so it cannot learn identities.

  Args:
    cosines: [P] of the pairs.
    same: [P] whether each is of one identity, in an order without meaning.

  >>> cosines, same = np.array([0.9, 0.8, 0.3, 0.7] * 3), np.array([True, True, False, False] * 3)
  >>> best_threshold_accuracy(cosines, same), best_threshold_accuracy(-cosines, same)
  (1.0, 0.5)

  Reference:
    Huang, Ramesh, Berg, Learned-Miller: Labeled Faces in the Wild: A Database for Studying Face
    Recognition in Unconstrained Environments. University of Massachusetts, 2007.
  """
  num_folds = min(NUM_FOLDS, len(same))
  folds = np.arange(len(same)) % num_folds
  values = []
  for fold in range(num_folds):
    held = folds == fold
    taken = cosines[held] >= _best_threshold(cosines[~held], same[~held])
    values.append((taken == same[held]).mean())
  return float(np.mean(values))


def _best_threshold(cosines: np.ndarray, same: np.ndarray) -> float:
  """Half way between the least cosine that it is best to accept and the next one below."""
  candidates = np.unique(cosines)
  accepted = same.sum() - np.searchsorted(np.sort(cosines[same]), candidates)
  rejected = np.searchsorted(np.sort(cosines[~same]), candidates)
  best = np.argmax(accepted + rejected)
  return (candidates[best] + candidates[max(best - 1, 0)]) / 2


def roc_auc(cosines: np.ndarray, same: np.ndarray) -> float:
  """Area under the curve of true over false positives, by scikit-learn."""
  from sklearn.metrics import roc_auc_score
  return float(roc_auc_score(same, cosines))
