"""Optimizers by their optax name, with schedule, clipping and weight decay."""

import inspect
from typing import Any

import jax
import optax

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


def _with_standard_promotion(
    optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """Lets optax mix floats and integers, as it does, in programs that forbid it elsewhere."""
  def update(updates, state, params=None, **extra):
    with jax.numpy_dtype_promotion("standard"):
      return optimizer.update(updates, state, params, **extra)
  return optax.GradientTransformationExtraArgs(optimizer.init, update)
