"""TensorBoard's event files, written at once, so that a failing disk is known at once."""

import contextlib
import os
import pathlib
import socket
import time

from mtl_jax.experiment.run_folder import writing


class EventFile:
  """One event file of a run; a resumed run opens another, which takes the place of later steps.

  tensorboardX's SummaryWriter hands events to a thread; one that dies of a full disk leaves the
  training waiting for ever.

  Args:
    folder: of the run.
    start: the first step that this file writes.
  """

  def __init__(self, folder: pathlib.Path, start: int):
    from tensorboardX import record_writer
    from tensorboardX.proto import event_pb2
    self._event = event_pb2
    self._path = folder / (
        f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}")
    with writing(self._path):
      self._records = record_writer.RecordWriter(str(self._path))
    self._write(file_version="brain.Event:2")
    session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(step=start, session_log=session)

  def write(self, step: int, values: dict[str, float]) -> None:
    """Scalars of one step by name."""
    from tensorboardX.proto import summary_pb2
    self._write(step=step, summary=summary_pb2.Summary(value=[
        summary_pb2.Summary.Value(tag=name, simple_value=value)
        for name, value in values.items()]))

  def _write(self, **fields) -> None:
    event = self._event.Event(wall_time=time.time(), **fields)
    with writing(self._path):
      self._records.write(event.SerializeToString())
      self._records.flush()

  def close(self) -> None:
    """Closes the file."""
    with contextlib.suppress(OSError):  # what was written has been flushed
      self._records.close()
