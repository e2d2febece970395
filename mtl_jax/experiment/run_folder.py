"""The run folder: config, metrics, summary; what makes it refuse, and what it keeps."""

from collections.abc import Iterator, Mapping
import contextlib
import fcntl
import json
import math
import os
import pathlib
from typing import Any

from mtl_jax.errors import UserError


def plain(value: Any) -> Any:
  """What JSON gives back for a value: tuples become lists."""
  return json.loads(json.dumps(value))


def without_nan(value: Any) -> Any:
  """The value with None for every number that JSON cannot hold."""
  if isinstance(value, Mapping):
    return {key: without_nan(item) for key, item in value.items()}
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _differences(old: Any, new: Any, where: str) -> list[str]:
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    keys = dict.fromkeys([*old, *new])
    return [line for key in keys
            for line in _differences(old.get(key), new.get(key), f"{where}.{key}")]
  return [] if old == new else [f"{where}: {old!r} there, {new!r} here"]


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """Turns what the disk refuses into a UserError that names the file."""
  try:
    yield
  except OSError as error:
    raise UserError(f"{path}: expected room and permission to write, found: {error.strerror}\n"
                    "what is there is kept; make room and launch again to continue") from error


def _written(path: pathlib.Path, text: str) -> None:
  """Writes a whole file or nothing."""
  temporary = path.with_name(path.name + ".tmp")
  try:
    with open(temporary, "w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


class RunFolder:
  """A run's files but for its checkpoints.

  Args:
    path: of the folder.
    writes: False on all processes but the first.
    within: the folder of several runs that this one belongs to, given up with it.

  Attributes:
    path: absolute.
  """

  def __init__(self, path: str | os.PathLike[str], *, writes: bool = True,
               within: "RunFolder | None" = None):
    self.path = pathlib.Path(path).expanduser().resolve()
    self._writes = writes
    self._lock = None
    self._is_new = False
    self._within = within

  def open(self, config: Mapping[str, Any], data: Mapping[str, str]) -> None:
    """Makes the folder, or checks that it belongs to this config and data.

    Raises:
      UserError: for a folder of another config or other data, one that cannot be written, or one
        in which another process is at work.
    """
    self.check(config, data)
    if not self._writes:
      return
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      if not (self.path / "config.json").exists():
        _written(self.path / "config.json",
                 json.dumps({"config": plain(config), "data": dict(data)}, indent=2) + "\n")
        self._is_new = True
      elif not os.access(self.path / "config.json", os.W_OK):
        raise PermissionError(13, "Permission denied", str(self.path))
      self._lock = open(self.path / "config.json", "rb")
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when the process ends
    except BlockingIOError as error:
      raise UserError(f"run folder {self.path}: expected one run at a time, found another process "
                      "at work in it") from error
    except OSError as error:
      raise UserError(f"run folder {self.path}: expected a folder that can be written, "
                      f"found: {error.strerror}") from error

  def close(self) -> None:
    """Lets another process work in the folder."""
    if self._lock:
      self._lock.close()

  def give_up(self) -> None:
    """Lets another config have the folder where this one could not begin."""
    if self._is_new:
      (self.path / "config.json").unlink(missing_ok=True)
    if self._within:
      self._within.give_up()

  def check(self, config: Mapping[str, Any], data: Mapping[str, str]) -> None:
    """Raises UserError where the folder belongs to another config or other data."""
    try:
      old = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
      return
    except (OSError, ValueError) as error:
      raise UserError(f"{self.path / 'config.json'}: expected the config of a run, "
                      f"found: {error}") from error
    if not isinstance(old, dict):
      raise UserError(f"{self.path / 'config.json'}: expected the config of a run, "
                      f"found {type(old).__name__}")
    lines = _differences(old.get("config"), plain(config), "config")
    lines += _differences(old.get("data"), dict(data), "data")
    if lines:
      shown = "; ".join(lines[:6]) + (f"; and {len(lines) - 6} more" if len(lines) > 6 else "")
      raise UserError(f"run folder {self.path} belongs to another run: {shown}\n"
                      "choose another --workdir, or remove the folder")

  def summary(self) -> dict[str, Any] | None:
    """The summary of a finished run, or None."""
    try:
      return json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
      return None
    except ValueError as error:
      raise UserError(f"{self.path / 'summary.json'}: expected JSON, found: {error}; remove it and "
                      "launch again to have it written anew") from error

  def write_summary(self, summary: Mapping[str, Any]) -> None:
    """Writes the final numbers."""
    if self._writes:
      path = self.path / "summary.json"
      with writing(path):
        _written(path, json.dumps(summary, indent=2, allow_nan=False) + "\n")


class MetricsFile:
  """`metrics.jsonl`: one record a line, which a resumed run cuts back to its checkpoint."""

  def __init__(self, path: pathlib.Path, keep_bytes: int, *, writes: bool = True):
    self._path, self._file = path, None
    if writes:
      size = path.stat().st_size if path.exists() else 0
      if size < keep_bytes:
        raise UserError(f"{path}: expected at least the {keep_bytes} bytes that the checkpoint "
                        f"knows of, found {size}; it was cut or replaced")
      with writing(path):
        self._file = open(path, "ab")
        self._file.truncate(keep_bytes)

  def write(self, record: Mapping[str, Any]) -> None:
    """Appends one record; numbers that are not finite become null, so that every line is JSON."""
    if self._file:
      with writing(self._path):
        self._file.write((json.dumps(without_nan(record), allow_nan=False) + "\n").encode())

  def flush(self) -> int:
    """Makes all records safe on disk and returns their size in bytes."""
    if not self._file:
      return 0
    with writing(self._path):
      self._file.flush()
      os.fsync(self._file.fileno())
      return self._file.tell()

  def close(self) -> None:
    """Closes the file."""
    if self._file:
      with contextlib.suppress(OSError):  # what was to be kept has been flushed
        self._file.close()
