"""RLW: random weights, drawn anew in every step."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, masked
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, no_state, wide


def random_weights(distribution: str = "normal") -> Balancer:
  """Draws the weights of every step, on average the same for all tasks.

  The rule: `w = softmax(λ)` with `λ_i` drawn from N(0, 1), or another law on the simplex.

  Args:
    distribution: "normal" or "uniform": softmax of N(0, 1) or of U[0, 1); "dirichlet": uniform
      on the simplex; "bernoulli": a subset, any but the empty one with the same probability,
      whose tasks share the weight; "one_hot": a single task has it all.

  Returns:
    A balancer that needs the losses only; one backward pass. The weights of the active tasks sum
    to one.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> draw = lambda key: balancing.aggregate(random_weights("bernoulli"), J, key=key)[0]
  >>> draws = jax.vmap(draw)(jax.random.split(jax.random.key(0), 100))
  >>> sorted(set(map(tuple, draws.tolist())))
  [(-4.0, 1.0, 1.0), (1.0, 1.0, 1.0), (6.0, 1.0, 1.0)]

  Reference:
    Lin, Ye, Zhang, Tsang: Reasonable Effectiveness of Random Weighting: A Litmus Test for
    Multi-Task Learning. TMLR 2022, arXiv:2111.10603.

  Differences:
    The sum is one as in the paper, LibMTL and TorchJD, so that a step is T times shorter than
    that of `equal`; the code of Kurin et al. rescales to T (`reduction="sum"` of
    `balancing.get`). Tasks that are not active take no part in the draw.
  """
  hyperparameters.check_choice("random_weights", "distribution", distribution, tuple(DRAWS))

  def update(signals: Signals, state: Any) -> tuple[Decision, Any]:
    weights = DRAWS[distribution](signals.key, signals.active, wide(signals.losses.dtype))
    return Decision(weights), state

  return Balancer("random_weights", no_state, update, frozenset({"losses"}), scale_heads=True,
                  scale="mean")


def _normal(key: jax.Array, active: jax.Array, dtype: Any) -> jax.Array:
  return masked.softmax(jax.random.normal(key, active.shape, dtype), active)


def _uniform(key: jax.Array, active: jax.Array, dtype: Any) -> jax.Array:
  return masked.softmax(jax.random.uniform(key, active.shape, dtype), active)


def _dirichlet(key: jax.Array, active: jax.Array, dtype: Any) -> jax.Array:
  """Exponential variates divided by their sum: `softmax(log E)`."""
  return masked.softmax(-jax.random.gumbel(key, active.shape, dtype), active)


def _bernoulli(key: jax.Array, active: jax.Array, dtype: Any) -> jax.Array:
  """Fair coins, given that one shows heads: first who is the first to, then the rest."""
  key_first, key_rest = jax.random.split(key)
  place = jnp.cumsum(active)  # 1, 2, … over the active tasks
  halvings = jnp.where(active, -place.astype(dtype) * jnp.log(2.0).astype(dtype), -jnp.inf)
  first = place[jax.random.categorical(key_first, halvings)]
  heads = jax.random.bernoulli(key_rest, shape=active.shape)
  chosen = active & ((place == first) | ((place > first) & heads))
  return chosen.astype(dtype) / masked.count(chosen, dtype)


def _one_hot(key: jax.Array, active: jax.Array, dtype: Any) -> jax.Array:
  chosen = jax.random.categorical(key, jnp.where(active, 0, -jnp.inf).astype(dtype))
  return (active & (jnp.arange(active.size) == chosen)).astype(dtype)


DRAWS = {"normal": _normal, "uniform": _uniform, "dirichlet": _dirichlet,
         "bernoulli": _bernoulli, "one_hot": _one_hot}
