"""From the tasks' gradients, by whichever engine, to the gradient of what they share."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing import Balancer, Decision, Signals
from mtl_jax.balancing.balancer import combine, gramian_of
from mtl_jax.training import engines
from mtl_jax.training.engines import Backward, Engine
from mtl_jax.training.engines.engine import with_inner
from mtl_jax.training.engines.exact import rows_of

BY_ROWS = {"gramian", "cross_gramian", "task_grads"}  # of the tasks' gradients
_BY_GRADIENTS = BY_ROWS | {"products"}
_LOOKED_FOR = _BY_GRADIENTS | {"lookahead"}  # beyond the losses


def check_engine(engine: str | Engine, balancer: Balancer, *, one_stream: bool,
                 one_representation: bool, shares_parameters: bool = True) -> None:
  """Raises ValueError where an engine cannot serve a method, naming those that can.

  Args:
    engine: a word, or an engine.
    balancer: the method, before or after the engine adapted it.
    one_stream: whether all tasks read the same stream.
    one_representation: whether tasks of one stream read the very same features.
    shares_parameters: where nothing is shared, every engine will do.

  >>> from mtl_jax import balancing
  >>> check_engine("matrix_free", balancing.pcgrad(), one_stream=True,
  ...              one_representation=True)  # doctest: +ELLIPSIS
  Traceback (most recent call last):
  ...
  ValueError: gradients: pcgrad does not work from products with the Gramian; use 'exact', ...
  """
  engine = engines.get(engine)
  if not shares_parameters or not balancer.needs & _BY_GRADIENTS:
    return
  if objection := engine.objection(balancer, one_stream, one_representation):
    *others, last = [repr(name) for name, made in engines.ENGINES.items()
                     if not made().objection(balancer, one_stream, one_representation)]
    able = f"{', '.join(others)} or {last}" if others else last
    raise ValueError(f"gradients: {balancer.name} {objection}; use {able}")


def balance(balancer: Balancer, signals: Signals, state: Any, backward: Backward,
            engine: Engine) -> tuple[Any, Signals, Decision, Any]:
  """Obtains what the balancer needs, asks it, and forms the shared gradient.

  Args:
    balancer: the method as the engine adapted it; the engine computes what its `needs` say and
      nothing else.
    signals: losses, active tasks and key.
    state: of the balancer.
    backward: the way back through the shared part.
    engine: that serves the method.

  Returns:
    The gradient of the shared parameters, the signals as the balancer saw them, its decision and
    its new state. With nothing shared inner products are zero; where the balancer was not due to
    look they are NaN.
  """
  check_engine(engine, balancer, one_stream=backward.one_stream,
               one_representation=backward.one_representation,
               shares_parameters=backward.shares_parameters)

  def look(signals: Signals, state: Any) -> tuple[Any, Signals, Decision, Any]:
    signals, rows, state = _look(balancer, signals, state, backward, engine)
    decision, state = balancer.update(signals._replace(task_grads=rows), state)
    shown = signals._replace(products=None)  # a function, and no branch can return it
    return _combined(backward, engine, rows, decision), shown, decision, state

  def keep(signals: Signals, state: Any) -> tuple[Any, Signals, Decision, Any]:
    shapes = jax.eval_shape(lambda: _look(
        balancer, signals, state, backward, engine)[0]._replace(products=None))
    unseen = {name: getattr(shapes, name) for name in ("gramian", "cross_gramian", "ahead")}
    shown = signals._replace(**jax.tree.map(
        lambda x: jnp.full(x.shape, jnp.nan, x.dtype), unseen))
    nothing = lambda weights, p=0, q=0: jnp.full_like(weights, jnp.nan)
    decision, state = balancer.update(shown._replace(products=nothing), state)
    return _combined(backward, engine, None, decision), shown, decision, state

  if balancer.due is None or not balancer.needs & _LOOKED_FOR:
    return look(signals, state)
  return jax.lax.cond(balancer.due(state), look, keep, signals, state)


def diagnose(balancer: Balancer, signals: Signals, state: Any, decision: Decision,
             backward: Backward, engine: Engine, due: jax.Array) -> dict[str, jax.Array]:
  """The exact Gramian, whatever the method needs, and what the engine makes of it.

  Args:
    balancer: the method as the engine adapted it.
    signals: as the method saw them.
    state: of the balancer, as it was before the decision.
    decision: the method's.
    backward: the way back through the shared part.
    engine: by which the decision was made.
    due: [] bool; otherwise nothing is computed and all is NaN.

  Returns:
    gramian [T, T], that of the shared parameters on part 0; where the method decided on products
    or on another engine's Gramian, weights_error [], the largest difference of a weight from what
    the method decides on the exact one; and, where that Gramian was an estimate, gramian_error [],
    its distance from the exact one relative to the length of that (Frobenius).
  """
  needs = balancer.needs
  parts = len(backward.pulls) if "products" in needs else 1
  compares = engine.name != "exact" and needs & {"gramian", "products"}

  def exact() -> dict[str, jax.Array]:
    size = signals.losses.shape[0]
    inner = lambda p, q: jnp.zeros((size, size))
    if backward.shares_parameters:
      rows = [rows_of(backward, part) for part in range(parts)]
      inner = lambda p, q: gramian_of(rows[p], rows[q])
    found = {"gramian": inner(0, 0)}
    if compares:
      wanted = {"gramian", "cross_gramian"} if parts > 1 else {"gramian"}
      same = balancer.update(with_inner(frozenset(wanted), signals, inner, parts), state)[0]
      found["weights_error"] = jnp.max(jnp.abs(same.weights - decision.weights))
    if engine.estimates and signals.gramian is not None:
      away, whole = signals.gramian - found["gramian"], jnp.linalg.norm(found["gramian"])
      found["gramian_error"] = jnp.linalg.norm(away) / jnp.where(whole > 0, whole, 1)
    return found

  nothing = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(exact))
  return jax.lax.cond(due, exact, lambda: nothing)


def _look(balancer: Balancer, signals: Signals, state: Any, backward: Backward,
          engine: Engine) -> tuple[Signals, Any, Any]:
  """Signals with what the balancer needs, the rows of part 0 if it needs any, and its state."""
  needs = balancer.needs
  if "lookahead" in needs:
    plan = balancer.lookahead
    signals = signals._replace(ahead=backward.look_ahead(
        plan, plan.weights(state, signals.active)))
  if not backward.shares_parameters:
    none = jnp.zeros((signals.losses.shape[0],) * 2)
    return with_inner(needs, signals, lambda p, q: none, len(backward.pulls)), {}, state
  if not needs & _BY_GRADIENTS:
    return signals, None, state
  return engine.look(balancer, signals, state, backward)


def _combined(backward: Backward, engine: Engine, rows: Any, decision: Decision) -> Any:
  """The gradient of the shared parameters that a decision makes."""
  if not backward.shares_parameters:
    return {}
  if decision.part_weights is not None:
    parts = [backward.pull(weights, part) for part, weights in enumerate(decision.part_weights)]
    return jax.tree.map(lambda *grads: sum(grads[1:], grads[0]), *parts)
  if decision.direction is None:
    use_rows = engine.rows_of_parameters and rows is not None
    return combine(rows, decision.weights) if use_rows else backward.pull(decision.weights)
  if engine.rows_of_parameters:
    return decision.direction
  first = next(task for task, x in backward.feature_grads[0].items() if x is not None)
  return backward.pulls[0]({first: decision.direction})
