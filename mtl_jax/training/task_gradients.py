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

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.balancing import Balancer, Decision, Signals
from mtl_jax.balancing.balancer import combine, gramian_of

ENGINES = ("exact", "features")

Features = Mapping[str, Any]  # of each task, [B, ...] or a pytree of such, as of maps


class Backward(NamedTuple):
  """The backward pass of the part that tasks share.

  Attributes:
    feature_grads: gradient of each task's loss with respect to its features, [B, ...].
    pull: from cotangents of each task's features to gradients of the shared parameters.
    shares_parameters: False where nothing is shared, so that there is nothing to balance.
    one_stream: whether all tasks read the same stream.
    one_representation: whether tasks of one stream read the very same features.
  """

  feature_grads: Features
  pull: Callable[[Features], Any]
  shares_parameters: bool
  one_stream: bool
  one_representation: bool


def _only(task: str, features: Features) -> Features:
  return {t: x if t == task else jax.tree.map(jnp.zeros_like, x) for t, x in features.items()}


def weigh(features: Features, weights: jax.Array) -> Features:
  """Each task's entry times its weight; weights [T] in the order of the tasks."""
  scaled = lambda tree, w: jax.tree.map(lambda x: x * w.astype(x.dtype), tree)
  return {t: scaled(x, w) for (t, x), w in zip(features.items(), weights)}


def _exact_rows(backward: Backward) -> Any:
  """Gradients of the shared parameters, stacked: leaves [T, ...]."""
  rows = [backward.pull(_only(t, backward.feature_grads)) for t in backward.feature_grads]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def _feature_rows(backward: Backward) -> Any:
  """Gradients of the representation, stacked: [T, B, ...], or [T, ...] summed over the batch."""
  def stacked(*grads):
    rows = grads if backward.one_stream else [g.sum(axis=0) for g in grads]
    shapes = {row.shape for row in rows}
    if len(shapes) > 1:
      raise ValueError("gradients: the features engine expected maps of one size for all tasks, "
                       f"found {sorted(shapes)}; use 'exact'")
    return jnp.stack(rows)
  return jax.tree.map(stacked, *backward.feature_grads.values())


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
    backward: the backward pass of the shared part.
    engine: one of `ENGINES`.

  Returns:
    The gradient of the shared parameters, the signals as the balancer saw them, its decision and
    its new state. With nothing shared the Gramian is zero; where the balancer was not due to look
    at gradients it is NaN.
  """
  check_engine(engine, balancer, one_stream=backward.one_stream,
               one_representation=backward.one_representation,
               shares_parameters=backward.shares_parameters)
  needs_rows = bool(balancer.needs & {"gramian", "task_grads"})
  if not needs_rows:
    decision, state = balancer.update(signals, state)
    return backward.pull(weigh(backward.feature_grads, decision.weights)), signals, decision, state
  if not backward.shares_parameters:
    num_tasks = signals.losses.shape[0]
    if "gramian" in balancer.needs:
      signals = signals._replace(gramian=jnp.zeros((num_tasks, num_tasks)))
    decision, state = balancer.update(signals._replace(task_grads={}), state)
    return {}, signals, decision, state

  def look(signals, state):
    rows = _exact_rows(backward) if engine == "exact" else _feature_rows(backward)
    if "gramian" in balancer.needs:
      signals = signals._replace(gramian=gramian_of(rows))
    decision, state = balancer.update(
        signals._replace(task_grads=rows) if "task_grads" in balancer.needs else signals, state)
    return _combined(backward, engine, rows, decision), signals, decision, state

  def keep(signals, state):
    num_tasks = signals.losses.shape[0]
    signals = signals._replace(gramian=jnp.full((num_tasks, num_tasks), jnp.nan))
    decision, state = balancer.update(signals, state)
    shared = backward.pull(weigh(backward.feature_grads, decision.weights))
    return shared, signals, decision, state

  if balancer.due is None:
    return look(signals, state)
  return jax.lax.cond(balancer.due(state), look, keep, signals, state)


def _combined(backward: Backward, engine: str, rows: Any, decision: Decision) -> Any:
  """The gradient of the shared parameters that a decision about these rows makes."""
  if engine == "exact":
    return combine(rows, decision.weights) if decision.direction is None else decision.direction
  if decision.direction is None:
    return backward.pull(weigh(backward.feature_grads, decision.weights))
  first = next(iter(backward.feature_grads))
  return backward.pull({**_only("", backward.feature_grads), first: decision.direction})
