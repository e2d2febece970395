"""The contract of every balancing method: signals in, decision out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LEVELS = ("losses", "products", "gramian", "cross_gramian", "task_grads")
EXTRAS = ("gradient_state", "losses_after_step", "lookahead")
_BLOCK = 4096  # parameters whose products are taken at once, on CPUs
_BLOCKS = 16  # at least; shorter products are as fast in one piece
_FEW = 12  # rows, at most, whose products are faster row by row


class Ahead(NamedTuple):
  """What a look-ahead found: steps of SGD on part 0, and what they do to the other part.

  Attributes:
    losses: [T] losses of part 0 after the steps; 0 where inactive.
    slopes: [K, T] inner products of the gradients of the K objectives on part 1, taken after the
      steps, with the tasks' gradients on part 0, taken before them, over all parameters; None
      where no objectives were given.
  """

  losses: jax.Array
  slopes: jax.Array | None = None


class Signals(NamedTuple):
  """What a balancer may look at in one step. Only what it `needs` is filled in.

  Attributes:
    losses: [T] mean loss of each task over its labelled examples; 0 where inactive.
    active: [T] bool; False where the batch holds no label of the task.
    key: PRNG key of this step, for methods that draw.
    gramian: [T, T] inner products of the tasks' gradients, float32 or wider.
    task_grads: pytree whose leaves stack the tasks' gradients, [T, ...].
    products: `products(weights, p=0, q=0) -> [T]`: the inner products of the tasks' gradients on
      part p of the batch with the weighted sum of those on part q; `G w` where both are part 0.
    cross_gramian: `cross_gramian[p][q]` is [T, T], the inner products of the gradients on part p
      of the batch with those on part q.
    ahead: what the look-ahead found.
  """

  losses: jax.Array
  active: jax.Array
  key: jax.Array
  gramian: jax.Array | None = None
  task_grads: Any = None
  products: Callable[..., jax.Array] | None = None
  cross_gramian: Any = None
  ahead: Ahead | None = None


class Decision(NamedTuple):
  """What a balancer decides.

  Attributes:
    weights: [T] weights of the tasks' gradients; 0 where inactive. A method that returns a
      direction reports here how much of each gradient it kept.
    direction: pytree like one task's gradient, or None: the weighted sum of the gradients.
    part_weights: [parts, T] weights of the gradients of every part, or None: `weights` are those
      of part 0, and the other parts only informed the decision.
  """

  weights: jax.Array
  direction: Any = None
  part_weights: jax.Array | None = None


class Lookahead(NamedTuple):
  """What a method wants tried out before it decides.

  Attributes:
    weights: `weights(state, active) -> [T]`, of the losses on part 0 that the steps descend.
    learning_rate: of the steps, plain SGD over all parameters.
    steps: how many.
    objectives: `objectives(num_tasks) -> [K, T]`, weights of the tasks' losses on part 1 in each
      objective; None where only the losses after the steps are wanted.
  """

  weights: Callable[[Any, jax.Array], jax.Array]
  learning_rate: Any
  steps: int = 1
  objectives: Callable[[int], jax.Array] | None = None


class Balancer(NamedTuple):
  """A balancing method: pure functions and what they ask of the training step.

  Attributes:
    name: the name that users type.
    init: `init(num_tasks) -> state`, a NamedTuple of arrays (or `()`); with "gradient_state",
      `init(num_tasks, task_grads)`, whose second argument has the shapes of `Signals.task_grads`.
    update: `update(signals, state) -> (decision, state)`.
    needs: frozenset with one of `LEVELS`, and any of `EXTRAS`: the step computes exactly that.
      "gradient_state": the state holds something of the size of the task gradients.
      "losses_after_step": `after_step` wants the losses of the same batch after the step.
      "lookahead": `lookahead` says which steps to try out before the decision.
    scale_heads: whether the weights also scale the gradients of what tasks do not share.
    scale: what comes out when all T active gradients equal g: "sum" T·g, "mean" g, "own" neither.
    after_step: `after_step(losses, active, state) -> state`, for "losses_after_step".
    due: `due(state) -> [] bool`, whether the next update looks at gradients; None where always.
    parts: into how many parts of equal size each stream's batch is cut, as independent samples;
      losses, Gramian and task gradients are those of part 0.
    weighs_parts: whether the decision holds `part_weights`.
    lookahead: for "lookahead".
    by_products: `by_products(count) -> Balancer`, the same method in need of "products", for which
      it asks at most `count` times unless its rule fixes how often; None where it cannot. Given a
      Gramian in their place it decides as the method itself would.
  """

  name: str
  init: Callable[..., Any]
  update: Callable[[Signals, Any], tuple[Decision, Any]]
  needs: frozenset[str]
  scale_heads: bool = False
  scale: str = "sum"
  after_step: Callable[[jax.Array, jax.Array, Any], Any] | None = None
  due: Callable[[Any], jax.Array] | None = None
  parts: int = 1
  weighs_parts: bool = False
  lookahead: Lookahead | None = None
  by_products: Callable[[int], "Balancer"] | None = None


def init_state(balancer: Balancer, num_tasks: int, task_grads: Any) -> Any:
  """A balancer's first state.

  Args:
    balancer: any method.
    num_tasks: T.
    task_grads: arrays or shapes of the stacked task gradients, leaves [T, ...].
  """
  if "gradient_state" in balancer.needs:
    return balancer.init(num_tasks, task_grads)
  return balancer.init(num_tasks)


def no_state(num_tasks: int) -> tuple:
  """State of a method that has none."""
  del num_tasks
  return ()


def wide(*dtypes: Any) -> Any:
  """The widest of some floating dtypes, float32 at least: what sums are taken in."""
  return max((jnp.dtype(jnp.float32), *dtypes), key=lambda dtype: jnp.finfo(dtype).bits)


def gramian_of(task_grads: Any, others: Any = None) -> jax.Array:
  """Inner products [T, T] of stacked gradients, summed over all leaves in float32 or wider.

  With one another, or with `others`, gradients of the same shapes taken elsewhere.

  >>> import jax.numpy as jnp
  >>> gramian_of({"w": jnp.array([[-4., 1., 1.], [6., 1., 1.]])}).tolist()
  [[18.0, -22.0], [-22.0, 38.0]]
  """
  leaves = jax.tree.leaves(task_grads)
  other_leaves = leaves if others is None else jax.tree.leaves(others)
  dtype = wide(*(leaf.dtype for leaf in leaves))

  def leaf_gramian(leaf, other):
    return _products(*(x.reshape(x.shape[0], -1).astype(dtype) for x in (leaf, other)))
  return sum(leaf_gramian(leaf, other) for leaf, other in zip(leaves, other_leaves))


def _products(rows: jax.Array, others: jax.Array) -> jax.Array:
  """Inner products [T, U] of rows [T, P] and [U, P]."""
  product = lambda a, b: jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
  blocks = rows.shape[1] // _BLOCK if jax.default_backend() == "cpu" else 0
  if blocks < _BLOCKS:
    return product(rows, others)
  # CPUs are several times slower at one product of so few rows that are so long.
  block = lambda x, i: jax.lax.dynamic_slice_in_dim(x, i * _BLOCK, _BLOCK, 1)
  rest = product(rows[:, blocks * _BLOCK:], others[:, blocks * _BLOCK:])
  of_block = product
  if rows.shape[0] <= _FEW:
    of_block = lambda a, b: jax.lax.map(lambda row: product(b, row), a)
  return jax.lax.fori_loop(
      0, blocks, lambda i, total: total + of_block(block(rows, i), block(others, i)), rest)


def combine(task_grads: Any, weights: jax.Array) -> Any:
  """The weighted sum over tasks, leaf by leaf: `Jᵀ w`, in each leaf's own dtype."""
  def leaf_sum(leaf):
    dtype = wide(leaf.dtype)
    return jnp.tensordot(weights.astype(dtype), leaf.astype(dtype), axes=1,
                         precision=jax.lax.Precision.HIGHEST).astype(leaf.dtype)
  return jax.tree.map(leaf_sum, task_grads)


def aggregate(balancer: Balancer, jacobian: Any, *, losses: jax.Array | None = None,
              active: jax.Array | None = None, state: Any = None,
              key: jax.Array | None = None) -> tuple[Any, Any]:
  """Applies a balancer to a Jacobian outside of any training step: `[T, P] -> [P]`.

  Args:
    balancer: any method.
    jacobian: [T, P], or a pytree whose leaves stack the tasks' gradients; it stands for that of
      every part of a batch.
    losses: [T] losses; ones when left out.
    active: [T] bool; all active when left out.
    state: the balancer's state; a fresh one when left out.
    key: PRNG key; `jax.random.key(0)` when left out.

  Returns:
    The direction handed to the optimizer for the shared parameters, and the new state.

  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> d, _ = aggregate(balancing.mgda(), J)
  >>> [round(float(x), 4) + 0.0 for x in d]
  [0.0, 1.0, 1.0]
  """
  num_tasks = jax.tree.leaves(jacobian)[0].shape[0]
  state = init_state(balancer, num_tasks, jacobian) if state is None else state
  if active is not None:  # zero times a NaN is a NaN: what an inactive task holds goes first
    jacobian = jax.tree.map(
        lambda leaf: jnp.where(active.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0), jacobian)
  signals = Signals(
      losses=jnp.ones(num_tasks) if losses is None else losses,
      active=jnp.ones(num_tasks, bool) if active is None else active,
      key=jax.random.key(0) if key is None else key,
  )
  decision, state = balancer.update(fill_in(signals, balancer, state, jacobian), state)
  if decision.direction is not None:
    return decision.direction, state
  weights = decision.weights if decision.part_weights is None else decision.part_weights.sum(axis=0)
  return combine(jacobian, weights), state


def fill_in(signals: Signals, balancer: Balancer, state: Any, jacobian: Any) -> Signals:
  """Signals with all that a balancer needs, of losses that are linear with this Jacobian.

  Every part of the batch has these gradients, and a look-ahead changes them no more than the
  losses of a linear model change.
  """
  gramian = gramian_of(jacobian)
  if "gramian" in balancer.needs:
    signals = signals._replace(gramian=gramian)
  if "task_grads" in balancer.needs:
    signals = signals._replace(task_grads=jacobian)
  if "products" in balancer.needs:
    signals = signals._replace(products=lambda weights, p=0, q=0: jnp.matmul(
        gramian, weights.astype(gramian.dtype), precision=jax.lax.Precision.HIGHEST))
  if "cross_gramian" in balancer.needs:
    signals = signals._replace(cross_gramian=((gramian,) * balancer.parts,) * balancer.parts)
  if "lookahead" in balancer.needs:
    plan = balancer.lookahead
    both = signals.active[:, None] & signals.active[None]
    gramian = jnp.where(both, gramian, 0)
    weights = plan.weights(state, signals.active).astype(gramian.dtype)
    moved = jnp.asarray(plan.learning_rate, gramian.dtype) * plan.steps * (gramian @ weights)
    slopes = None
    if plan.objectives:
      slopes = plan.objectives(gramian.shape[0]).astype(gramian.dtype) @ gramian
    signals = signals._replace(ahead=Ahead(
        signals.losses - moved.astype(signals.losses.dtype), slopes))
  return signals
