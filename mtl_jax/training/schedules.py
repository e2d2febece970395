"""Schedules of tasks: which tasks take part in a step, and how much each of them counts.

A schedule is made of pure functions of seed and step, so that a run that was interrupted goes on
with the task whose turn it is. What a step leaves out costs nothing there: neither its head nor its
stream is in the step's program, and its own parameters stand still.
"""

from collections.abc import Callable, Mapping, Sequence
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_jax.randomness import purpose_key
from mtl_jax.training.state import TrainState

_DECAY = 0.95  # of the smoothed losses
_OPTAX_SCHEDULES = sorted(name for name in dir(optax.schedules) if not name.startswith("_")
                          and name.endswith(("_schedule", "exponential_decay")))


class Progress(NamedTuple):
  """How far tasks have come: their first loss and a moving average, [T], NaN before the first."""

  first: jax.Array
  smoothed: jax.Array


class TaskSchedule(NamedTuple):
  """Which tasks take part in which step, with which factor.

  Attributes:
    groups: the sets of tasks that a step can have, by name.
    group_at: `group_at(seed, step, num_steps) -> []`, the place of the step's group.
    factors_at: `factors_at(step, num_steps, progress) -> [T]` of the losses, 0 where a task takes
      no part; None where all are 1.
    shares: part of all steps that each stream is expected to have.
    watches: whether `factors_at` reads the progress of the losses.
  """

  groups: tuple[tuple[str, ...], ...]
  group_at: Callable[[jax.Array, jax.Array, int], jax.Array]
  factors_at: Callable[[jax.Array, int, Any], jax.Array] | None
  shares: Mapping[str, float]
  watches: bool = False

  def init(self, num_tasks: int) -> Any:
    """What the schedule keeps from step to step: `Progress`, or () where it watches nothing."""
    return Progress(*[jnp.full(num_tasks, jnp.nan)] * 2) if self.watches else ()


def joint(tasks: Sequence[str], streams: Mapping[str, str],
          sizes: Mapping[str, int]) -> TaskSchedule:
  """All tasks in every step.

  Args:
    tasks: names of the T tasks.
    streams: the stream of each task.
    sizes: labelled training examples of each task.
  """
  del sizes
  return TaskSchedule((tuple(tasks),), lambda seed, step, num_steps: jnp.zeros((), jnp.int32), None,
                      {stream: 1.0 for stream in streams.values()})


def alternating(tasks: Sequence[str], streams: Mapping[str, str], sizes: Mapping[str, int], *,
                by: str = "stream", steps: int = 1) -> TaskSchedule:
  """One stream, or one task, a step, in turn: the classic loop over several loaders.

  >>> schedule = alternating(("a", "b"), {"a": "x", "b": "y"}, {"a": 8, "b": 8}, steps=2)
  >>> [int(schedule.group_at(jnp.uint32(0), jnp.int32(i), 6)) for i in range(6)]
  [0, 0, 1, 1, 0, 0]

  Args:
    tasks: names of the T tasks.
    streams: the stream of each task.
    sizes: labelled training examples of each task.
    by: "stream", all tasks of a stream at once, or "task".
    steps: how many steps each has before it is the next one's turn.

  Raises:
    ValueError: where there is nothing to alternate between.
  """
  del sizes
  if steps < 1:
    raise ValueError(f"steps: expected at least 1, found {steps}")
  groups = _groups(tasks, streams, by)
  return TaskSchedule(groups, lambda seed, step, num_steps: step // steps % len(groups), None,
                      _shares(groups, streams, [1 / len(groups)] * len(groups)))


def sampled(tasks: Sequence[str], streams: Mapping[str, str], sizes: Mapping[str, int], *,
            by: str = "stream", temperature: float = 1.0) -> TaskSchedule:
  """One stream, or one task, a step, drawn with a probability that grows with its size.

  Args:
    tasks: names of the T tasks.
    streams: the stream of each task.
    sizes: labelled training examples of each task; a stream's size is that of its largest task.
    by: "stream", all tasks of a stream at once, or "task".
    temperature: probabilities are proportional to size^(1 / temperature): 1 in proportion to size,
      the higher the more alike.

  Raises:
    ValueError: where there is nothing to choose from, or the temperature is not above zero.

  Reference:
    Sanh, Wolf, Ruder: A Hierarchical Multi-task Approach for Learning Embeddings from Semantic
    Tasks. AAAI 2019, arXiv:1811.06031, sample in proportion to size; Arivazhagan et al.: Massively
    Multilingual Neural Machine Translation in the Wild. 2019, arXiv:1907.05019, with a temperature.
  """
  if not temperature > 0:
    raise ValueError(f"temperature: expected a number above 0, found {temperature}")
  groups = _groups(tasks, streams, by)
  logs = jnp.array([math.log(max(max(sizes[task] for task in group), 1)) / temperature
                    for group in groups], jnp.float32)

  def group_at(seed: jax.Array, step: jax.Array, num_steps: int) -> jax.Array:
    return jax.random.categorical(purpose_key(seed, "schedule", step), logs).astype(jnp.int32)
  return TaskSchedule(groups, group_at, None,
                      _shares(groups, streams, jax.nn.softmax(logs).tolist()))


def curriculum(tasks: Sequence[str], streams: Mapping[str, str], sizes: Mapping[str, int], *,
               start: Mapping[str, float] | None = None,
               weights: Mapping[str, Any] | None = None,
               easy_first: float = 0.0, sharpness: float = 5.0) -> TaskSchedule:
  """Tasks that start later, weights that follow a schedule, and easy tasks first.

  Easy is what has lost most of its first loss: while `easy_first` lasts, a task's weight is
  proportional to exp(-sharpness · (1 - progress) · smoothed loss / first loss), with a mean of one
  over the tasks; the preference fades linearly. Self-paced learning (Kumar, Packer, Koller, NeurIPS
  2010) leaves out what is hard altogether, and so never sees it become easy.

  Args:
    tasks: names of the T tasks.
    streams: the stream of each task.
    sizes: labelled training examples of each task.
    start: fraction of the run after which each task begins; those not named begin at once.
    weights: by task `{"name": one of optax's schedules, …}` with its own arguments, durations in
      steps; a task whose weight is 0 takes no part in a step.
    easy_first: fraction of the run in which easy tasks weigh more; 0 for never.
    sharpness: how strongly.

  Raises:
    ValueError: for an unknown task or schedule, a fraction outside [0, 1], and where no task would
      begin at once.
  """
  del sizes
  begins = {**{task: 0.0 for task in tasks}, **_known("start", start, tasks)}
  for task, fraction in begins.items():
    if not 0 <= fraction < 1:
      raise ValueError(f"start.{task}: expected a fraction of the run from 0 on and below 1, found "
                       f"{fraction}")
  if min(begins.values()) > 0:
    raise ValueError("start: expected a task that begins at once, found none")
  if not 0 <= easy_first <= 1:
    raise ValueError(f"easy_first: expected a fraction of the run, found {easy_first}")
  made = {task: _optax_schedule(f"weights.{task}", section)
          for task, section in _known("weights", weights, tasks).items()}
  times = sorted(set(begins.values()))
  groups = tuple(tuple(task for task in tasks if begins[task] <= time) for time in times)

  def group_at(seed: jax.Array, step: jax.Array, num_steps: int) -> jax.Array:
    del seed
    begun = [(step >= math.ceil(time * num_steps)).astype(jnp.int32) for time in times[1:]]
    return sum(begun, jnp.zeros((), jnp.int32))

  def factors_at(step: jax.Array, num_steps: int, progress: Any) -> jax.Array:
    one = jnp.ones((), jnp.float32)
    with jax.numpy_dtype_promotion("standard"):  # which optax's arithmetic needs
      factors = jnp.stack([jnp.asarray(made[task](step), jnp.float32) if task in made else one
                           for task in tasks])
    if easy_first:
      fading = jnp.maximum(1 - step.astype(jnp.float32) / (easy_first * num_steps), 0)
      factors *= easiness(progress, sharpness * fading)
    return factors
  return TaskSchedule(groups, group_at, factors_at if made or easy_first else None,
                      {stream: 1.0 for stream in streams.values()}, watches=easy_first > 0)


SCHEDULES = {
    "joint": joint,
    "alternating": alternating,
    "sampled": sampled,
    "curriculum": curriculum,
}


def easiness(progress: Progress, sharpness: jax.typing.ArrayLike) -> jax.Array:
  """Weights [T] with a mean of one: the less of its first loss is left, the more a task weighs.

  >>> weights = easiness(Progress(jnp.array([2., 4.]), jnp.array([1., 4.])), 2.0)
  >>> [round(float(weight), 3) for weight in weights]
  [1.462, 0.538]
  """
  left = progress.smoothed / progress.first
  left = jnp.where(jnp.isfinite(left), left, 1)
  return jax.nn.softmax(-sharpness * left) * left.shape[0]


def scheduled_step(state: TrainState, batch: Any, *, schedule: TaskSchedule, num_steps: int,
                   step: Callable[..., tuple[TrainState, dict[str, Any]]]
                   ) -> tuple[TrainState, dict[str, Any]]:
  """One step of the tasks whose turn it is.

  Args:
    state: the training state, its `schedule_state` from `schedule.init`.
    batch: of all streams; what a step leaves out may hold anything.
    schedule: says who takes part.
    num_steps: length of the run.
    step: `train_step`, which gets `only` and `factors` besides.
  """
  factors = (None if schedule.factors_at is None else
             schedule.factors_at(state.step, num_steps, state.schedule_state))

  def of_group(group: tuple[str, ...]) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    only = group if len(schedule.groups) > 1 else None
    return lambda state, batch, factors: step(state, batch, only=only, factors=factors)
  branches = [of_group(group) for group in schedule.groups]
  if len(branches) == 1:
    state, logs = branches[0](state, batch, factors)
  else:
    place = schedule.group_at(state.seed, state.step, num_steps)
    state, logs = jax.lax.switch(place, branches, state, batch, factors)
  if schedule.watches:
    state = state.replace(schedule_state=_watched(state.schedule_state, logs))
  return state, logs


def _watched(progress: Progress, logs: Mapping[str, jax.Array]) -> Progress:
  """The progress after a step; a task that took no part keeps its own."""
  weights, active = logs["task_weights"], logs["active"]
  losses = logs["losses"] / jnp.where(weights > 0, weights, 1)
  new = jnp.isnan(progress.first)
  smoothed = jnp.where(new, losses, _DECAY * progress.smoothed + (1 - _DECAY) * losses)
  return Progress(jnp.where(new & active, losses, progress.first),
                  jnp.where(active, smoothed, progress.smoothed))


def _groups(tasks: Sequence[str], streams: Mapping[str, str],
            by: str) -> tuple[tuple[str, ...], ...]:
  if by not in ("stream", "task"):
    raise ValueError(f"by: expected 'stream' or 'task', found {by!r}")
  if by == "task":
    groups = tuple((task,) for task in tasks)
  else:
    groups = tuple(tuple(task for task in tasks if streams[task] == stream)
                   for stream in dict.fromkeys(streams[task] for task in tasks))
  if len(groups) < 2:
    raise ValueError(f"by: expected several {'streams' if by == 'stream' else 'tasks'} that take "
                     f"turns, found one" + ("; by=task lets its tasks" if len(tasks) > 1 else ""))
  return groups


def _shares(groups: Sequence[Sequence[str]], streams: Mapping[str, str],
            probabilities: Sequence[float]) -> dict[str, float]:
  """The part of all steps in which each stream is read."""
  shares = dict.fromkeys(streams.values(), 0.0)
  for group, probability in zip(groups, probabilities):
    for stream in {streams[task] for task in group}:
      shares[stream] += probability
  return shares


def _known(where: str, values: Mapping[str, Any] | None, tasks: Sequence[str]) -> dict[str, Any]:
  """Values by task; ValueError where one is of no task."""
  for task in values or {}:
    if task not in tasks:
      raise ValueError(f"{where}.{task}: expected one of {', '.join(tasks)}")
  return dict(values or {})


def _optax_schedule(where: str, section: Any) -> optax.Schedule:
  """One of optax's schedules, from `{"name": …}` and its arguments."""
  arguments = dict(section) if isinstance(section, Mapping) else {}
  name = arguments.pop("name", None)
  if name not in _OPTAX_SCHEDULES:
    raise ValueError(f"{where}.name: expected one of {', '.join(_OPTAX_SCHEDULES)}, found {name!r}")
  factory = getattr(optax.schedules, name)
  try:
    inspect.signature(factory).bind(**arguments)
  except TypeError as error:
    raise ValueError(f"{where}: expected arguments of optax's {name}, found: {error}") from error
  return factory(**{key: {int(step): scale for step, scale in value.items()}
                    if isinstance(value, Mapping) else value for key, value in arguments.items()})
