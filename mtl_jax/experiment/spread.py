"""What several runs come to: the mean of each number, how wide they lie, and all of them."""

from collections.abc import Mapping, Sequence
import math
import statistics
from typing import Any


def spread(values: Sequence[float | None]) -> dict[str, Any]:
  """Mean and sample standard deviation of the finite values, and all of them.

  >>> spread([1.0, None, 3.0])
  {'mean': 2.0, 'std': 1.4142135623730951, 'values': [1.0, None, 3.0]}
  """
  known = [value for value in values if value is not None and math.isfinite(value)]
  return {"mean": statistics.fmean(known) if known else None,
          "std": statistics.stdev(known) if len(known) > 1 else None, "values": list(values)}


def of_runs(summaries: Sequence[Mapping[str, Any]], split: str) -> dict[str, dict[str, Any]]:
  """The spread over runs of each metric of a split, from their summaries."""
  return {name: spread([summary[split][name] for summary in summaries])
          for name in summaries[0][split]}
