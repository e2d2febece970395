"""The training state: one pytree that holds all that moves."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import optax

from mtl_jax.balancing import Balancer
from mtl_jax.balancing.balancer import init_state
from mtl_jax.models import MultiTaskModel
from mtl_jax.randomness import purpose_key
from mtl_jax.tasks import Task
from mtl_jax.training import engines


class TrainState(flax.struct.PyTreeNode):
  """What a training step reads and writes.

  Attributes:
    step: [] int32, steps done.
    params: parameters of the model.
    model_state: the model's other variables by collection, such as BatchNorm's statistics.
    opt_state: of the optimizer.
    balancer_state: of the balancer.
    task_weights: [T] factors of the losses before any balancing.
    turns: by stream, how many batches of it were trained on, [] int32: what comes next.
    schedule_state: of the schedule of tasks.
    seed: [] uint32; all randomness is drawn from it, the purpose and the step.
  """

  step: jax.Array
  params: Any
  model_state: Any
  opt_state: Any
  balancer_state: Any
  task_weights: jax.Array
  turns: dict[str, jax.Array]
  schedule_state: Any
  seed: jax.Array


def create_train_state(seed: jax.typing.ArrayLike, batch: Mapping[str, Mapping[str, jax.Array]],
                       *, model: MultiTaskModel, tasks: Sequence[Task], balancer: Balancer,
                       optimizer: optax.GradientTransformation,
                       task_weights: jax.typing.ArrayLike = 1.0,
                       schedule_state: Any = (),
                       gradients: str | engines.Engine = "exact") -> TrainState:
  """A fresh training state.

  Args:
    seed: [] integer.
    batch: any batch `{stream: {"image": [B, H, W, C], …}}`; only its shapes matter.
    model: the model.
    tasks: the T tasks; each needs a head in the model.
    balancer: the balancing method.
    optimizer: an optax optimizer.
    task_weights: one factor of the losses, or [T].
    schedule_state: what the schedule of tasks keeps, see `schedules.TaskSchedule.init`.
    gradients: engine of the task gradients, as in `train_step`; what it keeps from step to step
      is part of the balancer's state.

  Raises:
    ValueError: where tasks and heads do not match.
  """
  names = [task.name for task in tasks]
  if len(set(names)) < len(names) or set(names) != set(model.heads):
    raise ValueError(f"expected one head for each task, found tasks {names} and heads "
                     f"{list(model.heads)}")
  keys = {"params": purpose_key(seed, "init"), "dropout": purpose_key(seed, "init_dropout")}
  variables = dict(model.init(keys, batch))
  params = variables.pop("params")
  balancer_state = init_state(engines.get(gradients).adapt(balancer), len(tasks),
                              _stacked(params, model, len(tasks)))
  return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      model_state=variables,
      opt_state=optimizer.init(params),
      # A method may start two numbers as one array, which could not be donated.
      balancer_state=jax.tree.map(jnp.copy, balancer_state),
      task_weights=jnp.full(len(tasks), jnp.asarray(task_weights, jnp.float32)),
      turns={task.stream: jnp.zeros((), jnp.int32) for task in tasks},
      schedule_state=jax.tree.map(jnp.copy, schedule_state),
      seed=jnp.asarray(seed, jnp.uint32),
  )


def _stacked(params: Any, model: MultiTaskModel, num_tasks: int) -> Any:
  """Shapes of the tasks' gradients of the shared parameters, leaves [T, ...]."""
  return unflatten_dict({path: jax.ShapeDtypeStruct((num_tasks, *x.shape), x.dtype)
                         for path, x in flatten_dict(params).items() if model.owner(path) is None})
