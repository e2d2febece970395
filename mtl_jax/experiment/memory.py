"""Memory that a step has freed, kept for the next one."""

from collections.abc import Mapping
import ctypes

import jax

# Of glibc's malloc.h; its manual, mallopt(3), says what they do.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_OWN = ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


def keep(environment: Mapping[str, str]) -> bool:
  """Lets this process keep freed memory, where steps run in the host's.

  A compiled program asks for its working memory at every call. The GNU C library gets large pieces
  from the system and gives them back at once, and the system clears every page of them anew: of a
  small network's step a fifth of the time. Kept, the process stays as large as it once was.

  Args:
    environment: of the process; where it sets the C library's own options, nothing is changed.

  Returns:
    Whether memory is kept: not on accelerators, and not with other C libraries.

  >>> keep({"MALLOC_ARENA_MAX": "4"})
  False
  """
  if jax.default_backend() != "cpu" or any(name in environment for name in _OWN):
    return False
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in macOS's
  if mallopt is None:
    return False
  # One arena without mapped pieces, of which nothing is given back. None of these is enough alone.
  options = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
  return all([mallopt(*option) == 1 for option in options])
