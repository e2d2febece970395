"""One step of training and one of evaluation: pure functions of state and batch."""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import optax

from mtl_jax.balancing import Balancer, Decision, Signals
from mtl_jax.models import MultiTaskModel
from mtl_jax.randomness import purpose_key
from mtl_jax.tasks import Task, empty_metrics, merge_metrics, task_metrics
from mtl_jax.training import engines
from mtl_jax.training.lookahead import look_ahead
from mtl_jax.training.parameter_groups import hold, kept
from mtl_jax.training.passes import Flat, Pass, PassOf, cut
from mtl_jax.training.precision import apply
from mtl_jax.training.state import TrainState
from mtl_jax.training.task_gradients import BY_ROWS, balance, diagnose

Batch = Mapping[str, Mapping[str, jax.Array]]


def train_step(state: TrainState, batch: Batch, *, model: MultiTaskModel, tasks: Sequence[Task],
               balancer: Balancer, optimizer: optax.GradientTransformation,
               gradients: str | engines.Engine = "exact",
               penalties: Mapping[str, Callable[[Any], jax.Array]] | None = None,
               diagnose_every: int = 0,
               frozen: Sequence[str] = (),
               precision: str = "float32",
               only: Sequence[str] | None = None,
               factors: jax.Array | None = None) -> tuple[TrainState, dict[str, Any]]:
  """One optimizer step on the weighted sum of the tasks' losses.

  Args:
    state: the training state.
    batch: `{stream: {"image": [B, H, W, C], label: [B, …]}}`; labels -1 or NaN are missing.
    model: gives one output a task.
    tasks: the T tasks.
    balancer: turns losses, Gramian or task gradients into the gradient of what tasks share; what
      a task owns alone gets that task's own gradient. A balancer that asks for several parts cuts
      the batch; losses are those of part 0, metrics those of all.
    optimizer: an optax optimizer.
    gradients: engine of the task gradients, a word of `engines.ENGINES` or an engine; the one that
      the state was created for.
    penalties: functions of the parameters by name, added to the loss after balancing, as are
      those of the model's sharing architecture, which may depend on the batch.
    diagnose_every: at each so many-th step the exact Gramian is taken for the logs, whatever the
      balancer and the engine; 0 for never.
    frozen: patterns of parameters (see `parameter_groups.matches`) whose gradients count as zero,
      also in the balance; the optimizer must leave them alone, too (`optimizer.by_part`).
    precision: in which trunk and heads compute, "float32" or "bfloat16"; losses, inner products,
      the optimizer and all state are float32 under either (see `precision.apply`).
    only: names of the tasks that take part; the heads and streams of the others are not in the
      program at all, and what those tasks own stands still. All where it is None.
    factors: [T], by which the state's task weights are multiplied in this step; a task of factor 0
      is not active.

  Returns:
    The next state, and logs: losses, weights, task_weights, active, finite [T]; gradient_norm and
    update_norm []; metrics `{task: {metric: state}}`; penalties `{name: []}`; and, where the
    balancer saw the Gramian or `diagnose_every` is set, gramian [T, T], NaN at steps at which it
    was not due. Under another engine than "exact", weights_error [] says how far a diagnosed
    step's weights are from those of the exact Gramian, and gramian_error [] how far an estimate of
    it is, relatively.

  Raises:
    ValueError: where a stream has fewer examples than the balancer asks for parts, a penalty has
      the name of one of the sharing architecture, or the precision is unknown.
  """
  engine = engines.get(gradients)
  balancer = engines.adapted(engine, balancer, state.balancer_state, len(tasks))
  several = len({task.stream for task in tasks}) > 1
  pass_of = PassOf(
      model, tasks, state.task_weights if factors is None else state.task_weights * factors,
      {"dropout": purpose_key(state.seed, "dropout", state.step)}, frozen=frozen, only=only,
      precision=precision, forwards=engine.forwards,
      alone=engine.rows_of_parameters and bool(balancer.needs & BY_ROWS)
      and (several or not model.sharing.one_representation))
  parts = cut(batch, balancer.parts)
  passes = _passes(pass_of, state, parts)
  losses, active = passes[0].losses, jnp.stack([one.active for one in passes]).all(axis=0)

  backward = _backward(pass_of, state, parts, passes, one_stream=not several)
  shared_grads, signals, decision, balancer_state = balance(
      balancer, Signals(losses, active, purpose_key(state.seed, "balancer", state.step)),
      state.balancer_state, backward, engine)
  grads = unflatten_dict({**flatten_dict(shared_grads),
                          **_own_grads(passes, decision, balancer, model, tasks)})
  of_batch = {name: lambda params, name=name: pass_of.penalties(
      params, state.model_state, batch)[name] for name in passes[0].penalties}
  grads, penalty_values = _penalised(grads, model, state.params, of_batch, penalties or {}, frozen)

  params, opt_state, updates = _updated(state, grads, optimizer, model, only)
  if balancer.after_step:  # on the same batch, whose statistics are not taken in twice
    balancer_state = balancer.after_step(
        pass_of.losses(params, state.model_state, batch), active, balancer_state)
  logs = {
      "losses": losses,
      "weights": decision.weights,
      "active": active,
      "task_weights": pass_of.task_weights,
      "finite": _finite(passes, tasks),
      "gradient_norm": optax.tree.norm(grads),
      "update_norm": optax.tree.norm(updates),
      "metrics": _metrics(passes, state, batch, model, tasks),
      "penalties": penalty_values,
  }
  if signals.gramian is not None:
    logs["gramian"] = signals.gramian
  if diagnose_every:
    logs |= diagnose(balancer, signals, state.balancer_state, decision, backward, engine,
                     due=(state.step + 1) % diagnose_every == 0)
  read = {task.stream for task in pass_of.taking_part}
  turns = {stream: turn + int(stream in read) for stream, turn in state.turns.items()}
  state = state.replace(step=state.step + 1, turns=turns, params=params, opt_state=opt_state,
                        model_state=passes[-1].model_state, balancer_state=balancer_state)
  return state, logs


def _passes(pass_of: PassOf, state: TrainState, parts: Sequence[Batch]) -> list[Pass]:
  """A pass for each part of the batch, with random numbers of its own, statistics carried along."""
  passes, model_state = [], state.model_state
  for number, part in enumerate(parts):
    keys = {name: jax.random.fold_in(key, number) if number else key
            for name, key in pass_of.rngs.items()}
    passes.append(pass_of._replace(rngs=keys).forward(state.params, model_state, part))
    model_state = passes[-1].model_state
  return passes


def _backward(pass_of: PassOf, state: TrainState, parts: Sequence[Batch], passes: Sequence[Pass],
              one_stream: bool) -> engines.Backward:
  """The way back through what tasks share, and how to try out a step ahead."""
  return engines.Backward(
      [one.feature_grads for one in passes], [one.pull_shared for one in passes],
      [one.push_shared for one in passes],
      lambda plan, weights: look_ahead(
          plan, weights, state.params,
          lambda params, i: pass_of.losses(params, state.model_state, parts[i])),
      shares_parameters=len(passes[0].own_grads) < len(flatten_dict(state.params)),
      one_stream=one_stream, one_representation=pass_of.model.sharing.one_representation)


def _updated(state: TrainState, grads: Any, optimizer: optax.GradientTransformation,
             model: MultiTaskModel, only: Sequence[str] | None) -> tuple[Any, Any, Any]:
  """Parameters and optimizer state after a step, and the updates; what absent tasks own stays."""
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  if only is not None:
    absent = [path for path in flatten_dict(state.params)
              if model.owner(path) is not None and model.owner(path) not in only]
    updates = kept(updates, jax.tree.map(jnp.zeros_like, updates), absent)
    opt_state = kept(opt_state, state.opt_state, absent)
  return optax.apply_updates(state.params, updates), opt_state, updates


def _penalised(grads: Any, model: MultiTaskModel, params: Any,
               of_batch: Mapping[str, Callable[[Any], jax.Array]],
               penalties: Mapping[str, Callable[[Any], jax.Array]],
               frozen: Sequence[str]) -> tuple[Any, dict[str, jax.Array]]:
  """Gradients with those of the penalties, given and of the sharing architecture; their values."""
  own = {name: lambda params, name=name: model.penalties(params)[name]
         for name in jax.eval_shape(model.penalties, params)}
  if twice := sorted(own.keys() & of_batch.keys() | (own | of_batch).keys() & penalties.keys()):
    raise ValueError(f"penalties: expected names that the sharing architecture does not use "
                     f"itself, found {twice}")
  values = {}
  for name, penalty in {**own, **of_batch, **penalties}.items():
    def of_moving(params, penalty=penalty):
      return penalty(unflatten_dict(hold(flatten_dict(params), frozen)))
    values[name], penalty_grads = jax.value_and_grad(of_moving)(params)
    grads = jax.tree.map(jnp.add, grads, penalty_grads)
  return grads, values


def _own_grads(passes: Sequence[Pass], decision: Decision, balancer: Balancer,
               model: MultiTaskModel, tasks: Sequence[Task]) -> Flat:
  """Gradients of what tasks own, each task's own times its weight where the method says so."""
  scales = decision.part_weights
  if scales is None:
    if not balancer.scale_heads:  # an inactive task's are zero
      return passes[0].own_grads
    scales = decision.weights[None]
  order = {task.name: i for i, task in enumerate(tasks)}

  def scaled(grads: Flat, scale: jax.Array) -> Flat:
    return {path: g * scale[order[model.owner(path)]].astype(g.dtype)
            for path, g in grads.items()}
  parts = [scaled(one.own_grads, scale) for one, scale in zip(passes, scales)]
  return jax.tree.map(lambda *grads: sum(grads[1:], grads[0]), *parts)


def _finite(passes: Sequence[Pass], tasks: Sequence[Task]) -> jax.Array:
  """Whether losses and gradients of each task are finite in all passes, [T] bool."""
  def sound(grads: Any) -> jax.Array:
    return jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(grads)], jnp.bool_).all()
  return jnp.stack([
      jnp.isfinite(one.losses) & jnp.stack([sound(one.feature_grads[t.name]) for t in tasks])
      for one in passes]).all(axis=0)


def _metrics(passes: Sequence[Pass], state: TrainState, batch: Batch, model: MultiTaskModel,
             tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
  """Metric states of all passes; empty ones of the tasks that took no part."""
  taking_part = [task for task in tasks if task.name in passes[0].metrics]
  absent = [task for task in tasks if task not in taking_part]
  metrics = functools.reduce(functools.partial(merge_metrics, taking_part),
                             [one.metrics for one in passes])
  if absent:
    shapes = jax.eval_shape(lambda: model.apply({"params": state.params, **state.model_state},
                                                batch, train=False))
    metrics |= empty_metrics(absent, shapes, batch)
  return {task.name: metrics[task.name] for task in tasks}


def eval_step(state: TrainState, batch: Batch, *, model: MultiTaskModel,
              tasks: Sequence[Task], precision: str = "float32") -> dict[str, dict[str, Any]]:
  """Metric states `{task: {metric: state}}` of one batch; examples without label do not count.

  Merge the states of several batches with `tasks.merge_metrics` and read them with
  `tasks.compute_metrics`. Arguments are those of `train_step`.
  """
  outputs = apply(model, {"params": state.params, **state.model_state}, batch, precision,
                  train=False)
  return task_metrics(tasks, outputs, batch)
