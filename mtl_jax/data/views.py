"""Several seeds on one copy of the data: each sees the examples that are its own training split."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.data.source import Examples, Subset, Unlabelled, missing
from mtl_jax.data.streams import stream_indices


class View(NamedTuple):
  """The N examples of a seed among those that all seeds share.

  Attributes:
    rows: [N] int32, where they are.
    dropped: by label, [N] bool, whose is taken away.
  """

  rows: np.ndarray
  dropped: Mapping[str, np.ndarray]


def view_of(examples: Examples) -> tuple[Examples, View]:
  """The whole that examples are taken from, and which of it they are.

  >>> from mtl_jax.data.source import ArrayExamples
  >>> whole = ArrayExamples({"image": np.zeros((3, 1, 1, 1), np.uint8), "label": np.arange(3)})
  >>> examples = Unlabelled(Subset(whole, np.array([2, 0])), {"label": np.array([True, False])})
  >>> found, view = view_of(examples)
  >>> found is whole, view.rows.tolist(), view.dropped["label"].tolist()
  (True, [2, 0], [True, False])
  """
  if isinstance(examples, Unlabelled):
    whole, view = view_of(examples.examples)
    gone = lambda name: view.dropped.get(name, False) | examples.dropped[name]
    return whole, view._replace(
        dropped={**view.dropped, **{name: gone(name) for name in examples.dropped}})
  if isinstance(examples, Subset):
    whole, view = view_of(examples.examples)
    return whole, View(view.rows[examples.indices],
                       {name: gone[examples.indices] for name, gone in view.dropped.items()})
  return examples, View(np.arange(len(examples), dtype=np.int32), {})


def viewed_batch(columns: Mapping[str, Mapping[str, jax.Array]], views: Mapping[str, View],
                 batch_size: int, seed: jax.Array,
                 turns: Mapping[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
  """One step's batch of one seed, the same as `streams.resident_batch` of its own split gives.

  Args:
    columns: of the whole, `{stream: {"image": [M, H, W, C], label: [M]}}`.
    views: the seed's, by stream.
    batch_size: examples of each stream.
    seed: [] of the run.
    turns: by stream, how many of its batches came before, [].
  """
  batch = {}
  for stream, (rows, dropped) in views.items():
    indices = stream_indices(stream, batch_size, len(rows), seed, turns[stream])
    batch[stream] = {name: column[rows[indices]] for name, column in columns[stream].items()}
    for name in dropped.keys() & batch[stream].keys():
      values = batch[stream][name]
      gone = dropped[name][indices].reshape(-1, *(1,) * (values.ndim - 1))
      batch[stream][name] = jnp.where(gone, missing(np.zeros((), values.dtype)), values)
  return batch
