"""What can be laid over any method that it makes sense for: a balancer in, a balancer out."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters
from mtl_jax.balancing.balancer import Balancer, Decision, Signals

REDUCTIONS = ("paper", "sum", "mean")


class EveryState(NamedTuple):
  """State of `every`."""

  inner: Any
  weights: jax.Array  # shape=(T,), of the last update that counted
  active: jax.Array  # shape=(T,), bool, the tasks that took part in it
  count: jax.Array  # shape=(), int32, updates so far


def every(balancer: Balancer, k: int) -> Balancer:
  """Asks the method at every k-th step and keeps its weights in between.

  In between no task gradient is needed, so a step costs what equal weights cost. A task that was
  absent when the method was asked keeps weight one-T-th of the others' sum until the next time.

  Args:
    balancer: a method that decides by weights.
    k: 1 or more.

  Returns:
    A balancer whose `due` says when gradients are looked at.
  """
  if not (isinstance(k, int) and not isinstance(k, bool) and k >= 1):
    raise hyperparameters.mistake(balancer.name, "every", "a whole number of steps, 1 or more", k)
  if k == 1:
    return balancer
  _check_weights(balancer, "every")

  def init(num_tasks: int) -> EveryState:
    return EveryState(balancer.init(num_tasks), jnp.ones(num_tasks),
                      jnp.zeros(num_tasks, bool), jnp.zeros((), jnp.int32))

  def due(state: EveryState) -> jax.Array:
    return state.count % k == 0

  def update(signals: Signals, state: EveryState) -> tuple[Decision, EveryState]:
    def ask(state):
      decision, inner = balancer.update(signals, state.inner)
      weights = decision.weights.astype(state.weights.dtype)
      return weights, EveryState(inner, weights, signals.active, state.count + 1)

    def keep(state):
      present = jnp.maximum(state.active.sum(dtype=state.weights.dtype), 1)
      typical = jnp.where(state.active, state.weights, 0).sum() / present
      weights = jnp.where(state.active, state.weights, typical)
      return jnp.where(signals.active, weights, 0), state._replace(count=state.count + 1)

    weights, state = jax.lax.cond(due(state), ask, keep, state)
    return Decision(weights), state

  return balancer._replace(init=init, update=update, due=due, **within(balancer),
                           **_by_products(balancer, lambda searching: every(searching, k)))


class SmoothedState(NamedTuple):
  """State of `smoothed`."""

  inner: Any
  weights: jax.Array  # shape=(T,), the average
  seen: jax.Array  # shape=(T,), bool, whether the task has entered it


def smoothed(balancer: Balancer, decay: float) -> Balancer:
  """Averages the weights over steps: `λ_t = α λ_{t-1} + (1 - α) λ̂_t`, `λ_0 = λ̂_0`.

  CR-MOGM of Zhou, Zhang, Jiang, Wang, Wang: On the Convergence of Stochastic Multi-Objective
  Gradient Manipulation and Beyond (NeurIPS 2022), which shows that averaged weights make the
  gradient methods converge.

  Args:
    balancer: a method that decides by weights.
    decay: α, at least 0 and below 1; the paper's is 0.9.
  """
  hyperparameters.check_numbers(balancer.name, "smoothed", decay, "a number in [0, 1)",
                                lambda array: array.ndim == 0 and 0 <= array < 1)
  _check_weights(balancer, "smoothed")

  def init(num_tasks: int) -> SmoothedState:
    return SmoothedState(balancer.init(num_tasks), jnp.zeros(num_tasks),
                         jnp.zeros(num_tasks, bool))

  def update(signals: Signals, state: SmoothedState) -> tuple[Decision, SmoothedState]:
    decision, inner = balancer.update(signals, state.inner)
    fresh = decision.weights.astype(state.weights.dtype)
    alpha = jnp.where(state.seen, jnp.asarray(decay, fresh.dtype), 0)
    average = alpha * state.weights + (1 - alpha) * fresh
    weights = jnp.where(signals.active, average, state.weights)
    state = SmoothedState(inner, weights, state.seen | signals.active)
    return Decision(jnp.where(signals.active, weights, 0)), state

  return balancer._replace(init=init, update=update, **within(balancer),
                           **_by_products(balancer, lambda searching: smoothed(searching, decay)))


def log_losses(balancer: Balancer) -> Balancer:
  """Balances the gradients of `log L_i`: every task's gradient divided by its loss.

  The method sees `log L_i`, `g_i / L_i` and their Gramian; its weights are given back as those of
  the tasks' own gradients. Losses at or below 1e-8 count as 1e-8.

  Args:
    balancer: any method.
  """
  if balancer.after_step or balancer.parts > 1:
    raise ValueError(f"{balancer.name}: log_losses: expected a method that looks at the losses of "
                     "one batch, before the step")

  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    safe = jnp.where(signals.active, jnp.maximum(signals.losses, 1e-8), 1)
    scaled = signals._replace(losses=jnp.where(signals.active, jnp.log(safe), 0))
    if signals.gramian is not None:
      inverse = (1 / safe).astype(signals.gramian.dtype)
      scaled = scaled._replace(gramian=signals.gramian * inverse[:, None] * inverse[None])
    if signals.products is not None:
      scaled = scaled._replace(products=lambda weights, p=0, q=0: signals.products(
          weights / safe.astype(weights.dtype), p, q) / safe.astype(weights.dtype))
    if signals.task_grads is not None:
      scaled = scaled._replace(task_grads=jax.tree.map(
          lambda g: g / safe.astype(g.dtype).reshape(-1, *(1,) * (g.ndim - 1)),
          signals.task_grads))
    decision, state = balancer.update(scaled, state)
    return decision._replace(weights=decision.weights / safe.astype(decision.weights.dtype)), state

  return balancer._replace(update=update, scale="own", **_by_products(balancer, log_losses))


def max_norm(balancer: Balancer, limit: float) -> Balancer:
  """Bounds the norm of the shared gradient, `‖Jᵀ w‖ ≤ limit`, by scaling the weights down.

  Args:
    balancer: a method that looks at the Gramian and decides by weights.
    limit: above 0.
  """
  hyperparameters.check_numbers(balancer.name, "max_norm", limit, "a number above 0, or None",
                                lambda array: array.ndim == 0 and array > 0)
  if not balancer.needs & {"gramian", "products"}:
    raise ValueError(f"{balancer.name}: max_norm: expected a method that looks at the Gramian; "
                     "clip this one's gradient in the optimizer")

  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    decision, state = balancer.update(signals, state)
    norm = _norm(signals, decision.weights)
    bound = jnp.asarray(limit, norm.dtype)
    factor = bound / jnp.maximum(norm, bound)
    return Decision(decision.weights * factor.astype(decision.weights.dtype)), state

  return balancer._replace(update=update, scale="own", **_by_products(
      balancer, lambda searching: max_norm(searching, limit)))


def _norm(signals: Signals, weights: jax.Array) -> jax.Array:
  """The length of the weighted sum of the gradients."""
  if signals.gramian is None:
    weights = jnp.where(signals.active, weights, 0)
    square = jnp.sum(weights * signals.products(weights), where=signals.active)
    return jnp.sqrt(jnp.maximum(square, 0))
  both = signals.active[:, None] & signals.active[None]
  gramian = jnp.where(both, signals.gramian, 0)
  largest = jnp.maximum(jnp.sqrt(jnp.abs(gramian).max()), jnp.finfo(gramian.dtype).tiny)
  unit = gramian / largest / largest  # so that no product overflows
  weights = weights.astype(gramian.dtype)
  return largest * jnp.sqrt(jnp.maximum(weights @ unit @ weights, 0))


def reduction(balancer: Balancer, kind: str) -> Balancer:
  """Rescales a method so that T equal gradients g come out as their sum T·g or their mean g.

  Public codebases differ by this factor T for the same method.

  Args:
    balancer: a method whose own `scale` is "sum" or "mean".
    kind: "paper" leaves it as published; "sum"; "mean".
  """
  hyperparameters.check_choice(balancer.name, "reduction", kind, REDUCTIONS)
  if kind in ("paper", balancer.scale):
    return balancer
  if balancer.scale == "own":
    raise ValueError(f"{balancer.name}: reduction: expected 'paper', since equal gradients come out "
                     f"neither as their sum nor as their mean; found {kind!r}")

  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    decision, state = balancer.update(signals, state)
    count = jnp.maximum(signals.active.sum(dtype=decision.weights.dtype), 1)
    factor = count if kind == "sum" else 1 / count
    direction = jax.tree.map(lambda x: x * factor.astype(x.dtype), decision.direction)
    return Decision(decision.weights * factor, direction), state

  return balancer._replace(update=update, scale=kind, **_by_products(
      balancer, lambda searching: reduction(searching, kind)))


def scale_heads(balancer: Balancer, scaled: bool) -> Balancer:
  """Says whether the weights also scale the gradients of what tasks do not share."""
  return balancer._replace(scale_heads=scaled, **_by_products(
      balancer, lambda searching: scale_heads(searching, scaled)))


def within(balancer: Balancer) -> dict[str, Any]:
  """The method's looks ahead and after the step, on its state `inner` within a wrapper's."""
  looks = {}
  if balancer.after_step:
    looks["after_step"] = lambda losses, active, state: state._replace(
        inner=balancer.after_step(losses, active, state.inner))
  if balancer.lookahead:
    plan = balancer.lookahead
    looks["lookahead"] = plan._replace(
        weights=lambda state, active: plan.weights(state.inner, active))
  return looks


def _by_products(balancer: Balancer,
                 wrapped: Callable[[Balancer], Balancer]) -> dict[str, Any]:
  """The wrapper over the method that works from products, where there is one."""
  if balancer.by_products is None:
    return {}
  return {"by_products": lambda count: wrapped(balancer.by_products(count))}


def _check_weights(balancer: Balancer, wrapper: str) -> None:
  if "task_grads" in balancer.needs or balancer.weighs_parts:
    found = "weighs every part of the batch" if balancer.weighs_parts else "returns a direction"
    raise ValueError(f"{balancer.name}: {wrapper}: expected a method that decides by weights, "
                     f"found one that {found}")


@dataclasses.dataclass(frozen=True)
class Options:
  """The wrappers to lay over a method, each off by default.

  Attributes:
    log_losses: see `log_losses`.
    reduction: see `reduction`; "paper" leaves the method as published.
    smoothed: decay of `smoothed`.
    max_norm: limit of `max_norm`.
    every: k of `every`.
    scale_heads: see `scale_heads`; None leaves the method's own.
  """

  log_losses: bool = False
  reduction: str = "paper"
  smoothed: float | None = None
  max_norm: float | None = None
  every: int = 1
  scale_heads: bool | None = None


def wrap(balancer: Balancer, options: Options) -> Balancer:
  """A balancer under the wrappers that are asked for, the innermost first.

  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> half = wrap(balancing.pcgrad(), Options(reduction="mean"))
  >>> d, _ = balancing.aggregate(half, J)
  >>> [round(float(x), 4) for x in d]
  [0.2924, 1.9006, 1.9006]
  """
  if options.log_losses:
    balancer = log_losses(balancer)
  balancer = reduction(balancer, options.reduction)
  if options.smoothed is not None:
    balancer = smoothed(balancer, options.smoothed)
  if options.max_norm is not None:
    balancer = max_norm(balancer, options.max_norm)
  balancer = every(balancer, options.every)
  if options.scale_heads is not None:
    balancer = scale_heads(balancer, options.scale_heads)
  return balancer
