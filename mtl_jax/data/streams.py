"""Streams of batches `{stream: {"image": uint8 [B, H, W, C], label: [B, …]}}`, by two engines.

  resident  the examples live on the device as uint8; a batch is drawn from (seed, step) inside the
            compiled step.
  grain     the same batches, read ahead on the host by Grain, for what does not fit; the iterator
            starts at any step without replaying what came before.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
import functools
import itertools
import threading
from typing import Any

import jax
import numpy as np

from mtl_jax.data.augmentation import augment, normalize
from mtl_jax.data.order import batch_indices, batch_indices_on_host
from mtl_jax.data.source import Examples, Label, rows
from mtl_jax.randomness import purpose_key

ENGINES = ("resident", "grain")

_DRAWN = 16  # batches whose places are drawn at a time on the host


def resident_batch(columns: Mapping[str, Mapping[str, jax.Array]], batch_size: int,
                   seed: jax.Array,
                   turns: Mapping[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
  """One step's batch out of resident data; pure, for use inside a compiled step.

  Args:
    columns: `{stream: {"image": [N, H, W, C], label: [N]}}`.
    batch_size: examples of each stream.
    seed: [] of the run.
    turns: by stream, how many of its batches came before, [].
  """
  batch = {}
  for stream, data in columns.items():
    size = next(iter(data.values())).shape[0]
    indices = stream_indices(stream, batch_size, size, seed, turns[stream])
    batch[stream] = {name: column[indices] for name, column in data.items()}
  return batch


def stream_indices(stream: str, batch_size: int, size: int, seed: jax.Array,
                   turn: jax.Array) -> jax.Array:
  """Which of a stream's `size` examples its batch number `turn` holds, [batch_size]."""
  return batch_indices(_order_key(seed, stream), turn, batch_size, size)


def _order_key(seed: jax.typing.ArrayLike, stream: str) -> jax.Array:
  return purpose_key(seed, f"order/{stream}")


def preprocess(batch: Mapping[str, Mapping[str, jax.Array]], seed: jax.Array, step: jax.Array, *,
               statistics: Mapping[str, Any],
               augmentation: Mapping[str, Any] | None = None,
               labels: Mapping[str, Mapping[str, Label]] | None = None
               ) -> dict[str, dict[str, jax.Array]]:
  """Augments a batch and normalises its images; pure, for use inside a compiled step.

  Args:
    batch: with uint8 images.
    seed: [] of the run.
    step: [] of the run.
    statistics: `{stream: {"mean": …, "std": …}}`.
    augmentation: names of the augmentations of each stream; none in evaluation.
    labels: those of each stream, which move with the images; none do where it is None.
  """
  result = {}
  for stream, columns in batch.items():
    if augmentation:
      key = purpose_key(seed, f"augmentation/{stream}", step)
      columns = augment(columns, key, augmentation[stream], labels[stream] if labels else {})
    result[stream] = {**columns, "image": normalize(columns["image"], **statistics[stream])}
  return result


def check_labels(stream: str, columns: Mapping[str, np.ndarray],
                 labels: Mapping[str, Label]) -> None:
  """Raises ValueError for a class outside -1 … classes - 1, and for an infinite number."""
  for name, label in labels.items():
    values = np.asarray(columns[name])
    if values.dtype.kind == "f" and np.isinf(values).any():
      raise ValueError(f"stream {stream!r}: {name}: expected finite numbers (NaN where missing), "
                       "found an infinite one")
    classes = 2 if label.kind == "binary" else label.num_classes
    if classes is None:
      continue
    if label.kind == "objects":
      values = values[..., 4][~np.isnan(values[..., 4])].astype(int)
    if values.size and not (-1 <= values.min() and values.max() < classes):
      found = values.min() if values.min() < -1 else values.max()
      raise ValueError(f"stream {stream!r}: {name}: expected labels 0 … {classes - 1} "
                       f"(-1 where missing), found {found}")


def grain_batches(streams: Mapping[str, Examples], batch_size: int, seed: int,
                  turns: Mapping[str, int], *, labels: Mapping[str, Mapping[str, Label]],
                  reads: Iterable[Collection[str]] | None = None, process: int = 0,
                  num_processes: int = 1, num_threads: int = 2
                  ) -> Iterator[dict[str, dict[str, np.ndarray]]]:
  """Training batches from the host, this process's share of each.

  Args:
    streams: training examples by stream.
    batch_size: examples of each stream over all processes; a multiple of `num_processes`.
    seed: of the order.
    turns: by stream, how many of its batches came before.
    labels: those to check, by stream.
    reads: the streams of each batch, one after the other; all of them, endlessly, where left out.
    process: index of this process.
    num_processes: how many share each batch.
    num_threads: that read ahead.

  Raises:
    ValueError: where a batch holds a label out of range.
  """
  import grain
  iterators, local = {}, batch_size // num_processes
  for stream, examples in streams.items():
    read = _reader(examples, _order_key(seed, stream), batch_size,
                   slice(process * local, (process + 1) * local))
    dataset = grain.MapDataset.range(2 ** 32 // batch_size).map(read)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * num_threads)
    iterators[stream] = iter(dataset.to_iter_dataset(options))
    iterators[stream].set_state({"next_index": int(turns[stream])})
  for names in itertools.repeat(tuple(streams)) if reads is None else reads:
    batch = {stream: next(iterators[stream]) for stream in names}
    for stream, columns in batch.items():
      check_labels(stream, columns, labels[stream])
    yield batch


def _reader(examples: Examples, key: jax.Array, batch_size: int,
            share: slice) -> Callable[[int], dict[str, np.ndarray]]:
  """`read(turn)`, the share of one batch."""
  bits, one_at_a_time = np.asarray(jax.random.bits(key)), threading.Lock()

  @functools.lru_cache(maxsize=4)
  def places(block):  # Batches follow one another without a gap: many are drawn at the price of one.
    return batch_indices_on_host(bits, block, _DRAWN * batch_size, len(examples))

  def read(turn):
    block, place = divmod(turn, _DRAWN)
    with one_at_a_time:  # Grain's threads need the same block.
      drawn = places(block)
    return rows(examples, drawn[place * batch_size:][share])
  return read


def evaluation_batches(streams: Mapping[str, Examples], batch_size: int, *,
                       labels: Mapping[str, Mapping[str, Label]], process: int = 0,
                       num_processes: int = 1) -> Iterator[dict[str, dict[str, np.ndarray]]]:
  """Every example once, in order, this process's share of each batch.

  Streams of different lengths end together: a short one, or the rest of the last batch, is filled
  with examples that are not `present` and whose labels are missing, which count for nothing.
  """
  local = batch_size // num_processes
  num_batches = max(-(-len(examples) // batch_size) for examples in streams.values())
  for start in range(process * local, num_batches * batch_size, batch_size):
    yield {stream: _padded(stream, examples, start, local, labels[stream])
           for stream, examples in streams.items()}


def _padded(stream: str, examples: Examples, start: int, count: int,
            labels: Mapping[str, Label]) -> dict[str, np.ndarray]:
  size = max(min(count, len(examples) - start), 0)
  columns = {"present": np.arange(count) < size}
  for name, values in rows(examples, range(start, start + size) if size else [0]).items():
    missing = np.nan if values.dtype.kind == "f" else -1
    column = np.full((count, *values.shape[1:]), 0 if name == "image" else missing, values.dtype)
    column[:size] = values[:size]
    columns[name] = column
  check_labels(stream, columns, labels)
  return columns
