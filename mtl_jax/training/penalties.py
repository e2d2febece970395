"""Penalties on the size of the weights, added to the loss after balancing."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def decays(params: Any) -> Any:
  """Which parameters are penalised or decayed: kernels, not biases, norms' scales or scalars."""
  return jax.tree.map(lambda x: x.ndim > 1, params)


def _over_kernels(value: Callable[[jax.Array], jax.Array]) -> Callable[[Any], jax.Array]:
  def penalty(params: Any) -> jax.Array:
    chosen = zip(jax.tree.leaves(params), jax.tree.leaves(decays(params)))
    return sum((value(x) for x, decayed in chosen if decayed), start=jnp.zeros(()))
  return penalty


def l1(strength: float) -> Callable[[Any], jax.Array]:
  """`strength · Σ |θ|` over the kernels.

  >>> float(l1(0.5)({"kernel": jnp.array([[3., -1.]]), "bias": jnp.array([7.])}))
  2.0
  """
  return _over_kernels(lambda x: strength * jnp.abs(x).sum())


def l2(strength: float) -> Callable[[Any], jax.Array]:
  """`strength · Σ θ²` over the kernels.

  >>> float(l2(0.5)({"kernel": jnp.array([[3., -1.]]), "bias": jnp.array([7.])}))
  5.0
  """
  return _over_kernels(lambda x: strength * jnp.square(x).sum())


PENALTIES = {
    "l1": l1,
    "l2": l2,
}
