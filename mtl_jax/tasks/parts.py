"""Labels that may be missing, as a whole or part by part, and losses over what is there."""

import jax
import jax.numpy as jnp


def present(labels: jax.Array) -> jax.Array:
  """Which entries of labels are there; integer -1 and float NaN are missing.

  >>> present(jnp.array([3, -1])).tolist(), present(jnp.array([[0.5, jnp.nan]])).tolist()
  ([True, False], [[True, False]])
  """
  return ~jnp.isnan(labels) if jnp.issubdtype(labels.dtype, jnp.floating) else labels >= 0


def filled(labels: jax.Array) -> jax.Array:
  """Labels with 0 for what is missing; a NaN would come through the gradient of any mask.

  >>> filled(jnp.array([3, -1])).tolist(), filled(jnp.array([[0.5, jnp.nan]])).tolist()
  ([3, 0], [[0.5, 0.0]])
  """
  return jnp.where(present(labels), labels, 0)


def mean_of_parts(values: jax.Array, there: jax.Array) -> jax.Array:
  """Each example's mean over the parts that are there: [B, …] -> [B]; 0 where none is.

  >>> mean_of_parts(jnp.array([[1., 3.], [5., 7.], [9., 9.]]),
  ...               jnp.array([[True, True], [False, True], [False, False]])).tolist()
  [2.0, 7.0, 0.0]
  """
  axes = tuple(range(1, values.ndim))
  count = there.sum(axis=axes, dtype=jnp.int32)
  return jnp.where(there, values, 0).sum(axis=axes) / jnp.maximum(count, 1).astype(values.dtype)


def outputs_like(name: str, outputs: jax.Array, labels: jax.Array) -> jax.Array:
  """Outputs in float32, in the labels' shape or with a last axis of 1 besides, which goes.

  Raises:
    ValueError: where they have another shape.
  """
  if outputs.shape not in (labels.shape, (*labels.shape, 1)):
    raise ValueError(f"task {name}: expected outputs {list(labels.shape)} like its labels, "
                     f"found {list(outputs.shape)}")
  return outputs.astype(jnp.float32).reshape(labels.shape)
