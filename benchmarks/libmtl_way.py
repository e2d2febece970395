"""How LibMTL balances by gradients: what its users' steps do, written anew to be timed.

LibMTL (Lin, Zhang: LibMTL: A Python Library for Multi-Task Learning, JMLR 2023, arXiv:2203.14338)
is a code base to copy from rather than a package to install. Reproduced here from its commit
4336804, as far as it takes time:

  gradients  one `backward` a task with the graph retained; after each, the shared parameters'
             gradients are copied one by one into a flat vector on the host, that into a row of
             [T, P] on the device, and set to zero in place. Nash-MTL calls `autograd.grad` for each
             task instead.
  pcgrad     inner products and projections of whole vectors [P], pair after pair.
  mgda       the Gramian on the device; for two tasks a closed form, else from the best pair by a
             projected gradient with line search, up to 250 iterations of small tensor operations.
  cagrad     the Gramian to the host, SciPy's SLSQP, the combination on the device.
  nash_mtl   up to 20 conic programs by cvxpy and ECOS from the last weights, then one more backward
             pass of the weighted losses, and the shared gradient cut to norm 1.
  upgrad     the Gramian to the host, one quadratic program a task by quadprog in float64.

Left out is what its trainer adds to every step whatever the method: records of losses and metrics.
"""

from collections.abc import Callable, Sequence
import random
from typing import Any

import numpy as np
import torch

METHODS = ("pcgrad", "mgda", "cagrad", "nash_mtl", "upgrad")


class LibMTLWay:
  """Fills in the gradients of a step.

  Args:
    method: one of `METHODS`.
    shared: the shared parameters; heads get gradients by the way.
    num_tasks: T.

  Raises:
    ImportError: where a package that the method solves with is missing.
  """

  def __init__(self, method: str, shared: Sequence[torch.nn.Parameter], num_tasks: int):
    self._shared = list(shared)
    self._combine = _COMBINE.get(method)
    self._nash = Bargain(num_tasks) if method == "nash_mtl" else None
    if method == "upgrad":
      import quadprog  # noqa: F401

  def __call__(self, losses: Sequence[torch.Tensor]) -> None:
    if self._nash:
      rows = torch.stack([self._flat(torch.autograd.grad(loss, self._shared, retain_graph=True))
                          for loss in losses])
      weights = self._nash(rows @ rows.T)
      sum(weight * loss for weight, loss in zip(weights, losses)).backward()
      torch.nn.utils.clip_grad_norm_(self._shared, 1.0)
      return
    rows = torch.zeros(len(losses), sum(p.numel() for p in self._shared),
                       device=losses[0].device)
    for i, loss in enumerate(losses):
      loss.backward(retain_graph=i + 1 < len(losses))
      rows[i] = self._on_host()
      for parameter in self._shared:
        parameter.grad.zero_()
    self._set(self._combine(rows))

  def _flat(self, grads: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([grad.reshape(-1) for grad in grads])

  def _on_host(self) -> torch.Tensor:
    """The shared parameters' gradients as one vector [P]."""
    vector, start = torch.zeros(sum(p.numel() for p in self._shared)), 0
    for parameter in self._shared:
      vector[start:start + parameter.numel()] = parameter.grad.reshape(-1)
      start += parameter.numel()
    return vector

  def _set(self, direction: torch.Tensor) -> None:
    """Makes a vector [P] the shared parameters' gradient."""
    parts = direction.split([p.numel() for p in self._shared])
    for parameter, part in zip(self._shared, parts):
      parameter.grad = part.reshape(parameter.shape).clone()


def pcgrad(rows: torch.Tensor) -> torch.Tensor:
  """The sum of the gradients, each without what conflicts with the others: [T, P] -> [P]."""
  projected = rows.clone()
  for i in range(len(rows)):
    for j in random.sample(range(len(rows)), len(rows)):
      overlap = projected[i] @ rows[j]
      if overlap < 0:
        projected[i] -= overlap / rows[j].norm() ** 2 * rows[j]
  return projected.sum(dim=0)


def _nearest_on_segment(own: torch.Tensor, both: torch.Tensor,
                        other: torch.Tensor) -> tuple[Any, torch.Tensor]:
  """The share of the first of two vectors in their shortest combination, and its square length."""
  if both >= own:
    return 0.999, own
  if both >= other:
    return 0.001, other
  share = (other - both) / (own + other - 2 * both)
  return share, other + share * (both - other)


def _onto_simplex(point: torch.Tensor) -> torch.Tensor:
  ordered = torch.sort(point, descending=True).values
  level, total = (point.sum() - 1) / len(point), 0.0
  for i in range(len(point) - 1):
    total = total + ordered[i]
    if (total - 1) / (i + 1) > ordered[i + 1]:
      level = (total - 1) / (i + 1)
      break
  return torch.clamp(point - level, min=0)


def _walk(weights: torch.Tensor, descent: torch.Tensor) -> torch.Tensor:
  """As far as some weight is 0 or 1, along the descent within the simplex's plane."""
  slope = descent - descent.mean()
  falls, rises = slope < 0, slope > 0
  ends = torch.cat([-weights[falls] / slope[falls], (1 - weights[rises]) / slope[rises]])
  ends = ends[ends > 1e-7]
  length = ends.min() if len(ends) else 1.0
  return _onto_simplex(weights + length * slope)


def mgda_weights(gramian: torch.Tensor) -> torch.Tensor:
  """Weights [T] of a short convex combination, by a Gramian [T, T]."""
  count, pairs = len(gramian), []
  for i in range(count):
    for j in range(i + 1, count):
      share, square = _nearest_on_segment(gramian[i, i], gramian[i, j], gramian[j, j])
      pairs.append((float(square), i, j, share))
  _, i, j, share = min(pairs, key=lambda pair: pair[0])
  weights = torch.zeros(count, device=gramian.device)
  weights[i], weights[j] = share, 1 - share
  if count == 2:
    return weights
  for _ in range(250):
    point = _walk(weights, -(gramian @ weights))
    products = [(a[:, None] * b[None] * gramian).sum()
                for a, b in ((weights, weights), (weights, point), (point, point))]
    share, _ = _nearest_on_segment(*products)
    new = share * weights + (1 - share) * point
    if (new - weights).abs().sum() < 1e-5:
      break
    weights = new
  return weights


def mgda(rows: torch.Tensor) -> torch.Tensor:
  """[T, P] -> [P]."""
  return mgda_weights(rows @ rows.T) @ rows


def cagrad(rows: torch.Tensor, c: float = 0.5) -> torch.Tensor:
  """[T, P] -> [P], divided by `1 + c²`."""
  from scipy.optimize import minimize
  gramian = (rows @ rows.T).cpu().double().numpy()
  start = np.full(len(rows), 1 / len(rows))
  radius = c * np.sqrt(gramian.mean() + 1e-8) + 1e-8
  found = minimize(
      lambda w: w @ gramian @ start + radius * np.sqrt(w @ gramian @ w + 1e-8), start,
      bounds=[(0, 1)] * len(rows), constraints={"type": "eq", "fun": lambda w: 1 - w.sum()})
  push = torch.as_tensor(found.x, dtype=rows.dtype, device=rows.device) @ rows
  return (rows.mean(dim=0) + radius / (push.norm() + 1e-8) * push) / (1 + c ** 2)


def upgrad(rows: torch.Tensor) -> torch.Tensor:
  """[T, P] -> [P]; 1e-4 of the trace is added to the Gramian's diagonal."""
  import quadprog
  gramian = (rows @ rows.T).cpu().double().numpy()
  gramian = gramian / np.trace(gramian) + 1e-4 * np.eye(len(rows))
  shares = np.eye(len(rows)) / len(rows)
  weights = sum(quadprog.solve_qp(gramian, np.zeros(len(rows)), np.eye(len(rows)), share)[0]
                for share in shares)
  return torch.as_tensor(weights, dtype=rows.dtype, device=rows.device) @ rows


_COMBINE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "pcgrad": pcgrad, "mgda": mgda, "cagrad": cagrad, "upgrad": upgrad}


class Bargain:
  """The weights of Nash-MTL, by a concave-convex procedure that starts from the last ones."""

  def __init__(self, num_tasks: int):
    import cvxpy
    import ecos  # noqa: F401
    self._cvxpy = cvxpy
    self._last = np.ones(num_tasks)
    self._weights = cvxpy.Variable(num_tasks, nonneg=True)
    self._around = cvxpy.Parameter(num_tasks, value=self._last)
    self._gramian = cvxpy.Parameter((num_tasks, num_tasks), value=np.eye(num_tasks))
    self._size = cvxpy.Parameter(1, value=np.ones(1))
    gains = self._gramian @ self._weights
    tangent = 1 / self._around + (1 / (self._gramian @ self._around)) @ self._gramian
    fair = [-cvxpy.log(self._weights[i] * self._size) - cvxpy.log(gains[i]) <= 0
            for i in range(num_tasks)]
    self._program = cvxpy.Problem(cvxpy.Minimize(
        cvxpy.sum(gains) + tangent @ (self._weights - self._around) / self._size), fair)

  def __call__(self, gramian: torch.Tensor) -> torch.Tensor:
    """Weights [T] for a Gramian [T, T]."""
    size = float(gramian.norm())
    normal = gramian.cpu().double().numpy() / size
    self._gramian.value, self._size.value = normal, np.array([size])
    current = self._last
    for _ in range(20):
      self._weights.value = self._around.value = current
      try:
        self._program.solve(solver=self._cvxpy.ECOS, warm_start=True, max_iters=100)
      except self._cvxpy.error.SolverError:
        self._weights.value = current
      found = self._weights.value
      if (found is None or np.linalg.norm(normal @ current - 1 / (current + 1e-10)) < 1e-3
          or np.linalg.norm(found - current) < 1e-6):
        break
      current = found
    self._last = current
    return torch.as_tensor(current, dtype=gramian.dtype, device=gramian.device)
