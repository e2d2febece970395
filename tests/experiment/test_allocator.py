"""Freed memory stays with the process."""

import os
import platform
import subprocess
import sys

import pytest

from mtl_jax.experiment import allocator

COUNTED = """
import ctypes, resource
{first}
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def step():
  memory = libc.malloc(48 << 20)
  libc.memset(memory, 1, 48 << 20)
  libc.free(memory)
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


STEPPED = """
import os, resource
{first}
import jax, jax.numpy as jnp
@jax.jit
def step(x):  # works in 100 MiB
  return x @ x.T @ x
x = step(jnp.zeros((5120, 8))).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
  x = step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(first, program=COUNTED, **variables):
  """Of pages, when memory is taken again."""
  done = subprocess.run([sys.executable, "-c", program.format(first=first)], check=True,
                        env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True)
  return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")
def test_freed_memory_is_taken_again_without_faults():
  keep = "from mtl_jax.experiment import allocator; assert allocator.keep_freed({})"
  assert faults(keep) < 100 < faults("")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")
def test_a_large_program_takes_its_memory_again_without_faults():
  keep = ("from mtl_jax.experiment import allocator, config, fields\n"  # as launch.py does
          "fields.complete(config.load('configs/cifar_mtl.py', []))\n"
          "assert allocator.keep_freed(os.environ)")
  one = {"XLA_FLAGS": ""}  # device: what runs on several is handed to other threads
  assert faults(keep, STEPPED, **one) < 200_000 < 400_000 < faults("", STEPPED, **one)


def test_what_the_user_has_set_is_left_alone():
  assert not allocator.keep_freed({"MALLOC_TRIM_THRESHOLD_": "100000"})
  assert not allocator.keep_freed({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})


def test_other_c_libraries_are_left_alone(monkeypatch):
  monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
  assert not allocator.keep_freed({})
