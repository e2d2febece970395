"""The processor cores of this process."""

import os


def cores() -> int:
  """How many cores this process may use, as many as XLA has threads on a CPU; 1 at least."""
  if hasattr(os, "sched_getaffinity"):  # not on every system
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
