"""Agreement with TorchJD wherever both define the same update; skipped where it is absent.

The optional dependencies `peers` install it. Both sides compute in float64, so that what is
compared is the definition and not the rounding. Every row says which of its options are ours, and
what limits the agreement. Left out:

  GradDrop, Random     draw; the two generators have nothing in common
  PCGrad for T > 2     draws the order of the projections
  GradVac for T > 2    the same
  MoDo, SDMGrad        take several batches a step; there is nothing of ours to compare
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import balancing
from mtl_jax.balancing.balancer import gramian_of, init_state

torch = pytest.importorskip("torch")
pytest.importorskip("torchjd")

from torchjd import aggregation, scalarization  # noqa: E402

# The solvers that TorchJD calls announce their own future changes.
pytestmark = pytest.mark.filterwarnings("ignore")

SEEDS = (0, 1, 2)
CALLS = 3  # of one method with its state, on as many Jacobians
SIZES = [(num_tasks, parameters) for num_tasks in (2, 3, 8) for parameters in (5, 40)]


def anywhere(num_tasks: int, parameters: int) -> bool:
  return True


def independent(num_tasks: int, parameters: int) -> bool:
  """The gradients are linearly independent, so that some direction serves all tasks."""
  return num_tasks <= parameters


def two(num_tasks: int, parameters: int) -> bool:
  return num_tasks == 2


def three_or_more(num_tasks: int, parameters: int) -> bool:
  return num_tasks >= 3


class Peer(NamedTuple):
  """A method that both sides have.

  Attributes:
    ours: from the number of tasks to our balancer.
    theirs: from the number of tasks to their aggregator.
    tolerance: distance of the directions over the length of theirs.
    why: what the tolerance and the sizes come from.
    where: from T and P to whether both define the same update there.
    size: what the Jacobians are multiplied by.
  """

  ours: Callable[[int], balancing.Balancer]
  theirs: Callable[[int], Any]
  tolerance: float
  why: str
  where: Callable[[int, int], bool] = anywhere
  size: float = 1.0


def numbers(num_tasks: int) -> tuple[float, ...]:
  """Unequal preferences."""
  return tuple(0.5 + i for i in range(num_tasks))


def tensor(values: Any) -> Any:
  return torch.tensor(np.asarray(values, np.float64))


def projector(regularization: float) -> Any:
  return aggregation._upgrad.projector_or_default(None).__class__(reg_eps=regularization)


ROUNDING, CONIC = 1e-9, 5e-4

AGGREGATORS = {
    "sum": Peer(
        lambda T: balancing.equal(), lambda T: aggregation.Sum(), ROUNDING, "closed form"),
    "mean": Peer(
        lambda T: balancing.get("equal", reduction="mean"), lambda T: aggregation.Mean(),
        ROUNDING, "closed form; our reduction is theirs"),
    "constant": Peer(
        lambda T: balancing.fixed(numbers(T)), lambda T: aggregation.Constant(tensor(numbers(T))),
        ROUNDING, "closed form"),
    "upgrad": Peer(
        lambda T: balancing.upgrad(regularization=1e-4), lambda T: aggregation.UPGrad(),
        ROUNDING, "they always regularise, by 1e-4 of the trace; we where asked"),
    "upgrad-bare": Peer(
        lambda T: balancing.upgrad(),
        lambda T: aggregation.UPGrad(projector=projector(1e-11)), 1e-7,
        "their solver needs a positive definite matrix, hence the least regularisation it bears; "
        "with dependent gradients it is most of theirs that is noise", independent),
    "upgrad-preference": Peer(
        lambda T: balancing.upgrad(preference=numbers(T), regularization=1e-4),
        lambda T: aggregation.UPGrad(tensor(numbers(T))), ROUNDING, "shares are used as given"),
    "dualproj": Peer(
        lambda T: balancing.dualproj(regularization=1e-4), lambda T: aggregation.DualProj(),
        ROUNDING, "as upgrad"),
    "dualproj-preference": Peer(
        lambda T: balancing.dualproj(preference=numbers(T), regularization=1e-4),
        lambda T: aggregation.DualProj(tensor(numbers(T))), ROUNDING, "as upgrad"),
    "cagrad": Peer(
        lambda T: balancing.cagrad(c=0.5, rescale=0), lambda T: aggregation.CAGrad(c=0.5),
        CONIC, "they do not rescale, and return zero where zero is in the hull of the gradients; "
        "their conic solver stops at 1e-8 of the objective, the root of that in the direction; see "
        "test_cagrad_serves_the_worst_off_better", independent),
    "cagrad-far": Peer(
        lambda T: balancing.cagrad(c=2.0, rescale=0), lambda T: aggregation.CAGrad(c=2.0),
        CONIC, "as cagrad", independent),
    "pcgrad": Peer(
        lambda T: balancing.pcgrad(), lambda T: aggregation.PCGrad(), ROUNDING,
        "closed form; one other task, hence one order", two),
    "gradvac": Peer(
        lambda T: balancing.gradvac(decay=0.7), lambda T: aggregation.GradVac(beta=0.3), 1e-7,
        "our decay is 1 minus theirs; they add 1e-8 to denominators; one other task, hence one "
        "order", two),
    "imtl_g": Peer(
        lambda T: balancing.imtl_g(), lambda T: aggregation.IMTLG(), ROUNDING,
        "they invert the Gramian, we that of the unit gradients: with dependent gradients these "
        "are two different least-squares solutions", independent),
    **{f"aligned_mtl-{scale}": Peer(
        lambda T, scale=scale: balancing.aligned_mtl(scale, (1 / T,) * T),
        lambda T, scale=scale: aggregation.AlignedMTL(scale_mode=scale), ROUNDING,
        "they prefer 1 / T, we sum unless told so") for scale in ("min", "median", "rmse")},
    "conflict_free": Peer(
        lambda T: balancing.conflict_free(), lambda T: aggregation.ConFIG(), ROUNDING,
        "they invert the unit gradients [T, P], we their cosines [T, T]"),
    **{f"fairgrad-{alpha}": Peer(
        lambda T, alpha=alpha: balancing.fairgrad(alpha),
        lambda T, alpha=alpha: aggregation.FairGrad(alpha=alpha), 1e-6,
        "their least squares stops where a step gains 1e-8; without a solution there is nothing "
        "to compare", independent) for alpha in (0.5, 1.0, 2.0)},
    "krum": Peer(
        lambda T: balancing.krum(byzantine=int(T > 3), selected=2, distance="plain"),
        lambda T: aggregation.Krum(n_byzantine=int(T > 3), n_selected=2), ROUNDING,
        "they sum plain distances, the paper squared ones; two are selected, because with three "
        "tasks the nearest two tie, which they resolve by order and we by sharing",
        three_or_more),
    "trimmed_mean": Peer(
        lambda T: balancing.trimmed_mean(trim=1), lambda T: aggregation.TrimmedMean(trim_number=1),
        ROUNDING, "closed form; they refuse two tasks", three_or_more),
    "pcd": Peer(
        lambda T: balancing.pcd(), lambda T: aggregation.PCD(), ROUNDING,
        "both solve one small program"),
    "pcd-demanding": Peer(
        lambda T: balancing.pcd(threshold=(0.0,) + (0.3,) * (T - 1), decay=0.9),
        lambda T: aggregation.PCD(tau=tensor((0.3,) * (T - 1)), beta=0.9), ROUNDING,
        "our threshold names the leading task too, and does not use it"),
    "excess_mtl": Peer(
        lambda T: balancing.get("excess_mtl", learning_rate=1e-3, start="update",
                                reduction="mean"),
        lambda T: aggregation.ExcessMTL(robust_step_size=1e-3), 1e-7,
        "their weights sum to one; they add 1e-7 under the root and to the first excess, which "
        "large gradients make small", size=100.0),
    "smoothed": Peer(
        lambda T: balancing.get("aligned_mtl", preference=(1 / T,) * T, smoothed=0.9),
        lambda T: aggregation.GramianWeightedAggregator(aggregation.CRMOGMWeighting(
            aggregation.AlignedMTLWeighting(), alpha=0.9)), ROUNDING,
        "ours is a wrapper; both start at the first weights"),
}


def jacobians(num_tasks: int, parameters: int, seed: int) -> np.ndarray:
  """[CALLS, T, P] with norms a decade apart."""
  rng = np.random.default_rng([num_tasks, parameters, seed])
  norms = 10 ** rng.uniform(-0.5, 0.5, (CALLS, num_tasks, 1))
  return norms * rng.normal(size=(CALLS, num_tasks, parameters)) / np.sqrt(parameters)


def our_directions(balancer: balancing.Balancer, series: np.ndarray) -> np.ndarray:
  """[seeds, CALLS, P] directions for Jacobians [seeds, CALLS, T, P], in float64."""
  with jax.enable_x64(True):
    first = jnp.asarray(series[0, 0])

    def call(state, jacobian):
      direction, state = balancing.aggregate(balancer, jacobian, state=state)
      return state, direction

    start = init_state(balancer, first.shape[0], first)
    run = jax.jit(jax.vmap(lambda jacobians: jax.lax.scan(call, start, jacobians)[1]))
    return np.asarray(run(jnp.asarray(series)))


def signals_of(jacobian: Any, losses: Any = None) -> balancing.Signals:
  num_tasks = len(jacobian)
  return balancing.Signals(
      losses=jnp.ones(num_tasks, float) if losses is None else losses,
      active=jnp.ones(num_tasks, bool), key=jax.random.key(0), gramian=gramian_of(jacobian))


def all_jacobians(num_tasks: int, parameters: int) -> np.ndarray:
  return np.stack([jacobians(num_tasks, parameters, seed) for seed in SEEDS])


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
  """Relative to the length of theirs."""
  return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("name, num_tasks, parameters", [
    (name, *size) for name, peer in AGGREGATORS.items() for size in SIZES if peer.where(*size)])
def test_aggregators(name, num_tasks, parameters):
  peer = AGGREGATORS[name]
  series = peer.size * all_jacobians(num_tasks, parameters)
  ours = our_directions(peer.ours(num_tasks), series)
  for jacobian_calls, direction_calls in zip(series, ours):
    aggregator = peer.theirs(num_tasks)
    for jacobian, found in zip(jacobian_calls, direction_calls):
      expected = aggregator(tensor(jacobian)).numpy()
      assert distance(found, expected) <= peer.tolerance, peer.why


@pytest.mark.parametrize("c", [0.5, 2.0])
@pytest.mark.parametrize("num_tasks, parameters", [s for s in SIZES if independent(*s)])
def test_cagrad_serves_the_worst_off_better(num_tasks, parameters, c):
  """In the ball around the mean that both define, our least gain is never below theirs."""
  series = all_jacobians(num_tasks, parameters)
  ours = our_directions(balancing.cagrad(c=c, rescale=0), series)
  for jacobian, found in zip(series.reshape(-1, num_tasks, parameters),
                             ours.reshape(-1, parameters)):
    mean = jacobian.mean(axis=0)
    theirs = aggregation.CAGrad(c=c)(tensor(jacobian)).numpy()
    radius = np.linalg.norm(mean)
    assert np.linalg.norm(found - mean) <= c * radius * (1 + 1e-9)
    assert (jacobian @ found).min() >= (jacobian @ theirs).min() - 1e-7 * radius**2


@pytest.mark.parametrize("num_tasks, parameters", SIZES)
def test_mgda_is_no_longer_than_theirs(num_tasks, parameters):
  """Frank-Wolfe stops early, so that their values are no minimum to compare with."""
  series = all_jacobians(num_tasks, parameters)
  ours = our_directions(balancing.mgda(), series)
  for jacobian, found in zip(series.reshape(-1, num_tasks, parameters),
                             ours.reshape(-1, parameters)):
    theirs = aggregation.MGDA(epsilon=1e-12, max_iters=300)(tensor(jacobian)).numpy()
    scale = 1e-12 * np.square(jacobian).sum()
    assert found @ found <= theirs @ theirs * (1 + 1e-5) + scale
    # The gap to any other point of the hull bounds the distance from the minimum.
    gap = found @ found - (jacobian @ found).min()
    assert gap <= 1e-5 * np.square(jacobian).sum()
    if num_tasks == 2:  # where Frank-Wolfe is exact after a step
      assert distance(found, theirs) <= 1e-6


def unfairness(gramian: np.ndarray, weights: np.ndarray, alpha: float) -> float:
  """How far weights are from `(G w)_i = w_i^(-1/α)`, relative to the right side."""
  return float(np.abs(gramian @ weights * weights ** (1 / alpha) - 1).max())


def with_weights(balancer: balancing.Balancer, series: np.ndarray) -> list[np.ndarray]:
  """Our weights for every Jacobian [T, P] on its own, in float64."""
  with jax.enable_x64(True):
    solve = jax.jit(lambda jacobian: balancer.update(signals_of(jacobian), ())[0].weights)
    return [np.asarray(solve(jacobian)) for jacobian in series]


@pytest.mark.parametrize("num_tasks, parameters", [s for s in SIZES if independent(*s)])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_fairgrad_is_fairer_than_theirs(num_tasks, parameters, alpha):
  """Where both solve the same equations, ours are met, and never worse than theirs."""
  series = all_jacobians(num_tasks, parameters).reshape(-1, num_tasks, parameters)
  for jacobian, weights in zip(series, with_weights(balancing.fairgrad(alpha), series)):
    gramian = jacobian @ jacobian.T
    theirs = aggregation.FairGradWeighting(alpha)(tensor(gramian)).numpy()
    found = unfairness(gramian, weights, alpha)
    assert found <= min(1e-6, unfairness(gramian, theirs, alpha) + 1e-9)


@pytest.mark.parametrize("num_tasks, parameters", [s for s in SIZES if independent(*s)])
def test_nash_mtl(num_tasks, parameters):
  """The direction is theirs wherever they bargain to the end.

  Their solver fails now and then, above all when it starts from the weights of another Jacobian;
  they then return the weights that they started from, with which tasks can conflict. So each
  Jacobian gets a new one, and their weights count where they meet the equations, lengths apart.
  """
  series = all_jacobians(num_tasks, parameters).reshape(-1, num_tasks, parameters)
  agreed = 0
  for jacobian, weights in zip(series, with_weights(balancing.nash_mtl(), series)):
    gramian = jacobian @ jacobian.T
    of_length = lambda w: w * np.sqrt(num_tasks / (w @ gramian @ w))
    weights = of_length(weights)
    theirs = of_length(aggregation.NashMTL(n_tasks=num_tasks).weighting(tensor(jacobian)).numpy())
    assert unfairness(gramian, weights, 1) <= 1e-6
    if unfairness(gramian, theirs, 1) <= 1e-3:
      agreed += 1
      assert distance(jacobian.T @ weights, jacobian.T @ theirs) <= 1e-5
  assert agreed > len(series) / 2


class LossPeer(NamedTuple):
  """A method on losses that both sides have.

  Attributes:
    ours: from the number of tasks to our balancer.
    theirs: from the number of tasks to their scalariser.
    tolerance: of each weight, relative to the largest.
    why: what the tolerance comes from, and how the options correspond.
    advance: what their users call after a step: with the scalariser, its optimizer if it has
      parameters, and the losses after the step.
  """

  ours: Callable[[int], balancing.Balancer]
  theirs: Callable[[int], Any]
  tolerance: float
  why: str
  advance: Callable[[Any, Any, Any], None] = lambda scalarizer, adam, after: None


def train(scalarizer: Any, adam: Any, after: Any) -> None:
  adam.step()
  adam.zero_grad()


SCALARIZERS = {
    "sum": LossPeer(
        lambda T: balancing.equal(), lambda T: scalarization.Sum(), ROUNDING, "closed form"),
    "mean": LossPeer(
        lambda T: balancing.get("equal", reduction="mean"), lambda T: scalarization.Mean(),
        ROUNDING, "closed form"),
    "constant": LossPeer(
        lambda T: balancing.fixed(numbers(T)),
        lambda T: scalarization.Constant(tensor(numbers(T))), ROUNDING, "closed form"),
    "geometric": LossPeer(
        lambda T: balancing.geometric(), lambda T: scalarization.GeometricMean(), ROUNDING,
        "closed form"),
    "uncertainty": LossPeer(
        lambda T: balancing.uncertainty(learning_rate=0.1), lambda T: scalarization.UW(T).double(),
        1e-6, "they leave the optimizer to the caller: Adam of the same rate; its ε differs by "
        "where optax puts the bias correction", train),
    "imtl_l": LossPeer(
        lambda T: balancing.imtl_l(learning_rate=0.1), lambda T: scalarization.IMTLL(T).double(),
        1e-6, "as uncertainty", train),
    "stch": LossPeer(
        lambda T: balancing.stch(mu=0.3), lambda T: scalarization.STCH(mu=0.3), ROUNDING,
        "our form without warm-up is theirs"),
    "stch-preference": LossPeer(
        lambda T: balancing.stch(mu=0.3, weights=numbers(T), ideal=0.2),
        lambda T: scalarization.STCH(0.3, tensor(numbers(T)), tensor((0.2,) * T)), ROUNDING,
        "our ideal is their reference"),
    "pbi": LossPeer(
        lambda T: balancing.pbi(theta=2.0, weights=numbers(T), ideal=0.2),
        lambda T: scalarization.PBI(2.0, tensor(numbers(T)), tensor((0.2,) * T)), 1e-9,
        "they add 1e-12 under a root"),
    "cosmos": LossPeer(
        lambda T: balancing.cosmos(penalty=2.0, weights=numbers(T)),
        lambda T: scalarization.COSMOS(2.0, tensor(numbers(T))), ROUNDING, "closed form"),
    "dwa": LossPeer(
        lambda T: balancing.dwa(temperature=1.5, window=1),
        lambda T: scalarization.DWA(temperature=1.5), ROUNDING,
        "an epoch of theirs, which the caller ends, is a window of ours",
        lambda scalarizer, adam, after: scalarizer.step()),
    "famo": LossPeer(
        lambda T: balancing.famo(learning_rate=0.1, weight_decay=1e-2, min_losses=0.1),
        lambda T: scalarization.FAMO(T, tensor((0.1,) * T), lr=0.1, weight_decay=1e-2).double(),
        1e-6, "as uncertainty", lambda scalarizer, adam, after: scalarizer.update(after)),
}


@pytest.mark.parametrize("num_tasks", [2, 3, 8])
@pytest.mark.parametrize("name", SCALARIZERS)
def test_scalarizers(name, num_tasks):
  """Our weights are the gradient of what they reduce the losses to, over several steps."""
  peer = SCALARIZERS[name]
  active, jacobian = np.ones(num_tasks, bool), np.ones((num_tasks, 1))
  for seed in SEEDS:
    before, after = np.random.default_rng(seed).uniform(0.3, 3, (2, 5, num_tasks))
    scalarizer = peer.theirs(num_tasks)
    parameters = list(scalarizer.parameters()) if name != "famo" else []
    adam = torch.optim.Adam(parameters, lr=0.1) if parameters else None
    with jax.enable_x64(True):
      balancer = peer.ours(num_tasks)
      state = init_state(balancer, num_tasks, jacobian)
      for losses, later in zip(before, after):
        values = tensor(losses).requires_grad_()
        scalarizer(values).backward()
        expected = values.grad.numpy()
        peer.advance(scalarizer, adam, tensor(later))
        decision, state = balancer.update(
            signals_of(jnp.asarray(jacobian), losses=jnp.asarray(losses)), state)
        if balancer.after_step:
          state = balancer.after_step(jnp.asarray(later), jnp.asarray(active), state)
        assert np.abs(decision.weights - expected).max() <= peer.tolerance * np.abs(
            expected).max(), peer.why
