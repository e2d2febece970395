"""Gradient engines: how the tasks' gradients, or their inner products, are obtained.

An engine is one word, valid for every balancing method that it can serve:

  exact     gradients of the shared parameters, one backward pass of the trunk a task.
  features  gradients of the shared representation, one backward pass of the trunk whatever T
            (Sener and Koltun, NeurIPS 2018, arXiv:1810.04650, call it MGDA-UB). Where all tasks
            read one stream, inner products are taken example by example; where they do not, the
            gradients are summed over the batch first, since examples of different streams do not
            correspond. Norms are those in feature space: methods whose weights depend on the
            gradients' size, and bounds such as `max_norm`, then make steps of another length.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.balancing import Balancer, Decision, Signals
from mtl_jax.balancing.balancer import Ahead, Lookahead, combine, gramian_of

ENGINES = ("exact", "features")
_LOOKED_FOR = {"gramian", "cross_gramian", "task_grads", "lookahead"}  # beyond the losses

Features = Mapping[str, Any]  # of each task, [B, ...], a pytree of such, as of maps, or None


class Backward(NamedTuple):
  """The way back through the part that tasks share, for each part of the batch.

  Attributes:
    feature_grads: a part: gradient of each task's loss with respect to its features, [B, ...];
      None for a task that takes no part in the step.
    pulls: a part: from cotangents of each task's features to gradients of the shared parameters.
    look_ahead: from a `Lookahead` and the weights [T] of its losses to what it found.
    shares_parameters: False where nothing is shared, so that there is nothing to balance.
    one_stream: whether all tasks read the same stream.
    one_representation: whether tasks of one stream read the very same features.
  """

  feature_grads: Sequence[Features]
  pulls: Sequence[Callable[[Features], Any]]
  look_ahead: Callable[[Lookahead, jax.Array], Ahead]
  shares_parameters: bool
  one_stream: bool
  one_representation: bool

  def pull(self, weights: jax.Array, part: int = 0) -> Any:
    """The weighted sum of the tasks' gradients on a part, by one backward pass."""
    return self.pulls[part](weigh(self.feature_grads[part], weights))


def _only(task: str, features: Features) -> Features:
  return {t: x if t == task else jax.tree.map(jnp.zeros_like, x) for t, x in features.items()}


def weigh(features: Features, weights: jax.Array) -> Features:
  """Each task's entry times its weight; weights [T] in the order of the tasks."""
  scaled = lambda tree, w: jax.tree.map(lambda x: x * w.astype(x.dtype), tree)
  return {t: scaled(x, w) for (t, x), w in zip(features.items(), weights)}


def _exact_rows(backward: Backward, part: int) -> Any:
  """Gradients of the shared parameters, stacked: leaves [T, ...]."""
  grads = backward.feature_grads[part]
  rows = [backward.pulls[part](_only(task, grads)) if grads[task] is not None else None
          for task in grads]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *_with_zeros(rows))


def _with_zeros(rows: Sequence[Any]) -> list[Any]:
  """The rows with zeros in place of None, of those tasks that take no part."""
  zeros = jax.tree.map(jnp.zeros_like, next(row for row in rows if row is not None))
  return [zeros if row is None else row for row in rows]


def _feature_rows(backward: Backward, part: int) -> Any:
  """Gradients of the representation, stacked: [T, B, ...], or [T, ...] summed over the batch."""
  by_example = backward.one_stream and len(backward.pulls) == 1  # parts hold other examples

  def stacked(*grads):
    rows = grads if by_example else [g.sum(axis=0) for g in grads]
    shapes = {row.shape for row in rows}
    if len(shapes) > 1:
      raise ValueError("gradients: the features engine expected maps of one size for all tasks, "
                       f"found {sorted(shapes)}; use 'exact'")
    return jnp.stack(rows)
  return jax.tree.map(stacked, *_with_zeros(list(backward.feature_grads[part].values())))


def check_engine(engine: str, balancer: Balancer, *, one_stream: bool, one_representation: bool,
                 shares_parameters: bool = True) -> None:
  """Raises ValueError where an engine cannot serve a method."""
  if engine not in ENGINES:
    raise ValueError(f"gradients: expected one of {list(ENGINES)}, found {engine!r}")
  if not shares_parameters:
    return
  if engine == "features" and "gradient_state" in balancer.needs:
    raise ValueError(f"gradients: {balancer.name} keeps gradients of the shared parameters from "
                     "step to step; use 'exact'")
  if (engine == "features" and "task_grads" in balancer.needs
      and not (one_stream and one_representation)):
    raise ValueError(f"gradients: {balancer.name} returns a direction, which the features engine "
                     "can apply only where all tasks share the features of one stream; use 'exact'")


def balance(balancer: Balancer, signals: Signals, state: Any, backward: Backward,
            engine: str) -> tuple[Any, Signals, Decision, Any]:
  """Obtains what the balancer needs, asks it, and forms the shared gradient.

  Args:
    balancer: the method; the engine computes what its `needs` say and nothing else.
    signals: losses, active tasks and key.
    state: of the balancer.
    backward: the way back through the shared part.
    engine: one of `ENGINES`.

  Returns:
    The gradient of the shared parameters, the signals as the balancer saw them, its decision and
    its new state. With nothing shared inner products are zero; where the balancer was not due to
    look they are NaN.
  """
  check_engine(engine, balancer, one_stream=backward.one_stream,
               one_representation=backward.one_representation,
               shares_parameters=backward.shares_parameters)

  def look(signals: Signals, state: Any) -> tuple[Any, Signals, Decision, Any]:
    signals, rows = _signals(balancer, signals, state, backward, engine)
    decision, state = balancer.update(signals._replace(task_grads=rows), state)
    return _combined(backward, engine, rows, decision), signals, decision, state

  def keep(signals: Signals, state: Any) -> tuple[Any, Signals, Decision, Any]:
    shapes, _ = jax.eval_shape(
        lambda: _signals(balancer, signals, state, backward, engine))
    unseen = {name: getattr(shapes, name) for name in ("gramian", "cross_gramian", "ahead")}
    signals = signals._replace(**jax.tree.map(
        lambda x: jnp.full(x.shape, jnp.nan, x.dtype), unseen))
    decision, state = balancer.update(signals, state)
    return _combined(backward, engine, None, decision), signals, decision, state

  if balancer.due is None or not balancer.needs & _LOOKED_FOR:
    return look(signals, state)
  return jax.lax.cond(balancer.due(state), look, keep, signals, state)


def diagnose(balancer: Balancer, signals: Signals, state: Any, decision: Decision,
             backward: Backward, engine: str, due: jax.Array) -> dict[str, jax.Array]:
  """The exact Gramian, whatever the method needs, and what the engine makes of it.

  Args:
    balancer: the method.
    signals: as the method saw them.
    state: of the balancer, as it was before the decision.
    decision: the method's.
    backward: the way back through the shared part.
    engine: by which the decision was made.
    due: [] bool; otherwise nothing is computed and all is NaN.

  Returns:
    gramian [T, T], that of the shared parameters on part 0; and, where the method decided on
    another engine's Gramian, weights_error [], the largest difference of a weight from what the
    method decides on the exact one.
  """
  compares = engine != "exact" and "gramian" in balancer.needs

  def exact() -> dict[str, jax.Array]:
    rows = _exact_rows(backward, 0) if backward.shares_parameters else None
    size = signals.losses.shape[0]
    found = {"gramian": gramian_of(rows) if rows else jnp.zeros((size, size))}
    if compares:
      same = balancer.update(signals._replace(gramian=found["gramian"]), state)[0]
      found["weights_error"] = jnp.max(jnp.abs(same.weights - decision.weights))
    return found

  nothing = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(exact))
  return jax.lax.cond(due, exact, lambda: nothing)


def _signals(balancer: Balancer, signals: Signals, state: Any, backward: Backward,
             engine: str) -> tuple[Signals, Any]:
  """Signals with what the balancer needs, and the rows of part 0 if it needs any."""
  num_tasks, needs = signals.losses.shape[0], balancer.needs
  parts = len(backward.pulls)
  if "lookahead" in needs:
    plan = balancer.lookahead
    signals = signals._replace(ahead=backward.look_ahead(
        plan, plan.weights(state, signals.active)))
  if not backward.shares_parameters:
    none = jnp.zeros((num_tasks, num_tasks))
    return _with_products(needs, signals, lambda p, q: none, parts), {}
  if not needs & {"gramian", "cross_gramian", "task_grads"}:
    return signals, None
  rows_of = _exact_rows if engine == "exact" else _feature_rows
  rows = [rows_of(backward, part) for part in range(parts)]
  products = lambda p, q: gramian_of(rows[p], rows[q])
  return _with_products(needs, signals, products, parts), (
      rows[0] if needs & {"gramian", "task_grads"} else None)


def _with_products(needs: frozenset[str], signals: Signals,
                   products: Callable[[int, int], jax.Array], parts: int) -> Signals:
  """Signals with the inner products that are needed, which `products(p, q)` gives."""
  if "gramian" in needs:
    signals = signals._replace(gramian=products(0, 0))
  if "cross_gramian" in needs:  # what the balancer leaves unread, XLA leaves out
    signals = signals._replace(cross_gramian=tuple(
        tuple(products(p, q) for q in range(parts)) for p in range(parts)))
  return signals


def _combined(backward: Backward, engine: str, rows: Any, decision: Decision) -> Any:
  """The gradient of the shared parameters that a decision makes."""
  if not backward.shares_parameters:
    return {}
  if decision.part_weights is not None:
    parts = [backward.pull(weights, part) for part, weights in enumerate(decision.part_weights)]
    return jax.tree.map(lambda *grads: sum(grads[1:], grads[0]), *parts)
  if decision.direction is None:
    use_rows = engine == "exact" and rows is not None
    return combine(rows, decision.weights) if use_rows else backward.pull(decision.weights)
  if engine == "exact":
    return decision.direction
  first, grads = next(iter(backward.feature_grads[0])), backward.feature_grads[0]
  return backward.pulls[0]({**_only("", grads), first: decision.direction})
