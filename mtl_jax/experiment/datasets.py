"""From `config.data` to sources with their splits, and what training must know of them."""

from collections.abc import Mapping

import jax
from ml_collections import ConfigDict
import numpy as np

from mtl_jax.data import sources
from mtl_jax.data.augmentation import AUGMENTATIONS, channel_statistics, parse
from mtl_jax.data.source import Source
from mtl_jax.data.splits import with_fold, with_missing, with_validation
from mtl_jax.errors import MissingData, UserError
from mtl_jax.experiment import sections

_RESIDENT_BYTES = 4 * 2 ** 30
_STATISTICS_EXAMPLES = 10_000


def read(config: ConfigDict) -> dict[str, Source]:
  """The source of each stream as it is, before anything is held out or taken away.

  Raises:
    UserError: where data is missing.
  """
  return {stream: _source(stream, section, config.data)
          for stream, section in config.data.streams.items()}


def load(config: ConfigDict, given: Mapping[str, Source] | None = None) -> dict[str, Source]:
  """The source of each stream, with train, validation and test.

  Args:
    config: complete.
    given: sources by stream that take the place of those that the config names.

  Raises:
    UserError: where data is missing or does not fit.
  """
  loaded = {}
  for stream, section in config.data.streams.items():
    source = (given or {}).get(stream) or _source(stream, section, config.data)
    try:
      if config.data.fold is not None:
        source = with_fold(source, config.data.folds, config.data.fold, config.seed)
      _check(stream, source)
      source = with_validation(source, config.data.validation, config.seed)
      if config.data.drop_labels:
        source = with_missing(source, config.data.drop_labels, config.seed)
      loaded[stream] = source
    except ValueError as error:
      raise UserError(f"config.data.{error}") from error
  return loaded


def _source(stream: str, section: ConfigDict, data: ConfigDict) -> Source:
  arguments = {key: value for key, value in section.items() if key != "augmentation"}
  try:
    return sections.make(f"config.data.streams.{stream}", arguments, sources.SOURCES,
                         dir=data.dir, download=data.download)
  except MissingData:
    alone_on_cpu = jax.process_count() == 1 and jax.default_backend() == "cpu"
    wanted = data.missing == "sample" or (data.missing == "auto" and alone_on_cpu)
    if not wanted or section.name not in sources.SAMPLES:
      raise
    return sources.sample(section.name)


def _check(stream: str, source: Source) -> None:
  """Raises UserError unless there are examples with an image that a step can take."""
  for split in ("train", "test"):
    if not len(source.splits.get(split, ())):
      raise UserError(f"stream {stream!r}: expected examples to train on and to test on, "
                      f"found no {split} split")
  for split, examples in source.splits.items():
    image = examples[0]["image"]
    if not (image.dtype == np.float32 or (image.ndim == 3 and image.dtype == np.uint8)):
      raise UserError(f"stream {stream!r}: {split}: expected images [H, W, C] of uint8, or numbers "
                      f"of float32; found {list(image.shape)} of {image.dtype}")


def statistics(source: Source) -> Mapping[str, tuple[float, ...]]:
  """Mean and deviation of each channel over train."""
  train = source.splits["train"]
  count = min(len(train), _STATISTICS_EXAMPLES)
  chosen = np.linspace(0, len(train) - 1, count).astype(int)
  return channel_statistics(np.stack([train[int(i)]["image"] for i in chosen]))


def augmentation(stream: str, data: ConfigDict, source: Source) -> tuple[str, ...]:
  """Names of a stream's augmentations, with their strengths; its source's own for "auto"."""
  where, setting = "config.data.augmentation", data.augmentation
  if "augmentation" in data.streams[stream]:
    where = f"config.data.streams.{stream}.augmentation"
    setting = data.streams[stream].augmentation
  names = tuple(source.augmentation if tuple(setting) == ("auto",) else setting)
  for text in names:
    name = text.partition(":")[0]
    if name not in AUGMENTATIONS:
      raise UserError(f"{where}: {sections.nearest(name, ['auto', *AUGMENTATIONS])}; found {name!r}")
    try:
      parse(text)
    except ValueError as error:
      raise UserError(f"{where}: {error}") from error
  return names


def engine(setting: str, loaded: Mapping[str, Source]) -> str:
  """The data engine, by the size of all examples for "auto"."""
  if setting != "auto":
    return setting
  size = sum(len(source.splits["train"]) * sum(np.asarray(column).nbytes for column in
                                               source.splits["train"][0].values())
             for source in loaded.values())
  return "resident" if size <= _RESIDENT_BYTES else "grain"
