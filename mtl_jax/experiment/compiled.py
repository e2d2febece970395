"""Compiled programs, kept from run to run in the user's cache folder."""

from collections.abc import Mapping
import contextlib
import os
import pathlib
import warnings

import jax

from mtl_jax.experiment.console import Console

_LIMIT = 1 << 30  # bytes
_SECONDS = 0.2  # what compiles faster is not worth a file


def folder(environment: Mapping[str, str]) -> pathlib.Path:
  """Where this user's compiled programs lie, by the rules of freedesktop.org.

  Raises:
    OSError: for a user without a home.

  >>> folder({"XDG_CACHE_HOME": "/scratch/ada"}).as_posix()
  '/scratch/ada/mtl_jax/compiled'
  """
  base = pathlib.Path(environment.get("XDG_CACHE_HOME", ""))
  if not base.is_absolute():
    base = pathlib.Path(os.path.expanduser("~/.cache"))
  if not base.is_absolute():
    raise FileNotFoundError(None, "no home folder of this user", str(base))
  return base / "mtl_jax" / "compiled"


def keep(environment: Mapping[str, str], limit: int = _LIMIT) -> None:
  """Lets JAX keep compiled programs, and find again what this or another process has kept.

  What is found is what was compiled: JAX looks by program, options, versions, devices and their
  instruction sets. Nothing is changed where the user has chosen a folder of JAX's own
  (`JAX_COMPILATION_CACHE_DIR`) or wants none (`JAX_ENABLE_COMPILATION_CACHE=false`). A folder that
  cannot be written, or that others may write, whose programs could be anything, is warned of and
  left alone.

  Args:
    environment: of the process.
    limit: in bytes; beyond it the oldest programs are deleted.
  """
  if jax.config.jax_compilation_cache_dir is not None:
    return
  if not jax.config.jax_enable_compilation_cache:
    return
  try:
    path = folder(environment)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(path, os.W_OK) or path.stat().st_mode & 0o022:
      raise PermissionError(None, "one not writable by this user alone", str(path))
    _make_room(path, limit)
  except OSError as error:
    Console().warn(f"{error.filename}: expected a folder to keep compiled programs in, found: "
                   f"{error.strerror}; compiling anew")
    return
  jax.config.update("jax_compilation_cache_dir", str(path))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in environment:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _SECONDS)
  # A file that another process is writing, or left half written, is compiled anew instead.
  warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")


def _make_room(path: pathlib.Path, limit: int) -> None:
  """Deletes empty files, which an interrupted process left, and the oldest beyond the limit."""
  files, total = [], 0
  for file in path.glob("*-cache"):
    with contextlib.suppress(FileNotFoundError):  # another process may make room, too
      status = file.stat()
      files.append((status.st_mtime, status.st_size, file))
  for _, size, file in sorted(files, reverse=True):
    total += size
    if not size or total > limit:
      file.unlink(missing_ok=True)
