"""Memory kept by the process: what that spares, and where it is left alone."""

import pathlib
import subprocess
import sys

import jax
import pytest

from mtl_jax.experiment import memory

ROOT = pathlib.Path(__file__).parents[2]
FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from mtl_jax.experiment import memory

assert memory.keep({}) if sys.argv[1] == "kept" else True
x = jnp.ones((3000, 3000))
work = jax.jit(lambda x: jnp.cumsum(jnp.sin(x) @ x, axis=0) @ x)

for _ in range(5):
  jax.block_until_ready(work(x))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
  jax.block_until_ready(work(x))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the GNU C library's options")
def test_a_program_finds_the_memory_of_its_last_call():
  def faults(how):
    result = subprocess.run([sys.executable, "-c", FAULTS, how], cwd=ROOT, capture_output=True,
                            text=True)
    assert not result.returncode, result.stderr
    return int(result.stdout)

  assert faults("kept") < faults("returned") / 4


@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_ARENA_MAX"])
def test_the_users_own_options_stay(name):
  assert not memory.keep({name: "1"})


def test_on_accelerators_nothing_is_changed(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert not memory.keep({})
