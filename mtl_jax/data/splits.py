"""Train, validation and test: what a source does not bring is cut from train."""

import dataclasses

import numpy as np

from mtl_jax.data.source import Joined, Source, Subset, Unlabelled


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
  splits = {
      **source.splits,
      "train": Subset(train, np.sort(shuffled[count:])),
      "validation": Subset(train, np.sort(shuffled[:count])),
  }
  return dataclasses.replace(source, splits=splits)


def with_fold(source: Source, folds: int, fold: int, seed: int) -> Source:
  """One round of k-fold cross-validation: a fold of train is held out as test.

  Every training example, those of a validation split among them, is held out in exactly one fold;
  the folds' sizes differ by at most one. The source's own test split is not read.

  Args:
    source: with "train".
    folds: how many.
    fold: which of them is held out, from 0 on.
    seed: of the draw.

  Returns:
    The source with splits "train" and "test".

  Raises:
    ValueError: where there are fewer examples than folds.
  """
  whole = source.splits["train"]
  if "validation" in source.splits:
    whole = Joined(whole, source.splits["validation"])
  if not 2 <= folds <= len(whole):
    raise ValueError(f"folds: expected 2 to {len(whole)}, the number of training examples, "
                     f"found {folds}")
  shuffled = np.random.default_rng(seed).permutation(len(whole))
  parts = np.array_split(shuffled, folds)
  rest = np.concatenate([part for i, part in enumerate(parts) if i != fold])
  return dataclasses.replace(source, splits={
      "train": Subset(whole, np.sort(rest)), "test": Subset(whole, np.sort(parts[fold]))})


def with_missing(source: Source, fraction: float, seed: int) -> Source:
  """The source with a fraction of each label of train missing at random, each on its own.

  Args:
    source: with "train".
    fraction: of the examples, for each label; in [0, 1).
    seed: of the draw.
  """
  train = source.splits["train"]
  rng = np.random.default_rng(seed)
  count = round(fraction * len(train))
  dropped = {name: rng.permutation(len(train)) < count for name in sorted(source.labels)}
  return dataclasses.replace(source, splits={**source.splits, "train": Unlabelled(train, dropped)})
