"""GradDrop: of each coordinate, keep one sign."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, wide


def graddrop(leak: float | Sequence[float] | jax.Array = 0.0) -> Balancer:
  """Keeps in each coordinate only the gradients of one sign, drawn by how much agrees with it.

  The rule, coordinate by coordinate: `P = ½ (1 + Σ g_i / Σ |g_i|)`, `U` uniform in [0, 1); keep
  the positive gradients where `P > U`, the negative ones elsewhere. With `M_i` the mask of what
  is kept and `ℓ_i` the leak, `d = Σ (ℓ_i + (1 - ℓ_i) M_i) g_i`.

  Args:
    leak: a number in [0, 1], or one a task: the share of a dropped gradient that passes.

  Returns:
    A balancer that needs the stacked task gradients and returns a direction in their dtypes. It
    reports as weights the share of each gradient that was kept, `⟨kept_i, g_i⟩ / ‖g_i‖²`.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> draw = lambda key: balancing.aggregate(graddrop(), J, key=key)[0]
  >>> draws = jax.vmap(draw)(jax.random.split(jax.random.key(0), 1000))
  >>> sorted(set(map(tuple, draws.tolist())))
  [(-4.0, 2.0, 2.0), (6.0, 2.0, 2.0)]

  Reference:
    Chen, Ngiam, Huang, Luong, Kretzschmar, Chai, Anguelov: Just Pick a Sign: Optimizing Deep
    Multitask Models with Gradient Sign Dropout. NeurIPS 2020, arXiv:2010.06808.

  Differences:
    The paper acts on the gradients of the representation, multiplied by its sign and summed over
    the batch; here, as in TorchJD and the CAGrad code, it acts on whatever gradients it is given.
    Some codes multiply by T, or add an ε to the denominator; we do neither.
  """
  hyperparameters.check_numbers(
      "graddrop", "leak", leak, "a number in [0, 1], or one a task",
      lambda array: array.ndim <= 1 and ((array >= 0) & (array <= 1)).all())

  def init(num_tasks: int) -> tuple:
    hyperparameters.check_length("graddrop", "leak", leak, num_tasks)
    return ()

  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    active = signals.active
    leaves, structure = jax.tree.flatten(signals.task_grads)
    dtype = wide(*(leaf.dtype for leaf in leaves))
    leaks = jnp.broadcast_to(jnp.asarray(leak, dtype), active.shape)
    directions = []
    overlaps = squares = jnp.zeros(active.shape, dtype)
    for index, leaf in enumerate(leaves):
      grads = jnp.where(alongside(active, leaf), leaf, 0).astype(dtype)
      kept = keep_one_sign(grads, leaks, jax.random.fold_in(signals.key, index))
      directions.append(jnp.sum(kept, axis=0).astype(leaf.dtype))
      coordinates = tuple(range(1, leaf.ndim))
      overlaps += jnp.sum(kept * grads, axis=coordinates)
      squares += jnp.sum(grads * grads, axis=coordinates)
    weights = jnp.where(squares > 0, overlaps / jnp.where(squares > 0, squares, 1), 0)
    return Decision(weights, jax.tree.unflatten(structure, directions)), state

  return Balancer("graddrop", init, update, frozenset({"task_grads"}))


def alongside(values: jax.Array, leaf: jax.Array) -> jax.Array:
  """Values [T] in the shape [T, 1, …] of a stacked leaf's rank."""
  return values.reshape(-1, *(1,) * (leaf.ndim - 1))


def keep_one_sign(grads: jax.Array, leaks: jax.Array, key: jax.Array) -> jax.Array:
  """What is left of stacked gradients [T, …] when each coordinate drops one sign.

  Where all gradients are zero the share of positives is 0/0; nothing is there to keep.
  """
  total = jnp.sum(grads, axis=0, keepdims=True)
  size = jnp.sum(jnp.abs(grads), axis=0, keepdims=True)
  positive = 0.5 * (1 + total / jnp.where(size > 0, size, 1))
  draw = jax.random.uniform(key, total.shape, grads.dtype)
  chosen = jnp.where(positive > draw, grads > 0, grads < 0)
  return jnp.where(chosen, grads, alongside(leaks, grads) * grads)
