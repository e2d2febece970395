"""How programs are compiled for the devices of a mesh."""

import jax
import jax.numpy as jnp
import pytest

from mtl_jax.models.operators import conv
from mtl_jax.training import sharding


@pytest.fixture
def asked_anew():
  sharding._options.cache_clear()
  yield
  sharding._options.cache_clear()


def test_convolutions_on_cpus_take_all_cores():
  mesh = sharding.data_mesh(jax.devices()[:1])
  step = sharding.sharded_step(lambda kernel, x: (kernel, conv(
      x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))), mesh)
  program = step.lower(jnp.ones((3, 3, 32, 64)), jnp.ones((8, 16, 16, 32))).compile().as_text()
  assert "convolution(" in program
  assert "__ynn_fusion" not in program


def test_an_xla_without_the_option_compiles_by_its_own_choice(asked_anew, monkeypatch):
  monkeypatch.setattr(sharding, "_ON_CPU", {"xla_cpu_no_such_option": "x"})
  mesh = sharding.data_mesh(jax.devices()[:1])
  step = sharding.sharded_step(lambda state, batch: (state + 1, batch), mesh)
  assert step(jnp.ones(()), jnp.ones(2))[0] == 2


def test_accelerators_compile_by_xlas_own_choice():
  assert sharding._options("gpu") is None
