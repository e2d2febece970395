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

Flat = Mapping[tuple[str, ...], jax.Array]  # parameters, or gradients of them, by path


class Pass(NamedTuple):
  """What a pass gives.

  Attributes:
    losses: [T].
    active: [T] bool, whether the batch holds a label of the task.
    metrics: `{task: {metric: state}}`.
    model_state: the model's other variables after the pass.
    feature_grads: gradient of each task's loss with respect to its features, by task.
    pull_shared: from cotangents of all tasks' features to the gradients of shared parameters, as
      the model nests them.
    push_shared: from tangents of shared parameters, nested so, to those of all tasks' features;
      None where it was not asked for.
    own_grads: gradient of each owned parameter, of the loss of the task that owns it.
  """

  losses: jax.Array
  active: jax.Array
  metrics: dict[str, dict[str, Any]]
  model_state: Any
  feature_grads: dict[str, Any]
  pull_shared: Callable[[Mapping[str, Any]], Any]
  push_shared: Callable[[Any], dict[str, Any]] | None
  own_grads: Flat


class PassOf(NamedTuple):
  """What a pass is made of besides parameters and batch: model, tasks, their weights, keys, and
  patterns of the parameters that stand still, whose gradients are zero; and whether the features
  are also differentiated forwards."""

  model: MultiTaskModel
  tasks: Sequence[Task]
  task_weights: jax.Array
  rngs: Mapping[str, jax.Array]
  frozen: Sequence[str] = ()
  forwards: bool = False

  def forward(self, params: Any, model_state: Any, batch: Any) -> Pass:
    """One pass in training mode, its gradients taken up to the features."""
    model, tasks = self.model, self.tasks
    collections = list(model_state)
    flat = flatten_dict(params)
    shared = {path: x for path, x in flat.items() if model.owner(path) is None}
    owned = {path: x for path, x in flat.items() if model.owner(path) is not None}
    apply = functools.partial(model.apply, train=True, mutable=collections, rngs=self.rngs)

    def features_of(shared: Flat, owned: Flat) -> tuple[dict[str, Any], Any]:
      variables = {"params": self._held({**shared, **owned}), **model_state}
      features, new_state = apply(variables, batch, method="features")
      return {task.name: features[task.name] for task in tasks}, new_state

    def losses_of(owned: Flat, features: dict[str, Any]) -> tuple[jax.Array, Any]:
      variables = {"params": self._held({**shared, **owned}), **middle_state}
      outputs, new_state = apply(variables, features, method="outputs")
      losses, active = task_losses(tasks, outputs, batch)
      metrics = task_metrics(tasks, outputs, batch, gathered=False)
      return losses * self.task_weights, (active, metrics, new_state)

    push = None
    if self.forwards:
      features, push, middle_state = jax.linearize(features_of, shared, owned, has_aux=True)
      pull = jax.linear_transpose(push, shared, owned)
    else:
      features, pull, middle_state = jax.vjp(features_of, shared, owned, has_aux=True)
    losses, pull_losses, (active, metrics, new_state) = jax.vjp(
        losses_of, owned, features, has_aux=True)
    # Each owned parameter reaches one loss only, so one unweighted pass serves them all.
    head_grads, feature_grads = pull_losses(jnp.ones_like(losses))
    feature_grads = {task.name: feature_grads[task.name] for task in tasks}  # jax sorts dicts
    own_grads = jax.tree.map(jnp.add, head_grads, pull(feature_grads)[1])
    still = jax.tree.map(jnp.zeros_like, owned)
    return Pass(losses, active, metrics, new_state, feature_grads,
                lambda cotangents: unflatten_dict(pull(cotangents)[0]),
                push and (lambda tangents: push(flatten_dict(tangents), still)), own_grads)

  def losses(self, params: Any, model_state: Any, batch: Any) -> jax.Array:
    """Losses [T] of a pass in training mode that leaves no trace."""
    held = self._held(flatten_dict(params))
    outputs, _ = self.model.apply({"params": held, **model_state}, batch, train=True,
                                  mutable=list(model_state), rngs=self.rngs)
    return task_losses(self.tasks, outputs, batch)[0] * self.task_weights

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
