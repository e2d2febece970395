"""A dense layer's product with its kernel."""

import functools
from typing import Any

import flax.linen as nn
import jax
from jax import lax

from mtl_jax.models.operators import cpu, primitives
from mtl_jax.models.operators.convolution import ours
from mtl_jax.models.operators.window import Window

_ONE_PIXEL = Window(image=(1, 1), kernel=(1, 1), strides=(1, 1), padding=((0, 0), (0, 0)))


def dot(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: Any = None,
        **how: Any) -> jax.Array:
  """What `lax.dot_general` returns, for `nn.Dense(…, dot_general=dot)`.

  On CPUs the gradient of a kernel is faster where a vector has more entries than there are vectors,
  the more so for several tasks' cotangents. Everything but float [B, C] times [C, D] goes to
  `lax.dot_general`.

  Args:
    x: vectors [B, C].
    kernel: [C, D].
    dimension_numbers: the axes that are summed, and the batch axes.
    precision: of the products.
    **how: of `lax.dot_general`.

  Returns:
    [B, D].

  >>> import jax.numpy as jnp
  >>> dot(jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [4.0]]), (((1,), (0,)), ((), ()))).tolist()
  [[11.0]]
  """
  product_of_two = x.ndim == kernel.ndim == 2 and dimension_numbers == (((1,), (0,)), ((), ()))
  if product_of_two and precision is None and not how:
    images, kernels = x[:, None, None], kernel[None, None]
    if ours(images, kernels, cpu.LAYOUT):
      return primitives.conv(images, kernels, _ONE_PIXEL)[:, 0, 0]
  return lax.dot_general(x, kernel, dimension_numbers, precision, **how)


Dense = functools.partial(nn.Dense, dot_general=dot)
"""`nn.Dense` with `dot`; its parameters, their names and their initial values are the same."""
