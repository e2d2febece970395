"""The contract of the gradient engines, and the way back that they all walk."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.balancing import Balancer, Signals
from mtl_jax.balancing.balancer import Ahead, Lookahead, gramian_of, wide

Features = Mapping[str, Any]  # of each task, [B, ...], a pytree of such, as of maps, or None


class Backward(NamedTuple):
  """The way back through the part that tasks share, for each part of the batch.

  Attributes:
    feature_grads: a part: gradient of each task's loss with respect to its features, [B, ...];
      None for a task that takes no part in the step.
    pulls: a part: from cotangents of some tasks' features to gradients of the shared parameters.
    pushes: a part: from tangents of the shared parameters to those of each task's features; None
      where the engine did not ask for it.
    look_ahead: from a `Lookahead` and the weights [T] of its losses to what it found.
    shares_parameters: False where nothing is shared, so that there is nothing to balance.
    one_stream: whether all tasks read the same stream.
    one_representation: whether tasks of one stream read the very same features.
  """

  feature_grads: Sequence[Features]
  pulls: Sequence[Callable[[Features], Any]]
  pushes: Sequence[Callable[[Any], Features] | None]
  look_ahead: Callable[[Lookahead, jax.Array], Ahead]
  shares_parameters: bool
  one_stream: bool
  one_representation: bool

  def pull(self, weights: jax.Array, part: int = 0) -> Any:
    """The weighted sum of the tasks' gradients on a part, by one backward pass."""
    return self.pulls[part](weigh(self.feature_grads[part], weights))

  def slopes(self, tangents: Any, part: int = 0) -> jax.Array:
    """Derivatives [T] of the losses along a direction of the shared parameters.

    The trunk is passed forwards once, whatever T; heads and losses, whose gradients up to the
    features are known, are not passed again.
    """
    moved, grads = self.pushes[part](tangents), self.feature_grads[part]
    zero = jnp.zeros(())
    return jnp.stack([zero if grads[task] is None else _inner(grads[task], moved[task])
                      for task in grads])


class Engine(NamedTuple):
  """A way to obtain what a balancer looks at.

  Attributes:
    name: the word that users type.
    look: `look(balancer, signals, state, backward) -> (signals, rows, state)`: the signals with
      what the balancer needs; the task gradients, or None where it needs none; and the balancer's
      state with what the engine itself keeps there. Asked only where parameters are shared.
    objection: `objection(balancer, one_stream, one_representation) -> str | None`, what speaks
      against serving a method.
    adapt: the method as the engine serves it, with a state that holds what the engine keeps.
    forwards: whether it needs derivatives of the features along directions of the parameters.
    rows_of_parameters: whether rows, and directions made of them, are those of the shared
      parameters; else of the representation.
    estimates: whether the Gramian estimates that of the shared parameters.
  """

  name: str
  look: Callable[[Balancer, Signals, Any, Backward], tuple[Signals, Any, Any]]
  objection: Callable[[Balancer, bool, bool], str | None]
  adapt: Callable[[Balancer], Balancer] = lambda balancer: balancer
  forwards: bool = False
  rows_of_parameters: bool = False
  estimates: bool = False


def weigh(features: Features, weights: jax.Array) -> Features:
  """Each task's entry times its weight; weights [T] in the order of the tasks."""
  scaled = lambda tree, w: jax.tree.map(lambda x: x * w.astype(x.dtype), tree)
  return {t: scaled(x, w) for (t, x), w in zip(features.items(), weights)}


def by_rows(rows_of: Callable[[Backward, int], Any]
            ) -> Callable[[Balancer, Signals, Any, Backward], tuple[Signals, Any, Any]]:
  """The `look` of an engine that takes every task's gradient: `rows_of(backward, part)`, stacked."""
  def look(balancer: Balancer, signals: Signals, state: Any,
           backward: Backward) -> tuple[Signals, Any, Any]:
    parts = range(len(backward.pulls))
    rows = [rows_of(backward, part) for part in parts]
    signals = with_inner(balancer.needs, signals, lambda p, q: gramian_of(rows[p], rows[q]),
                         len(parts))
    return signals, rows[0] if balancer.needs & {"gramian", "task_grads"} else None, state
  return look


def with_inner(needs: frozenset[str], signals: Signals, inner: Callable[[int, int], jax.Array],
               parts: int) -> Signals:
  """Signals with what is needed of the inner products, which `inner(p, q) -> [T, T]` gives."""
  if "gramian" in needs:
    signals = signals._replace(gramian=inner(0, 0))
  if "cross_gramian" in needs:  # what the balancer leaves unread, XLA leaves out
    signals = signals._replace(cross_gramian=tuple(
        tuple(inner(p, q) for q in range(parts)) for p in range(parts)))
  if "products" in needs:
    signals = signals._replace(products=lambda weights, p=0, q=0: jnp.matmul(
        inner(p, q), weights, precision=jax.lax.Precision.HIGHEST))
  return signals


def _inner(one: Any, other: Any) -> jax.Array:
  """Inner product of two trees, in float32 or wider."""
  def leaf_inner(a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = wide(a.dtype)
    return jnp.vdot(a.astype(dtype), b.astype(dtype), precision=jax.lax.Precision.HIGHEST)
  products = jax.tree.leaves(jax.tree.map(leaf_inner, one, other))
  return sum(products[1:], products[0])
