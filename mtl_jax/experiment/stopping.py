"""What ends a run early and keeps what was saved: signals, and devices that run out of memory."""

from collections.abc import Iterator
import contextlib
import signal
from typing import Any

import jax

from mtl_jax.errors import UserError


class Interrupted(Exception):
  """A signal asked the run to stop; it has been saved. `args[0]` is the signal's number."""


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
  """A list that holds the signal's number once SIGTERM or Ctrl-C has come.

  A second one ends the process at once, as it would have without this.
  """
  received: list[int] = []
  old = {}

  def handle(number: int, frame: Any) -> None:
    del frame
    received.append(number)
    signal.signal(number, old[number])

  for number in (signal.SIGTERM, signal.SIGINT):
    old[number] = signal.getsignal(number)
    signal.signal(number, handle)
  try:
    yield received
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
  """Turns a device that runs out of memory into a UserError."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error) and "ut of memory" not in str(error):
      raise
    raise UserError(f"the device ran out of memory: {str(error).splitlines()[0][:160]}\n"
                    "a smaller config.data.batch_size or config.trunk, or config.data.engine=grain, "
                    "may help") from error
