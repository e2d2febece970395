"""Properties that papers claim of their methods: each takes a method and a number of tasks."""

from collections.abc import Callable

import numpy as np

from mtl_jax.balancing.balancer import Balancer
from mtl_jax.testing.jacobians import assert_close, decider, hard_cases, normal


def non_conflicting(balancer: Balancer, num_tasks: int) -> None:
  """No task gets worse to first order: `J d ≥ 0`."""
  decide = decider(balancer, num_tasks)
  for seed in range(5):
    jacobian = normal(num_tasks, seed)
    _, direction, _ = decide(jacobian)
    cosines = jacobian @ np.asarray(direction) / (
        np.linalg.norm(jacobian, axis=1) * max(np.linalg.norm(direction), 1e-3))
    assert cosines.min() > -2e-3, f"{balancer.name}: J d has a cosine of {cosines.min():.2e}"


def permutation_equivariant(balancer: Balancer, num_tasks: int) -> None:
  """Renumbering the tasks renumbers the weights and keeps the direction."""
  decide = decider(balancer, num_tasks)
  for seed in range(3):
    jacobian = normal(num_tasks, seed)
    order = np.random.default_rng(seed).permutation(num_tasks)
    weights, direction, _ = decide(jacobian)
    permuted, same, _ = decide(jacobian[order])
    what = f"{balancer.name}: tasks in the order {order}"
    assert_close(same, direction, what, rtol=1e-3, atol=1e-4)
    assert_close(permuted, np.asarray(weights)[order], what, rtol=2e-2, atol=2e-3)


def scale_equivariant(balancer: Balancer, num_tasks: int) -> None:
  """All gradients c times as long give a direction c times as long."""
  decide = decider(balancer, num_tasks)
  jacobian = normal(num_tasks)
  _, direction, _ = decide(jacobian)
  for scale in (1e-6, 1e-3, 1e3, 1e6):
    _, scaled, _ = decide(jacobian * scale)
    assert_close(np.asarray(scaled) / scale, direction, f"{balancer.name}: times {scale:g}",
                  rtol=1e-3, atol=1e-4)


def scale_invariant(balancer: Balancer, num_tasks: int) -> None:
  """All gradients c times as long give the same direction, of the same length."""
  decide = decider(balancer, num_tasks)
  jacobian = normal(num_tasks)
  _, direction, _ = decide(jacobian)
  for scale in (1e-3, 1e3):
    _, scaled, _ = decide(jacobian * scale)
    assert_close(scaled, direction, f"{balancer.name}: times {scale:g}", rtol=1e-3, atol=1e-4)


def linear_under_row_scaling(balancer: Balancer, num_tasks: int) -> None:
  """The direction is linear in the tasks' scales: `d(diag(a + b) J) = d(diag(a) J) + d(diag(b) J)`.

  UPGrad's paper asks for it (Quinton, Rey, arXiv:2406.16232).
  """
  decide = decider(balancer, num_tasks)
  jacobian, rng = normal(num_tasks), np.random.default_rng(1)
  a, b = rng.uniform(0.5, 2, (2, num_tasks, 1)).astype(np.float32)
  parts = [np.asarray(decide(scale * jacobian)[1]) for scale in (a, b)]
  assert_close(decide((a + b) * jacobian)[1], sum(parts), f"{balancer.name}: scaled rows",
                rtol=1e-3, atol=1e-3)


def simplex(balancer: Balancer, num_tasks: int) -> None:
  """Weights are non-negative and sum to one."""
  decide = decider(balancer, num_tasks)
  for name, jacobian in hard_cases(num_tasks).items():
    weights = np.asarray(decide(jacobian)[0])
    assert (weights >= 0).all() and abs(weights.sum() - 1) < 1e-4, (
        f"{balancer.name}: {name}: weights sum to {weights.sum()}, the least is {weights.min()}")


def stationary(balancer: Balancer, num_tasks: int) -> None:
  """Where a convex combination of the gradients is zero, so is the direction."""
  decide = decider(balancer, num_tasks)
  for seed in range(3):
    jacobian = normal(num_tasks, seed)
    shares = np.random.default_rng(seed).dirichlet(np.ones(num_tasks))[:, None]
    jacobian -= (shares * jacobian).sum(axis=0)
    length = np.linalg.norm(decide(jacobian)[1]) / np.linalg.norm(jacobian, axis=1).mean()
    assert length < 1e-2, f"{balancer.name}: a direction of length {length:.2e} from none"


def declared_scale(balancer: Balancer, num_tasks: int) -> None:
  """T equal gradients come out as their sum or their mean, as the method declares."""
  jacobian = np.repeat(normal(1), num_tasks, axis=0)
  _, direction, _ = decider(balancer, num_tasks)(jacobian)
  factor = {"sum": num_tasks, "mean": 1, "own": None}[balancer.scale]
  if factor:
    assert_close(direction, factor * jacobian[0], f"{balancer.name}: equal gradients", rtol=2e-5)


PROPERTIES: dict[str, Callable[[Balancer, int], None]] = {
    "declared_scale": declared_scale,
    "linear_under_row_scaling": linear_under_row_scaling,
    "non_conflicting": non_conflicting,
    "permutation_equivariant": permutation_equivariant,
    "scale_equivariant": scale_equivariant,
    "scale_invariant": scale_invariant,
    "simplex": simplex,
    "stationary": stationary,
}
