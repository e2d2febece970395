"""How a model calls the modules that users bring."""

import inspect

import flax.linen as nn
import jax


def call_module(module: nn.Module, inputs: jax.Array, train: bool) -> jax.Array:
  """Calls a module, handing `train` only to those that take it."""
  if "train" in inspect.signature(type(module).__call__).parameters:
    return module(inputs, train=train)
  return module(inputs)
