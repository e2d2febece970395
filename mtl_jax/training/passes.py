"""A forward pass of the model on a batch, or on a part of one, and the way back through it."""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp

from mtl_jax.models import MultiTaskModel
from mtl_jax.tasks import Task, task_losses, task_metrics
from mtl_jax.training.parameter_groups import hold
from mtl_jax.training.precision import apply

Flat = Mapping[tuple[str, ...], jax.Array]  # parameters, or gradients of them, by path


class Pass(NamedTuple):
  """What a pass gives.

  Attributes:
    losses: [T].
    active: [T] bool, whether the task takes part and the batch holds a label of it.
    metrics: `{task: {metric: state}}`.
    model_state: the model's other variables after the pass.
    feature_grads: gradient of each task's loss with respect to its features, by task; None for a
      task that takes no part.
    pull_shared: from cotangents of some tasks' features, those of the others being zero, to the
      gradients of shared parameters, as the model nests them.
    push_shared: from tangents of shared parameters, nested so, to those of all tasks' features;
      None where it was not asked for.
    own_grads: gradient of each owned parameter, of the loss of the task that owns it.
    penalties: names of those that depend on the batch; see `PassOf.penalties`.
  """

  losses: jax.Array
  active: jax.Array
  metrics: dict[str, dict[str, Any]]
  model_state: Any
  feature_grads: dict[str, Any]
  pull_shared: Callable[[Mapping[str, Any]], Any]
  push_shared: Callable[[Any], dict[str, Any]] | None
  own_grads: Flat
  penalties: tuple[str, ...]


class PassOf(NamedTuple):
  """What a pass is made of besides parameters and batch.

  Attributes:
    model: the model.
    tasks: the T tasks.
    task_weights: [T]; a task whose weight is 0 is not active.
    rngs: keys by purpose.
    frozen: patterns of the parameters that stand still, whose gradients are zero.
    only: names of the tasks that take part; all where it is None.
    precision: in which the model computes.
    forwards: whether the features are also differentiated forwards.
    alone: whether tasks are pulled back one by one, so that each should pass nothing that others
      alone need. A model that keeps no statistics of its batch then passes each stream on its own.
  """

  model: MultiTaskModel
  tasks: Sequence[Task]
  task_weights: jax.Array
  rngs: Mapping[str, jax.Array]
  frozen: Sequence[str] = ()
  only: Sequence[str] | None = None
  precision: str = "float32"
  forwards: bool = False
  alone: bool = False

  def forward(self, params: Any, model_state: Any, batch: Any) -> Pass:
    """One pass in training mode, its gradients taken up to the features."""
    model, tasks = self.model, self.taking_part
    flat = flatten_dict(params)
    shared = {path: x for path, x in flat.items() if model.owner(path) is None}
    owned = {path: x for path, x in flat.items() if model.owner(path) is not None}
    run = functools.partial(apply, model, precision=self.precision, train=True, rngs=self.rngs)

    def features_of(shared: Flat, owned: Flat) -> tuple[dict[str, Any], Any]:
      features, *rest = self._by_stream(self._held({**shared, **owned}), model_state, batch)
      return {task.name: features[task.name] for task in tasks}, rest

    def losses_of(owned: Flat, features: dict[str, Any]) -> tuple[jax.Array, Any]:
      variables = {"params": self._held({**shared, **owned}), **middle_state}
      outputs, new_state = run(variables, features, method="outputs", mutable=list(model_state))
      losses, active = self._losses_of(outputs, batch)
      metrics = task_metrics(tasks, outputs, batch, gathered=False)
      return losses, (active, metrics, new_state)

    push = None
    if self.forwards or self.alone:
      features, push, (middle_state, penalties) = jax.linearize(
          features_of, shared, owned, has_aux=True)
      pull = jax.linear_transpose(push, shared, owned)
    else:
      features, pull, (middle_state, penalties) = jax.vjp(features_of, shared, owned, has_aux=True)
    losses, pull_losses, (active, metrics, new_state) = jax.vjp(
        losses_of, owned, features, has_aux=True)
    # Each owned parameter reaches one loss only, so one unweighted pass serves them all.
    head_grads, feature_grads = pull_losses(jnp.ones_like(losses))
    own_grads = jax.tree.map(jnp.add, head_grads, pull(feature_grads)[1])
    feature_grads = {task.name: feature_grads.get(task.name) for task in self.tasks}

    def pull_shared(cotangents: Mapping[str, Any]) -> Any:
      taken = {task: x for task, x in cotangents.items() if x is not None}
      if push and len(taken) < len(features):  # the way back from these tasks alone
        some = lambda shared, owned: {task: push(shared, owned)[task] for task in taken}
        return unflatten_dict(jax.linear_transpose(some, shared, owned)(taken)[0])
      zeros = {task: jax.tree.map(jnp.zeros_like, x) for task, x in features.items()}
      return unflatten_dict(pull({**zeros, **taken})[0])
    still = jax.tree.map(jnp.zeros_like, owned)
    push_shared = push and (lambda tangents: push(flatten_dict(tangents), still))
    return Pass(losses, active, metrics, new_state, feature_grads, pull_shared, push_shared,
                own_grads, tuple(penalties))

  def losses(self, params: Any, model_state: Any, batch: Any) -> jax.Array:
    """Losses [T] of a pass in training mode that leaves no trace."""
    held = self._held(flatten_dict(params))
    outputs, _ = apply(self.model, {"params": held, **model_state}, batch, self.precision,
                       train=True, only=self.only, mutable=list(model_state), rngs=self.rngs)
    return self._losses_of(outputs, batch)[0]

  @property
  def taking_part(self) -> tuple[Task, ...]:
    """The tasks that take part, in their order."""
    return tuple(task for task in self.tasks if self.only is None or task.name in self.only)

  def _losses_of(self, outputs: Mapping[str, Any], batch: Any) -> tuple[jax.Array, jax.Array]:
    """Weighted losses [T], 0 of those that take no part, and which tasks are active, [T]."""
    losses, active = task_losses(self.taking_part, outputs, batch)
    if self.only is not None:
      places = jnp.array([i for i, task in enumerate(self.tasks) if task.name in self.only])
      losses = jnp.zeros(len(self.tasks), losses.dtype).at[places].set(losses)
      active = jnp.zeros(len(self.tasks), jnp.bool_).at[places].set(active)
    return losses * self.task_weights, active & (self.task_weights > 0)

  def penalties(self, params: Any, model_state: Any, batch: Any) -> dict[str, jax.Array]:
    """What the sharing architecture adds to the loss on this batch, `{name: []}`.

    Its modules `sow` it in the collection "penalties"; values of one name add up. Where little of
    the pass is needed for it XLA drops the rest, and shares with `forward` what is the same.
    """
    return self._features(params, model_state, batch)[2]

  def _by_stream(self, params: Any, model_state: Any,
                 batch: Any) -> tuple[dict[str, Any], Any, dict[str, jax.Array]]:
    """What `_features` gives, by a pass for each stream where that is wanted and the same."""
    streams = dict.fromkeys(task.stream for task in self.taking_part)
    if not self.alone or model_state or len(streams) < 2:
      return self._features(params, model_state, batch)
    found, penalties = {}, {}
    for number, stream in enumerate(streams):
      one = self._replace(
          only=[task.name for task in self.taking_part if task.stream == stream],
          rngs={name: jax.random.fold_in(key, number) for name, key in self.rngs.items()})
      features, _, sown = one._features(params, model_state, batch)
      found, penalties = found | features, penalties | sown
    return found, model_state, penalties

  def _features(self, params: Any, model_state: Any,
                batch: Any) -> tuple[dict[str, Any], Any, dict[str, jax.Array]]:
    """Features in training mode, the other variables after the pass, and penalties by name."""
    features, new_state = apply(
        self.model, {"params": params, **model_state}, batch, self.precision, train=True,
        only=self.only, method="features", mutable=[*model_state, "penalties"], rngs=self.rngs)
    penalties = {}
    for (*_, name), values in flatten_dict(new_state.pop("penalties", {})).items():
      penalties[name] = sum(values, penalties.get(name, jnp.zeros(())))
    return features, new_state, penalties

  def _held(self, flat: Flat) -> Any:
    return unflatten_dict(hold(flat, self.frozen))


def cut(batch: Mapping[str, Mapping[str, jax.Array]], parts: int) -> list[Any]:
  """Cuts each stream's batch into parts whose sizes differ by at most one.

  >>> batch = {"s": {"image": jnp.arange(5)}}
  >>> [part["s"]["image"].tolist() for part in cut(batch, 3)]
  [[0], [1, 2], [3, 4]]

  Raises:
    ValueError: where a stream has fewer examples than parts.
  """
  if parts == 1:
    return [batch]
  size = min(jax.tree.leaves(columns)[0].shape[0] for columns in batch.values())
  if size < parts:
    raise ValueError(f"batch: expected at least {parts} examples of each stream, one for each "
                     f"part that the balancer asks for; found {size}")
  return [jax.tree.map(lambda x, p=part: x[p * x.shape[0] // parts:
                                           (p + 1) * x.shape[0] // parts], batch)
          for part in range(parts)]
