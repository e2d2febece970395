"""An estimate of the Gramian from the losses' derivatives along a few random directions."""

from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp

from mtl_jax.balancing import Balancer, Signals
from mtl_jax.balancing.wrappers import within
from mtl_jax.training.engines.engine import Backward, Engine


class Sketched(NamedTuple):
  """The state of a method beside the running estimate of its Gramian.

  Attributes:
    inner: of the method.
    total: [T, T] decaying sum of the estimates.
    seen: [T] decaying count of the estimates that a task took part in.
  """

  inner: Any
  total: jax.Array
  seen: jax.Array


def sketched(directions: int = 1, decay: float = 0.99) -> Engine:
  """Estimates the Gramian, for every method that needs no more, by forward passes of the trunk.

  With random signs `v`, `E[v vᵀ] = I`, so that `(J v)(J v)ᵀ` is on average `J Jᵀ`, and `J v`, the
  derivatives of all T losses along `v`, costs one forward pass whatever T. An entry `G_ij` of an
  estimate deviates by at most `√((G_ii G_jj + G_ij²) / n)` from `n` directions. They are gathered
  over steps by an exponential moving average, which makes `n` about `directions · (1 + decay) /
  (1 - decay)`, and the Gramian one of the last `1 / (1 - decay)` steps. The average starts at the
  first step without bias, and its Gramian is always positive semidefinite, of rank one a direction:
  at the start methods see fewer dimensions than there are tasks.

  What is estimated is the Gramian of a typical step. Where that of one step is mostly the noise of
  its batch, a method's weights are steadier here and not those that it gives to the step's own
  Gramian; `benchmarks/engines.py` measures both.

  Args:
    directions: random directions a step.
    decay: of the average, from 0 on and below 1. It counts steps at which the method looked; a
      task takes no part in steps without its labels, and the inner products of tasks that are
      rarely there together are drawn to zero.

  Raises:
    ValueError: where there is no direction, or the decay is out of its range.

  >>> from mtl_jax import balancing
  >>> sketched().objection(balancing.graddrop(), True, True)
  'needs more than the Gramian'
  """
  if directions < 1:
    raise ValueError(f"directions: expected 1 or more a step, found {directions!r}")
  if not 0 <= decay < 1:
    raise ValueError(f"decay: expected a number in [0, 1), found {decay!r}")

  def look(balancer: Balancer, signals: Signals, state: Any,
           backward: Backward) -> tuple[Signals, Any, Any]:
    if "gramian" not in balancer.needs:
      return signals, None, state
    active, dtype = signals.active, state.total.dtype
    fresh = sketch(backward, signals.key, directions).astype(dtype)
    # Of two tasks, the root of both decays: so the average stays positive semidefinite.
    kept = jnp.where(active, decay, 1).astype(dtype)
    both = active[:, None] & active[None]
    total = jnp.sqrt(kept[:, None] * kept[None]) * state.total + jnp.where(
        both, (1 - decay) * fresh, 0)
    seen = kept * state.seen + jnp.where(active, 1 - decay, 0).astype(dtype)
    roots = jnp.sqrt(jnp.where(seen > 0, seen, 1))
    signals = signals._replace(gramian=total / roots[:, None] / roots[None])
    return signals, None, state._replace(total=total, seen=seen)

  return Engine("sketched", look, _objection, _beside, forwards=True, estimates=True)


def sketch(backward: Backward, key: jax.Array, directions: int) -> jax.Array:
  """The estimate [T, T] of the Gramian of part 0 from so many random directions."""
  like = jax.eval_shape(backward.pulls[0], backward.feature_grads[0])
  key = jax.random.fold_in(key, zlib.crc32(b"directions"))  # methods draw from the key itself
  slopes = jnp.stack([backward.slopes(signs(jax.random.fold_in(key, i), like))
                      for i in range(directions)])
  return jnp.matmul(slopes.T, slopes, precision=jax.lax.Precision.HIGHEST) / directions


def signs(key: jax.Array, like: Any) -> Any:
  """A tree of random signs, ±1 with even odds, of the shapes and dtypes of another.

  >>> tree = signs(jax.random.key(0), {"w": jnp.zeros((2, 2)), "b": jnp.zeros(3)})
  >>> tree["w"].shape, sorted(set(jnp.abs(tree["b"]).tolist()))
  ((2, 2), [1.0])
  """
  leaves, structure = jax.tree.flatten(like)

  def of(leaf: Any, key: jax.Array) -> jax.Array:
    words = jax.random.bits(key, (-(-leaf.size // 32), 1), jnp.uint32)  # 32 signs each
    bits = words >> jnp.arange(32, dtype=jnp.uint32)[None] & jnp.uint32(1)
    return (2 * bits.reshape(-1)[:leaf.size].reshape(leaf.shape).astype(leaf.dtype) - 1)
  return jax.tree.unflatten(structure, [
      of(leaf, jax.random.fold_in(key, i)) for i, leaf in enumerate(leaves)])


def _objection(balancer: Balancer, one_stream: bool, one_representation: bool) -> str | None:
  del one_stream, one_representation
  if balancer.needs & {"cross_gramian", "task_grads", "products"}:
    return "needs more than the Gramian"
  return None


def _beside(balancer: Balancer) -> Balancer:
  """The method with the running estimate beside its state."""
  if "gramian" not in balancer.needs:
    return balancer

  def init(num_tasks: int) -> Sketched:
    return Sketched(balancer.init(num_tasks), jnp.zeros((num_tasks, num_tasks)),
                    jnp.zeros(num_tasks))

  def update(signals: Signals, state: Sketched) -> tuple[Any, Sketched]:
    decision, inner = balancer.update(signals, state.inner)
    return decision, state._replace(inner=inner)

  due = balancer.due and (lambda state: balancer.due(state.inner))
  return balancer._replace(init=init, update=update, due=due, **within(balancer))
