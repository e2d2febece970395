"""Train, validation and test: validation is cut from train where a source brings none."""

from collections.abc import Mapping
import dataclasses

import numpy as np

from mtl_jax.data.source import Examples, Source, Subset


def with_validation(source: Source, fraction: float, seed: int) -> Source:
  """The source with a validation split.

  Args:
    source: with "train" and "test"; returned as it is where it has "validation" already.
    fraction: of train that becomes validation, drawn without replacement.
    seed: of the draw.

  Raises:
    ValueError: where the fraction leaves either side empty.
  """
  if "validation" in source.splits:
    return source
  train = source.splits["train"]
  count = round(len(train) * fraction)
  if not 0 < count < len(train):
    raise ValueError(f"validation: expected a fraction that leaves examples on both sides of "
                     f"{len(train)}, found {fraction}")
  shuffled = np.random.default_rng(seed).permutation(len(train))
  splits: Mapping[str, Examples] = {
      **source.splits,
      "train": Subset(train, np.sort(shuffled[count:])),
      "validation": Subset(train, np.sort(shuffled[:count])),
  }
  return dataclasses.replace(source, splits=splits)
