"""Convolution, alone and followed by max-pooling."""

from collections.abc import Sequence
import functools
import math
from typing import Any

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from mtl_jax.models.operators import cpu, primitives
from mtl_jax.models.operators.max_pooling import MOST_PLACES, max_pool
from mtl_jax.models.operators.window import window_of


def conv(lhs: jax.Array, rhs: jax.Array, window_strides: Sequence[int],
         padding: str | Sequence[tuple[int, int]], lhs_dilation: Sequence[int] | None = None,
         rhs_dilation: Sequence[int] | None = None, dimension_numbers: Any = None,
         feature_group_count: int = 1, precision: Any = None) -> jax.Array:
  """What `lax.conv_general_dilated` returns, for `nn.Conv(…, conv_general_dilated=conv)`.

  Faster on CPUs for two-dimensional convolutions of float maps [B, H, W, C] with kernels
  [h, w, C, D], without groups and dilation; everything else goes to `lax.conv_general_dilated`.

  Args:
    lhs: maps [B, H, W, C].
    rhs: kernel [h, w, C, D].
    window_strides: of the rows and columns.
    padding: "SAME", "VALID" or ((above, below), (left, right)) in pixels.
    lhs_dilation: of the maps.
    rhs_dilation: of the kernel.
    dimension_numbers: the layout.
    feature_group_count: number of groups.
    precision: of the products.

  Returns:
    Maps [B, H', W', D].

  >>> x, kernel = jnp.arange(9.0).reshape(1, 3, 3, 1), jnp.ones((2, 2, 1, 1))
  >>> conv(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))[0, :, :, 0]
  Array([[ 8., 12.],
         [20., 24.]], dtype=float32)
  """
  dilated = any(d != 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
  plain = feature_group_count == 1 and precision is None and not dilated
  if plain and ours(lhs, rhs, dimension_numbers):
    window = window_of(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
    if min(window.out) > 0:
      return primitives.conv(lhs, rhs, window)
  return lax.conv_general_dilated(
      lhs, rhs, window_strides, padding, lhs_dilation=lhs_dilation, rhs_dilation=rhs_dilation,
      dimension_numbers=dimension_numbers, feature_group_count=feature_group_count,
      precision=precision)


Conv = functools.partial(nn.Conv, conv_general_dilated=conv)
"""`nn.Conv` with `conv`; its parameters, their names and their initial values are the same."""


def conv_relu_max_pool(x: jax.Array, kernel: jax.Array, bias: jax.Array,
                       padding: str | Sequence[tuple[int, int]],
                       pool: tuple[int, int]) -> jax.Array:
  """A convolution of stride 1 with bias, ReLU, and the maximum of each window, side by side.

  On CPUs the output of the convolution is never in memory, nor is its gradient: a part of the
  batch at a time goes through all. The gradient goes to a window's first maximum, row by row.

  Args:
    x: maps [B, H, W, C].
    kernel: [h, w, C, D].
    bias: [D].
    padding: "SAME", "VALID" or ((above, below), (left, right)) in pixels.
    pool: rows and columns of a window.

  Returns:
    Maps [B, H', W', D].

  >>> x, kernel = jnp.arange(16.0).reshape(1, 4, 4, 1), jnp.ones((1, 1, 1, 1))
  >>> conv_relu_max_pool(x, kernel, jnp.array([-6.0]), "VALID", (2, 2))[0, :, :, 0]
  Array([[0., 1.],
         [7., 9.]], dtype=float32)
  """
  if ours(x, kernel, cpu.LAYOUT) and math.prod(pool) <= MOST_PLACES:
    window = window_of(x.shape[1:3], kernel.shape[:2], (1, 1), padding, pool)
    if min(window.pooled) > 0:
      return primitives.conv_relu_max_pool(x, kernel, bias, window)
  x = max_pool(conv(x, kernel, (1, 1), padding, dimension_numbers=cpu.LAYOUT), pool, pool)
  return nn.relu(x + bias[None, None, None])


def ours(x: jax.Array, kernel: jax.Array, layout: Any) -> bool:
  """On CPUs, float arrays of four known, positive sizes in the canonical layout."""
  if jax.default_backend() != "cpu" or x.ndim != 4 or kernel.ndim != 4:
    return False
  sizes = (*x.shape[1:], *kernel.shape)
  return (x.dtype == kernel.dtype and jnp.issubdtype(x.dtype, jnp.floating)
          and x.shape[3] == kernel.shape[2] and 0 not in x.shape
          and all(isinstance(size, int) and size > 0 for size in sizes)
          and lax.conv_dimension_numbers(x.shape, kernel.shape, layout)
          == lax.conv_dimension_numbers(x.shape, kernel.shape, cpu.LAYOUT))
