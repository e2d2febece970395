"""The C library's allocator, set for programs that need the same memory at every step."""

from collections.abc import Mapping
import ctypes
import platform

import jax

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as glibc's malloc.h numbers them
_MOST = 2**31 - 1


def keep_freed(environment: Mapping[str, str]) -> bool:
  """Has freed memory, in pieces of up to 2 GiB, stay with the process where JAX computes on CPUs.

  XLA takes the memory of a whole step anew at every step. What is larger than 32 MiB glibc would
  give back to the system each time, and to fault its pages in again costs up to a fifth of a step.
  What is larger than 64 MiB it keeps for the main thread alone: so that this is where programs run,
  JAX no longer hands them to another, and a call of one on a single CPU returns when it is done, if
  what it reads is there already; what waits for copies to the device is handed on all the same.
  For this the process must not have used a device yet.

  Args:
    environment: variables; where they say anything of glibc's allocator, all is left as it is.

  Returns:
    Whether freed memory is kept: not on accelerators, nor for other C libraries.
  """
  chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in environment)
  if chosen or platform.libc_ver()[0] != "glibc":
    return False
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  if jax.default_backend() != "cpu":
    return False
  mallopt = ctypes.CDLL(None).mallopt
  return all(mallopt(what, _MOST) for what in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
