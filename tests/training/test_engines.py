"""Engines that see the Gramian through products or sketches, against the exact one."""

import functools

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import balancing, models
from mtl_jax.training import engines, sharding
from mtl_jax.training.engines.sketched import Sketched, signs
from mtl_jax.training.task_gradients import check_engine
from tests.models.test_operators import temporaries
from tests.training.test_step import Trunk, make

STREAMS = [("s", "s", "s"), ("s", "r", "r")]
TRUNKS = {"hard": Trunk(), "film": models.CNN(channels=(2,), width=4)}  # film: features by task

# Of needs {"products"}: keeps what it is told of two fixed vectors.
PROBES = jnp.array([[0.2, 0.3, 0.5], [1.0, 0.0, -1.0]])
PROBE = balancing.Balancer(
    "probe", lambda num_tasks: jnp.zeros((2, num_tasks)),
    lambda signals, state: (balancing.Decision(jnp.ones(3)),
                            jnp.stack([signals.products(w) for w in PROBES])),
    frozenset({"products"}))


def start(streams=STREAMS[0], balancer=None, gradients="exact", **options):
  """A state that the engine asks for, a batch, and the compiled step."""
  state, batch, step, *_ = make(streams, balancer, gradients=gradients, **options)
  return state, batch, jax.jit(step)


@functools.lru_cache
def exact_logs(streams=STREAMS[0], balancer=balancing.mgda(), sharing="hard"):
  state, batch, step = start(streams, balancer, sharing=sharing, trunk=TRUNKS[sharing])
  return step(state, batch)[1]


@pytest.mark.parametrize("engine, streams, sharing", [
    ("matrix_free", STREAMS[0], "hard"),
    *(pytest.param(engine, streams, sharing, marks=pytest.mark.slow)
      for engine, streams, sharing in [("matrix_free", STREAMS[1], "hard"),
                                       ("matrix_free", STREAMS[0], "film"),
                                       ("matrix_free", STREAMS[1], "film"),
                                       ("exact", STREAMS[1], "hard")])])
def test_products_are_those_of_the_exact_gramian(engine, streams, sharing):
  state, batch, step = start(streams, PROBE, engine, sharing=sharing, trunk=TRUNKS[sharing])
  gramian = exact_logs(streams, sharing=sharing)["gramian"]
  new, _ = step(state, batch)
  np.testing.assert_allclose(new.balancer_state, PROBES @ gramian, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("balancer", [balancing.mgda(), *(
    pytest.param(balancer, marks=pytest.mark.slow) for balancer in (
        balancing.mgda("loss"), balancing.cagrad(), balancing.cagrad(c=2.0, rescale=2),
        balancing.get("mgda", log_losses=True, max_norm=0.05)))])
def test_many_products_lead_to_the_exact_weights(balancer):
  state, batch, step = start(balancer=balancer, gradients=engines.matrix_free(products=12))
  expected = exact_logs(balancer=balancer)
  new, logs = step(state, batch)
  np.testing.assert_allclose(logs["weights"], expected["weights"], atol=2e-3)
  again = step(state.replace(balancer_state=new.balancer_state), batch)[1]  # warm
  np.testing.assert_allclose(again["weights"], expected["weights"], atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("streams", STREAMS)
def test_modo_loses_nothing_on_products(streams):
  """One product between two parts of the batch is all that its rule reads."""
  balancer = balancing.modo(weight_step=0.5)
  state, batch, step = start(streams, balancer, "matrix_free")
  np.testing.assert_allclose(step(state, batch)[1]["weights"],
                             exact_logs(streams, balancer)["weights"], atol=1e-5)


@pytest.mark.parametrize("engine", ["matrix_free", "sketched"])
def test_a_run_resumes_bit_for_bit(engine):
  state, batch, step = start(balancer=balancing.cagrad(), gradients=engine)
  middle, _ = step(state, batch)
  saved = flax.serialization.to_bytes(jax.device_get(middle))
  straight, logs = step(middle, batch)
  resumed, again = step(flax.serialization.from_bytes(state, saved), batch)
  jax.tree.map(np.testing.assert_array_equal, (straight, logs["weights"]),
               (resumed, again["weights"]))


def test_a_sketch_is_unbiased_and_as_wide_as_it_says():
  """The mean of n sketches deviates by a standard error of √((G_ii G_jj + G_ij²) / n) at most."""
  state, batch, step = start(balancer=balancing.pcgrad(),
                             gradients=engines.sketched(directions=4, decay=0.0))
  exact = np.asarray(exact_logs()["gramian"])
  found = np.stack([step(state.replace(step=jnp.asarray(i)), batch)[1]["gramian"]
                    for i in range(100)])
  deviation = np.sqrt((np.outer(np.diag(exact), np.diag(exact)) + exact ** 2) / 4)
  assert (np.abs(found.mean(axis=0) - exact) < 4 * deviation / 10).all()
  assert (found.std(axis=0) < 1.3 * deviation).all()  # 1.3: four deviations of a deviation of 100
  assert (found.std(axis=0) > 0.3 * deviation).all()
  np.testing.assert_array_equal(found[0], step(state, batch)[1]["gramian"])


@pytest.mark.slow
def test_the_average_over_steps_comes_near_the_exact_gramian():
  """Of 300 steps with the same parameters; its weights, too."""
  balancer = balancing.mgda()
  state, batch, step = start(balancer=balancer, opt=optax.sgd(0.0),
                             gradients=engines.sketched(directions=2, decay=0.99),
                             diagnose_every=300)
  expected = exact_logs()
  state, logs = jax.jit(lambda s: jax.lax.scan(lambda s, _: step(s, batch), s, None, 300))(state)
  # n = 2 · 1.99 / 0.01 directions; four deviations, and the Frobenius norm sums their squares.
  exact = np.asarray(expected["gramian"])
  bound = 4 * np.sqrt((np.trace(exact) ** 2 + (exact ** 2).sum()) / 398 / (exact ** 2).sum())
  errors = np.asarray(logs["gramian_error"])
  assert np.isnan(errors[:-1]).all() and errors[-1] < bound < 0.5
  assert float(logs["weights_error"][-1]) < 0.2
  np.testing.assert_allclose(logs["gramian"][-1], exact, rtol=1e-4, atol=1e-6)  # diagnosed
  average = np.asarray(state.balancer_state.total) / np.asarray(state.balancer_state.seen)
  np.testing.assert_allclose(np.linalg.norm(average - exact) / np.linalg.norm(exact),
                             errors[-1], rtol=1e-3)


def test_signs_are_even_and_independent():
  tree = signs(jax.random.key(1), {"w": jnp.zeros((40, 100)), "b": jnp.zeros(4000, jnp.bfloat16)})
  assert tree["b"].dtype == jnp.bfloat16 and (jnp.abs(tree["w"]) == 1).all()
  w, b = np.ravel(tree["w"]), np.asarray(tree["b"], np.float32)
  for shift in range(1, 40):
    assert abs(w[shift:] @ w[:-shift]) < 4 * np.sqrt(4000)
  assert abs(w.sum()) < 4 * np.sqrt(4000) and abs(w @ b) < 4 * np.sqrt(4000)


@pytest.mark.parametrize("engine", ["matrix_free", "sketched"])
def test_a_task_without_labels_leaves_the_balance(engine):
  state, batch, step = start(balancer=balancing.cagrad(), gradients=engine)
  state, _ = step(state, batch)
  before = state.balancer_state
  batch["s"]["y0"] = jnp.full_like(batch["s"]["y0"], -1)  # of the last task
  new, logs = step(state, batch)
  assert logs["active"].tolist() == [True, True, False] and float(logs["weights"][2]) == 0
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((new, logs["weights"])))
  after = new.balancer_state
  kept = lambda state: (state.total[2, 2], state.seen[2]) if isinstance(
      state, Sketched) else state.point[2]
  assert kept(after) == kept(before)
  if engine == "sketched":
    assert (np.linalg.eigvalsh(after.total) > -1e-7).all()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["matrix_free", "sketched"])
def test_in_between_amortised_steps_nothing_is_looked_at(engine):
  balancer = balancing.get("mgda", every=2)
  state, batch, step = start(balancer=balancer, gradients=engine)
  first, logs = step(state, batch)
  second, later = step(first, batch)
  np.testing.assert_array_equal(later["weights"], logs["weights"])
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(second))
  parts = lambda s: (s.total, s.seen) if engine == "sketched" else s.inner
  jax.tree.map(np.testing.assert_array_equal, parts(first.balancer_state),
               parts(second.balancer_state))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["matrix_free", "sketched"])
def test_nothing_shared_is_balanced_equally(engine):
  state, batch, step = start(("s", "r"), balancing.mgda(), engine, sharing="independent")
  new, logs = step(state, batch)
  np.testing.assert_allclose(logs["weights"], 0.5)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(new))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["matrix_free", "sketched"])
def test_diagnosed_steps_tell_the_error(engine):
  balancer = balancing.cagrad()
  state, batch, step = start(balancer=balancer, gradients=engine, diagnose_every=1)
  _, logs = step(state, batch)
  expected = exact_logs(balancer=balancer)
  np.testing.assert_allclose(logs["gramian"], expected["gramian"], rtol=1e-4, atol=1e-6)
  error = np.abs(np.asarray(logs["weights"]) - np.asarray(expected["weights"])).max()
  np.testing.assert_allclose(logs["weights_error"], error, atol=1e-5)
  assert ("gramian_error" in logs) == (engine == "sketched")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["matrix_free", "sketched"])
def test_eight_devices_are_one(engine):
  fresh, batch, step = start(("s", "r"), balancing.cagrad(), engine)
  results = []
  for devices in (1, 8):
    mesh = sharding.data_mesh(jax.devices()[:devices])
    run = sharding.sharded_step(step, mesh)
    state = jax.device_put(jax.tree.map(jnp.copy, fresh), sharding.replicated(mesh))
    on_mesh = jax.device_put(batch, sharding.split(mesh))
    for _ in range(2):
      state, logs = run(state, on_mesh)
      jax.block_until_ready(state)
    results.append(jax.device_get((logs["weights"], state.params, state.balancer_state)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *results)


@pytest.mark.parametrize("engine, balancer, message", [
    ("matrix_free", balancing.pcgrad(), "pcgrad does not work from products with the Gramian; use "
     "'exact', 'features' or 'sketched'"),
    ("matrix_free", balancing.mgda("l2"), "mgda does not work from products"),
    ("sketched", balancing.moco(), "moco needs more than the Gramian; use 'exact'"),
    ("sketched", balancing.modo(), "modo needs more than the Gramian; use 'exact', 'features' or "
     "'matrix_free'"),
    ("matrx_free", balancing.mgda(), "expected one of .*; nearest: matrix_free"),
])
def test_what_an_engine_cannot_serve_is_named(engine, balancer, message):
  with pytest.raises(ValueError, match=message):
    check_engine(engine, balancer, one_stream=True, one_representation=True)


@pytest.mark.parametrize("factory, arguments, message", [
    (engines.matrix_free, {"products": 1}, "products: expected 2 or more a step, found 1"),
    (engines.sketched, {"directions": 0}, "directions: expected 1 or more a step, found 0"),
    (engines.sketched, {"decay": 1.0}, r"decay: expected a number in \[0, 1\), found 1.0"),
])
def test_arguments_out_of_range(factory, arguments, message):
  with pytest.raises(ValueError, match=message):
    factory(**arguments)


def test_a_state_for_another_engine_is_refused():
  state, batch, _ = start(balancer=balancing.mgda())
  _, _, step = start(balancer=balancing.mgda(), gradients="sketched")
  with pytest.raises(ValueError, match="what sketched keeps from step to step, found one without"):
    step(state, batch)


@jax.custom_vjp
def _doubled(x):
  return 2 * x


_doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


class Backwards(Trunk):
  """A trunk that can be differentiated backwards only."""

  @nn.compact
  def __call__(self, images):
    return _doubled(nn.Dense(4)(images.reshape(images.shape[0], -1)))


def test_a_trunk_without_a_forward_derivative_is_refused():
  state, batch, step = start(balancer=balancing.mgda(), gradients="matrix_free", trunk=Backwards())
  with pytest.raises(TypeError, match="forward-mode autodiff .* to a custom_vjp function"):
    step(state, batch)


@pytest.mark.slow
def test_exact_gradients_keep_one_tasks_maps_in_memory():
  """More tasks add rows, and no maps of a batch: each task's are as large as those of equal."""
  def megabytes(num_tasks, balancer):
    state, batch, step, *_ = make(("s",) * num_tasks, balancer,
                                  trunk=models.CNN(channels=(16,), width=2, pool="mean"))
    batch["s"]["image"] = jnp.zeros((64, 32, 32, 3))
    batch["s"] = {name: jnp.resize(x, (64, *x.shape[1:])) for name, x in batch["s"].items()}
    return temporaries(jax.jit(step), state, batch) / 2 ** 20

  maps = 64 * 16 * 16 * 16 * 4 / 2 ** 20  # pooled, as they are kept
  equal = megabytes(2, balancing.equal())
  assert equal > maps
  assert megabytes(6, balancing.mgda()) < equal + 1.5 * maps


class PlainConvolution(nn.Module):

  @nn.compact
  def __call__(self, images):
    return nn.Conv(2, (2, 2))(images).mean(axis=(1, 2))


@pytest.mark.parametrize("trunk, loops", [
    pytest.param(Trunk(), True, marks=pytest.mark.slow), (PlainConvolution(), False)])
def test_exact_gradients_come_from_a_loop_where_loops_are_fast(trunk, loops):
  """On CPUs XLA's own convolutions are not, and a trunk that is not ours may have them."""
  state, batch, step, *_ = make(balancer=balancing.mgda(), trunk=trunk)
  program = jax.make_jaxpr(step)(state, batch).jaxpr
  bodies = [str(eqn.params["jaxpr"]) for eqn in program.eqns
            if eqn.primitive.name == "scan" and eqn.params["length"] == 3]
  assert any(word in body for body in bodies for word in ("dot_general", "conv_general")) == loops
