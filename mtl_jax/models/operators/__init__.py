"""Convolution, dense layers and max-pooling that are fast on CPUs as well.

They have any derivative, also under vmap. On accelerators these are XLA's own.
"""

from mtl_jax.models.operators.convolution import Conv, conv, conv_relu_max_pool
from mtl_jax.models.operators.dense import Dense
from mtl_jax.models.operators.max_pooling import max_pool

__all__ = ["Conv", "Dense", "conv", "conv_relu_max_pool", "max_pool"]
