"""What the benchmarks share: alternating rounds, medians, and one JSON line a figure."""

from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from mtl_jax.experiment.cores import cores

Sample = Callable[[], float]  # measures once, and returns seconds a step


def on_accelerator() -> bool:
  """Whether jax computes elsewhere than on the host's own cores."""
  return jax.default_backend() != "cpu"


def emit(benchmark: str, **fields: Any) -> None:
  """Prints one JSON line that says what it was measured on."""
  print(json.dumps({"benchmark": benchmark, **fields, "device": jax.devices()[0].device_kind,
                    "devices": jax.device_count(), "jax": jax.__version__}), flush=True)


def machine() -> dict[str, Any]:
  """What a file of results has to say about the machine, the versions and the date."""
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return {
      "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "processor": names[0] if names else platform.processor() or platform.machine(),
      "threads": cores(),
      "load": round(os.getloadavg()[0], 2),
      "device": jax.devices()[0].device_kind,
      "devices": jax.device_count(),
      "system": platform.platform(),
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")},
  }


@contextlib.contextmanager
def programs_kept() -> Iterator[None]:
  """Keeps compiled programs on disk until the end, so that none is compiled twice.

  They stay where a folder for them has been named before.
  """
  if jax.config.jax_compilation_cache_dir:
    yield
    return
  with tempfile.TemporaryDirectory() as folder:
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # JAX has decided before that there is none
    try:
      yield
    finally:
      jax.config.update("jax_compilation_cache_dir", None)
      compilation_cache.reset_cache()


def sample_of(step: Callable[[Any, Any], tuple[Any, Any]], state: Any, batch: Any, *,
              steps: int = 1) -> tuple[Sample, Any]:
  """A sample of a compiled step that goes on training, once that is warm.

  Args:
    step: `step(state, batch) -> (state, logs)`; may donate the state.
    state: the first one.
    batch: the same at every step.
    steps: in a sample; the device is waited for at its end.

  Returns:
    The sample, and the logs of the first step.
  """
  state, logs = jax.block_until_ready(step(state, batch))

  def seconds() -> float:
    nonlocal state  # which may have been donated
    start = time.perf_counter()
    for _ in range(steps):
      state, logs = step(state, batch)
    jax.block_until_ready((state, logs))
    return (time.perf_counter() - start) / steps
  return seconds, logs


def medians(samples: Mapping[Any, Sample], rounds: int, longest: float = float("inf"),
            once: Collection[Any] = (), base: Any = None) -> dict[Any, float]:
  """Medians of samples by name, in seconds.

  Rounds go through all in turn, so that a noisy machine disturbs them alike.

  Args:
    samples: by name.
    rounds: how many, one at least.
    longest: seconds after which no further round begins.
    once: names of what is so slow that it takes part in the first round only.
    base: name of what all others are compared with; it is measured before each of them, so that
      no disturbance of it moves all ratios.
  """
  times = {name: [] for name in samples}
  end = time.perf_counter() + longest
  for done in range(rounds):
    if done and time.perf_counter() > end:
      break
    for name, sample in samples.items():
      if name == base or done and name in once:
        continue
      if base is not None:
        times[base].append(samples[base]())
      times[name].append(sample())
  return {name: statistics.median(values) for name, values in times.items()}
