"""LDC-MTL: a price on neighbours' losses being apart."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.balancing import hyperparameters, masked, trained
from mtl_jax.balancing.balancer import Balancer, Decision, Signals

NORMALIZATIONS = ("none", "initial", "log")
LARGEST_RATIO = 1e30


class LdcMtlState(NamedTuple):
  """What the tasks have learned of their weights.

  Attributes:
    logits: [T] v, whose sigmoid weighs the task.
    first: [T] the task's first loss; 1 before it.
    seen: [T] bool, whether there was one.
    adam: Adam's moments and step counts, one a task: every leaf is [T].
  """

  logits: jax.Array
  first: jax.Array
  seen: jax.Array
  adam: Any


def ldc_mtl(penalty: float | jax.Array = 0.01, normalization: str = "initial",
            init: float | jax.Array = 1.0, learning_rate: float | jax.Array = 1e-3) -> Balancer:
  """Loss discrepancy control: learns weights under which all losses are of one size.

  The rule: with `s = σ(v)`, `v` learned beside the network, and normalised losses `M`, minimise
  `Σ s_i M_i / Σ s_j + λ Σ |s_i M_i - s_(i+1) M_(i+1)|`, where the first denominator counts as
  constant. With `q_i` the derivative of the sum of distances by `s_i M_i`, in {-2, …, 2}, and
  `k_i = 1 / Σ s_j + λ q_i`: `w_i = s_i k_i dM_i/dL_i`, taken before the step, and Adam moves `v_i`
  against `s_i (1 - s_i) M_i k_i`.

  Args:
    penalty: λ, from 0 on. The paper has 0.01 for CelebA, 0.05 for NYUv2 and QM9.
    normalization: "none" `M = L`; "initial" `M = L / L0` with `L0` the task's first loss; "log"
      `M = log(L / L0)`.
    init: first value of every `v_i`, within [-30, 30], the range in which `v_i` stays.
    learning_rate: of the Adam that moves `v`; above 0.

  Returns:
    A balancer that needs the losses only; one backward pass. Neighbours are active tasks with no
    active one between them. With more than `1 / (2 λ)` tasks a weight may be negative.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import balancing
  >>> J = jnp.array([[-4., 1., 1.], [6., 1., 1.]])
  >>> balancer = ldc_mtl(0.1, normalization="none", init=0.)
  >>> d, state = balancing.aggregate(balancer, J, losses=jnp.array([1., 2.]))
  >>> [round(float(x), 4) for x in d]  # w: 1/2 - 1/20, 1/2 + 1/20
  [1.5, 1.0, 1.0]

  Reference:
    Xiao et al.: LDC-MTL: Balancing Multi-Task Learning through Scalable Loss Discrepancy Control.
    2025, arXiv:2502.08585.

  Differences:
    The paper states two levels and solves them as one, with the penalty; that one is here. The
    official code trains `v` with the network's optimizer, at its rate of 1e-3; here it has its own
    Adam. A loss below 1e-20 counts as that much, and `L / L0` is at most 1e30.
  """
  hyperparameters.check_numbers("ldc_mtl", "penalty", penalty, "a number from 0 on",
                                lambda array: array.ndim == 0 and array >= 0)
  hyperparameters.check_choice("ldc_mtl", "normalization", normalization, NORMALIZATIONS)
  trained.check("ldc_mtl", init, learning_rate)

  def init_state(num_tasks: int) -> LdcMtlState:
    logits = jnp.full(num_tasks, init, dtype=float)
    return LdcMtlState(logits, jnp.ones_like(logits), jnp.zeros(num_tasks, bool),
                       trained.start(logits))

  def update(signals: Signals, state: LdcMtlState) -> tuple[Decision, LdcMtlState]:
    active, dtype = signals.active, state.logits.dtype
    raw = masked.losses_of(signals.losses, active, dtype)
    losses = masked.positive(signals.losses, active, dtype)
    first = jnp.where(state.seen, state.first, losses)
    values, slopes = {
        "none": lambda: (raw, jnp.ones_like(raw)),
        "initial": lambda: (jnp.minimum(losses / first, LARGEST_RATIO), 1 / first),
        "log": lambda: (jnp.log(losses) - jnp.log(first), 1 / losses),
    }[normalization]()

    sigmoids = jnp.where(active, jax.nn.sigmoid(state.logits), 0)
    signs = discrepancy_gradient(sigmoids * values, active)
    prices = jnp.asarray(penalty, dtype) * signs
    prices += 1 / jnp.where(active.any(), jnp.sum(sigmoids), 1)
    gradient = sigmoids * (1 - sigmoids) * values * prices
    logits, adam = trained.descend(state.logits, state.adam, gradient, learning_rate)
    stepped = LdcMtlState(logits, first, jnp.ones_like(state.seen), adam)
    weights = jnp.where(active, sigmoids * prices * slopes, 0)
    return Decision(weights), masked.keep(active, stepped, state)

  return Balancer("ldc_mtl", init_state, update, frozenset({"losses"}), scale_heads=True,
                  scale="own")


def discrepancy_gradient(values: jax.Array, active: jax.Array) -> jax.Array:
  """Gradient [T] of the sum of distances between neighbours among the active values [T].

  >>> active = jnp.array([True, True, False, True])
  >>> discrepancy_gradient(jnp.array([1., 3., 9., 2.]), active).tolist()
  [-1.0, 2.0, 0.0, -1.0]
  """
  order = jnp.argsort(~active, stable=True)  # the active ones first
  ordered, there = values[order], active[order]
  signs = jnp.where(there[1:], jnp.sign(masked.difference(ordered[:-1], ordered[1:])), 0)
  return jnp.zeros_like(values).at[order].set(jnp.pad(signs, (0, 1)) - jnp.pad(signs, (1, 0)))
