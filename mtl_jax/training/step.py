"""One step of training and one of evaluation: pure functions of state and batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import optax

from mtl_jax.balancing import Balancer, Signals
from mtl_jax.models import MultiTaskModel
from mtl_jax.randomness import purpose_key
from mtl_jax.tasks import Task, task_losses, task_metrics
from mtl_jax.training.state import TrainState
from mtl_jax.training.task_gradients import Backward, balance

Batch = Mapping[str, Mapping[str, jax.Array]]


def train_step(state: TrainState, batch: Batch, *, model: MultiTaskModel, tasks: Sequence[Task],
               balancer: Balancer, optimizer: optax.GradientTransformation,
               gradients: str = "exact",
               penalties: Mapping[str, Callable[[Any], jax.Array]] | None = None
               ) -> tuple[TrainState, dict[str, Any]]:
  """One optimizer step on the weighted sum of the tasks' losses.

  Args:
    state: the training state.
    batch: `{stream: {"image": [B, H, W, C], label: [B, …]}}`; labels -1 or NaN are missing.
    model: gives one output a task.
    tasks: the T tasks.
    balancer: turns losses, Gramian or task gradients into the gradient of what tasks share; what
      a task owns alone gets that task's own gradient.
    optimizer: an optax optimizer.
    gradients: engine of the task gradients, "exact" or "features".
    penalties: functions of the parameters by name, added to the loss after balancing.

  Returns:
    The next state, and logs: losses, weights, active, finite [T]; gradient_norm and update_norm [];
    metrics `{task: {metric: state}}`; penalties `{name: []}`; and, where the balancer saw the
    Gramian, gramian [T, T], NaN at steps at which it was not due to look.
  """
  collections = list(state.model_state)
  rngs = {"dropout": purpose_key(state.seed, "dropout", state.step)}
  order = {task.name: i for i, task in enumerate(tasks)}
  owners = {path: model.owner(path) for path in flatten_dict(state.params)}
  params = flatten_dict(state.params)
  shared = {path: x for path, x in params.items() if owners[path] is None}
  owned = {path: x for path, x in params.items() if owners[path] is not None}

  def variables(shared, owned, model_state):
    return {"params": unflatten_dict({**shared, **owned}), **model_state}

  def features_of(shared, owned):
    features, model_state = model.apply(
        variables(shared, owned, state.model_state), batch, train=True, method="features",
        mutable=collections, rngs=rngs)
    return {task.name: features[task.name] for task in tasks}, model_state

  def losses_of(owned, features):
    outputs, final_state = model.apply(
        variables(shared, owned, model_state), features, train=True, method="outputs",
        mutable=collections, rngs=rngs)
    losses, active = task_losses(tasks, outputs, batch)
    return losses, (active, task_metrics(tasks, outputs, batch, gathered=False), final_state)

  features, pull_features, model_state = jax.vjp(features_of, shared, owned, has_aux=True)
  losses, pull_losses, (active, metrics, model_state) = jax.vjp(
      losses_of, owned, features, has_aux=True)
  head_grads, feature_grads = pull_losses(jnp.ones_like(losses))
  feature_grads = {task.name: feature_grads[task.name] for task in tasks}  # jax sorts dicts

  shared_grads, signals, decision, balancer_state = balance(
      balancer,
      Signals(losses, active, purpose_key(state.seed, "balancer", state.step)),
      state.balancer_state,
      Backward(feature_grads, lambda cotangents: unflatten_dict(pull_features(cotangents)[0]),
               shares_parameters=bool(shared),
               one_stream=len({task.stream for task in tasks}) == 1,
               one_representation=model.sharing.one_representation),
      gradients)
  # Each owned parameter reaches one loss only, so one unweighted pass serves them all.
  scale = decision.weights if balancer.scale_heads else active.astype(losses.dtype)
  own_grads = jax.tree.map(jnp.add, head_grads, pull_features(feature_grads)[1])
  own_grads = {path: g * scale[order[owners[path]]].astype(g.dtype)
               for path, g in own_grads.items()}
  grads = unflatten_dict({**flatten_dict(shared_grads), **own_grads})

  penalty_values = {}
  for name, penalty in (penalties or {}).items():
    penalty_values[name], penalty_grads = jax.value_and_grad(penalty)(state.params)
    grads = jax.tree.map(jnp.add, grads, penalty_grads)

  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  new_params = optax.apply_updates(state.params, updates)
  if balancer.after_step:  # on the same batch, whose statistics are not taken in twice
    outputs, _ = model.apply({"params": new_params, **state.model_state}, batch, train=True,
                             mutable=collections, rngs=rngs)
    balancer_state = balancer.after_step(task_losses(tasks, outputs, batch)[0], active,
                                         balancer_state)
  logs = {
      "losses": losses,
      "weights": decision.weights,
      "active": active,
      "finite": jnp.isfinite(losses) & jnp.stack(
          [_all_finite(feature_grads[task.name]) for task in tasks]),
      "gradient_norm": optax.tree.norm(grads),
      "update_norm": optax.tree.norm(updates),
      "metrics": metrics,
      "penalties": penalty_values,
  }
  if signals.gramian is not None:
    logs["gramian"] = signals.gramian
  state = state.replace(step=state.step + 1, params=new_params,
                        model_state=model_state, opt_state=opt_state,
                        balancer_state=balancer_state)
  return state, logs


def _all_finite(tree: Any) -> jax.Array:
  return jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda x: jnp.isfinite(x).all(), tree))


def eval_step(state: TrainState, batch: Batch, *, model: MultiTaskModel,
              tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
  """Metric states `{task: {metric: state}}` of one batch; examples without label do not count.

  Merge the states of several batches with `tasks.merge_metrics` and read them with
  `tasks.compute_metrics`.
  """
  outputs = model.apply({"params": state.params, **state.model_state}, batch, train=False)
  return task_metrics(tasks, outputs, batch)
