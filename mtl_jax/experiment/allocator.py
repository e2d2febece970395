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
  give back to the system each time, and to fault its pages in again costs up to a tenth of a step.

  Args:
    environment: variables; what they say of glibc's allocator is left as it is.

  Returns:
    Whether it was set: not on accelerators, nor for other C libraries.
  """
  chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in environment)
  if chosen or jax.default_backend() != "cpu" or platform.libc_ver()[0] != "glibc":
    return False
  mallopt = ctypes.CDLL(None).mallopt
  return all(mallopt(what, _MOST) for what in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
