"""Optimizers by their optax name, with schedule, clipping and weight decay."""

from collections.abc import Mapping, Sequence
import inspect
from typing import Any

from flax.traverse_util import unflatten_dict
import jax
import jax.numpy as jnp
import optax

from mtl_jax.training.parameter_groups import factors
from mtl_jax.training.penalties import decays

OPTIMIZERS = {name: getattr(optax, name) for name in (
    "adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "adan", "lamb",
    "lars", "lion", "nadam", "nadamw", "novograd", "radam", "rmsprop", "sgd", "yogi")}

MASKS = ("mask", "weight_decay_mask")  # arguments that hold which parameters are decayed


def constant(learning_rate: float, num_steps: int, *, warmup: int = 0) -> optax.Schedule:
  """One learning rate, reached by a linear warm-up of `warmup` steps."""
  del num_steps
  return _after_warmup(learning_rate, warmup, optax.constant_schedule(learning_rate))


def cosine(learning_rate: float, num_steps: int, *, warmup: int = 0,
           final: float = 0.0) -> optax.Schedule:
  """Linear warm-up, then half a cosine down to `final` times the peak at the last step."""
  if not 0 <= final <= 1:
    raise ValueError(f"final: expected a fraction of the peak, found {final}")
  decay = optax.cosine_decay_schedule(learning_rate, max(num_steps - warmup, 1), alpha=final)
  return _after_warmup(learning_rate, warmup, decay)


def steps(learning_rate: float, num_steps: int, *, warmup: int = 0,
          at: tuple[float, ...] = (0.5, 0.75), factor: float = 0.1) -> optax.Schedule:
  """Times `factor` at each of the given fractions of the run.

  >>> schedule = steps(1.0, 100)
  >>> [round(float(schedule(i)), 3) for i in (0, 49, 51, 76)]
  [1.0, 1.0, 0.1, 0.01]
  """
  if not all(0 < fraction < 1 for fraction in at):
    raise ValueError(f"at: expected fractions of the run between 0 and 1, found {at}")
  boundaries = {round(fraction * num_steps) - warmup: factor for fraction in at}
  return _after_warmup(learning_rate, warmup,
                       optax.piecewise_constant_schedule(learning_rate, boundaries))


def _after_warmup(peak: float, warmup: int, schedule: optax.Schedule) -> optax.Schedule:
  if not warmup:
    return schedule
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), schedule], [warmup])


SCHEDULES = {
    "constant": constant,
    "cosine": cosine,
    "steps": steps,
}


def optimizer(name: str, learning_rate: float | optax.Schedule, *, clip_norm: float | None = None,
              weight_decay: float | None = None, **kwargs: Any) -> optax.GradientTransformation:
  """An optax optimizer by name.

  Args:
    name: one of `OPTIMIZERS`.
    learning_rate: a number or a schedule.
    clip_norm: largest global norm of the gradient; not clipped when None.
    weight_decay: of the kernels; biases and norms are left alone. Decoupled where the optimizer
      itself decays (adamw, lion, …), whose own default it takes when None; otherwise added to the
      gradient before the optimizer, and none when None.
    **kwargs: the optimizer's own arguments.

  Raises:
    ValueError: for a negative number.
  """
  if weight_decay is not None and weight_decay < 0:
    raise ValueError(f"optimizer: weight_decay: expected >= 0, found {weight_decay}")
  if clip_norm is not None and not clip_norm > 0:
    raise ValueError(f"optimizer: clip_norm: expected > 0 or None, found {clip_norm}")
  factory = OPTIMIZERS[name]
  accepted = inspect.signature(factory).parameters
  mask = next((m for m in MASKS if m in accepted), None)
  chain = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
  if "weight_decay" in accepted and mask:
    kwargs[mask] = decays
    if weight_decay is not None:
      kwargs["weight_decay"] = weight_decay
  elif weight_decay:
    chain.append(optax.add_decayed_weights(weight_decay, mask=decays))
  chain.append(factory(learning_rate, **kwargs))
  return _with_standard_promotion(optax.chain(*chain))


def by_part(optimizer: optax.GradientTransformation, *, freeze: Sequence[str] = (),
            learning_rate_scale: Mapping[str, float] | None = None) -> optax.GradientTransformation:
  """An optimizer that leaves some parameters as they are, and moves others at rates of their own.

  What is frozen does not move in a single bit, whatever the weight decay or the penalties, and has
  no state; clipping and norms are those of what moves. A factor multiplies the whole update, which
  is what multiplying the learning rate does.

  >>> tx = by_part(optax.sgd(1.0), freeze=("heads_a",), learning_rate_scale={"trunk": 0.5})
  >>> params = {"sharing": {"trunk": jnp.ones(1)}, "heads_a": jnp.ones(1), "heads_b": jnp.ones(1)}
  >>> updates, _ = tx.update(params, tx.init(params))
  >>> [float(x[0]) for x in jax.tree.leaves(optax.apply_updates(params, updates))]
  [1.0, 0.0, 0.5]

  Args:
    optimizer: of the parameters that move.
    freeze: patterns, see `parameter_groups.matches`.
    learning_rate_scale: factor by pattern; where several match, their product.

  Raises:
    ValueError: from `init`, as `parameter_groups.factors` says.
  """
  def parts(params: Any) -> tuple[Any, optax.GradientTransformationExtraArgs]:
    scale = unflatten_dict(factors(params, freeze, learning_rate_scale))
    return scale, optax.masked(optimizer, jax.tree.map(bool, scale))

  def moved(update: jax.Array, factor: float) -> jax.Array:
    return update * factor if factor else jnp.full_like(update, -0.0)  # -0.0 + 0.0 would be 0.0

  def init(params: Any) -> Any:
    return parts(params)[1].init(params)

  def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
    scale, moving = parts(updates)
    updates, state = moving.update(updates, state, params, **extra)
    return jax.tree.map(moved, updates, scale), state

  return optax.GradientTransformationExtraArgs(init, update)


def _with_standard_promotion(
    optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """Lets optax mix floats and integers, as it does, in programs that forbid it elsewhere."""
  def update(updates, state, params=None, **extra):
    with jax.numpy_dtype_promotion("standard"):
      return optimizer.update(updates, state, params, **extra)
  return optax.GradientTransformationExtraArgs(optimizer.init, update)
