"""Mixtures of experts against the identities that hold between them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models
from mtl_jax.models.sharing import dselect_k, gates

CNN = models.CNN(channels=(2,), width=3)
ONE, TWO = {"a": "x", "b": "x"}, {"a": "x", "b": "y"}


def images_of(streams, side=4):
  rng = np.random.default_rng(0)
  return {stream: jnp.asarray(rng.normal(size=(2 + i, side, side, 3)), jnp.float32)
          for i, stream in enumerate(sorted(set(streams.values())))}


def filled(module, streams, images=None):
  """Variables without compiling `init`; statistics are positive."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(lambda: module.init(
      jax.random.key(0), images or images_of(streams), streams, False))
  variables = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
  return {name: tree if name == "params" else jax.tree.map(jnp.abs, tree)
          for name, tree in variables.items()}


def run(module, variables, streams, images=None, train=False, maps=False):
  """Features or maps by task, and the other variables afterwards."""
  mutable = [name for name in variables if name != "params"]
  found, state = jax.jit(lambda variables, images: module.apply(
      variables, images, streams, train, maps, mutable=mutable))(
          variables, images or images_of(streams))
  return found, state


def assert_close(a, b, rtol=1e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


@pytest.mark.parametrize("streams", [ONE, TWO], ids=["one", "two"])
def test_one_expert_is_hard_sharing(streams):
  """Its weight is one, whatever the gate reads; BatchNorm sees all streams in both."""
  trunk = models.ResNet(blocks=(), channels=3)
  mmoe, hard = models.MMoE(trunk, ("a", "b"), experts=1), models.Hard(trunk)
  variables = filled(mmoe, streams)
  as_hard = {name: {"trunk": tree["trunks_0"]} for name, tree in variables.items()}
  found, state = run(mmoe, variables, streams, train=True)
  expected, expected_state = run(hard, as_hard, streams, train=True)
  assert_close(found, expected)
  assert_close(state["batch_stats"]["trunks_0"], expected_state["batch_stats"]["trunk"])


def test_a_gate_mixes_its_own_tasks_experts():
  """Against the formula with numpy: on the pixels themselves, where the images are 4x4."""
  mmoe = models.MMoE(CNN, ("a", "b"), experts=2, gate_input="pixels")
  variables, images = filled(mmoe, TWO), images_of(TWO)
  found, _ = run(mmoe, variables, TWO)
  for task, stream in TWO.items():
    x = np.asarray(images[stream], np.float64)
    gate = variables["params"][f"gates_{task}"]
    shares = np.exp(x.reshape(len(x), -1) @ np.asarray(gate["kernel"]) + np.asarray(gate["bias"]))
    shares /= shares.sum(1, keepdims=True)
    experts = [CNN.apply({"params": variables["params"][f"trunks_{e}"]}, images[stream])
               for e in range(2)]
    expected = sum(shares[:, e:e + 1] * np.asarray(expert) for e, expert in enumerate(experts))
    np.testing.assert_allclose(found[task], expected, rtol=1e-4, atol=1e-5)


def test_maps_are_mixed_in_the_shares_of_the_features():
  mmoe = models.MMoE(CNN, ("a", "b"), experts=2)
  variables = filled(mmoe, TWO)
  maps, _ = run(mmoe, variables, TWO, maps=True)
  features, _ = run(mmoe, variables, TWO)
  assert list(maps["a"]) == ["conv1", "features"]
  assert_close({task: stages["features"] for task, stages in maps.items()}, features)
  weights = jnp.array([[0.25, 0.75]])
  mixed = gates.mix(weights, [{"map": jnp.full((1, 2, 2, 1), x)} for x in (4.0, 8.0)])
  np.testing.assert_array_equal(mixed["map"], np.full((1, 2, 2, 1), 7.0))


@pytest.mark.parametrize("streams", [ONE, TWO], ids=["one", "two"])
def test_cgc_without_own_experts_is_mmoe(streams):
  cgc = models.CGC(CNN, ("a", "b"), shared_experts=3, own_experts=0)
  mmoe = models.MMoE(CNN, ("a", "b"), experts=3)
  variables = filled(mmoe, streams)
  assert jax.tree.map(jnp.shape, filled(cgc, streams)) == jax.tree.map(jnp.shape, variables)
  assert_close(run(cgc, variables, streams)[0], run(mmoe, variables, streams)[0])


def test_own_experts_see_their_own_stream_alone():
  """Images of two sizes, which a trunk with a dense layer for each cannot share."""
  cgc = models.CGC(CNN, ("a", "b"), shared_experts=1)
  images = {"x": jnp.zeros((2, 4, 4, 3)), "y": jnp.zeros((2, 8, 8, 3))}
  with pytest.raises(Exception, match="trunks_0/dense"):
    filled(cgc, TWO, images)
  mean = models.CNN(channels=(2,), width=3, pool="mean")
  features = jax.eval_shape(lambda: models.CGC(mean, ("a", "b")).init_with_output(
      jax.random.key(0), images, TWO, False)[0])
  assert {task: x.shape for task, x in features.items()} == {"a": (2, 3), "b": (2, 3)}


@pytest.mark.parametrize("streams", [ONE, TWO], ids=["one", "two"])
def test_ple_of_one_level_is_cgc(streams):
  trunk = models.ResNet(blocks=(), channels=3)
  cgc = models.CGC(trunk, ("a", "b"), shared_experts=1)
  ple = models.PLE(trunk, ("a", "b"), levels=1, shared_experts=1)
  variables = filled(cgc, streams)
  names = {"trunks_0": "trunks_0_0", "own_trunks_a_0": "own_trunks_a_0_0",
           "own_trunks_b_0": "own_trunks_b_0_0", "gates_a": "gates_a_0", "gates_b": "gates_b_0",
           "gate_features": "gate_features"}
  as_ple = {collection: {names[name]: x for name, x in tree.items()}
            for collection, tree in variables.items()}
  assert jax.tree.map(jnp.shape, filled(ple, streams)) == jax.tree.map(jnp.shape, as_ple)
  found, state = run(ple, as_ple, streams, train=True, maps=True)
  expected, expected_state = run(cgc, variables, streams, train=True, maps=True)
  assert_close(found, expected)
  assert_close(state["batch_stats"], {names[name]: x
                                      for name, x in expected_state["batch_stats"].items()})


def test_the_shared_gate_reaches_every_expert_and_feeds_the_shared_ones():
  """Two levels of dense layers against the formulas with numpy."""
  trunk = models.MLPTrunk(widths=(3, 2))
  ple = models.PLE(trunk, ("a", "b"), shared_experts=1, gate_input="pixels")
  x = np.random.default_rng(2).normal(size=(4, 5)).astype(np.float32)
  variables = filled(ple, ONE, {"x": jnp.asarray(x)})
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])

  def expert(name, layer, x):
    dense = params[name][layer]
    return np.maximum(x @ dense["kernel"] + dense["bias"], 0)

  def mixed(gate, read, outputs):
    shares = np.exp(read @ params[gate]["kernel"] + params[gate]["bias"])
    shares /= shares.sum(1, keepdims=True)
    return sum(shares[:, i:i + 1] * output for i, output in enumerate(outputs))

  low = {name: expert(f"{name}_0", "dense1", x)
         for name in ("own_trunks_a_0", "own_trunks_b_0", "trunks_0")}
  a = mixed("gates_a_0", x, [low["own_trunks_a_0"], low["trunks_0"]])
  shared = mixed("shared_gates_0", x, list(low.values()))
  expected = mixed("gates_a_1", a, [expert("own_trunks_a_1_0", "dense2", a),
                                    expert("trunks_1_0", "dense2", shared)])
  found, _ = run(ple, variables, ONE, {"x": jnp.asarray(x)})
  np.testing.assert_allclose(found["a"], expected, rtol=1e-4, atol=1e-5)


def test_levels_are_runs_of_stages():
  stages = models.resnet18().stages
  ple = models.sharing.ple
  assert ple.split(stages, 3) == [("stem", "layer1"), ("layer2", "layer3"), ("layer4", "features")]
  assert ple.split(stages, 6) == [(stage,) for stage in stages]


def test_smooth_step_is_the_papers():
  """0 and 1 beyond γ/2, the cubic between, whose slope at 0 is 3/(2γ), and so depends on γ."""
  t = np.linspace(-1, 1, 41)
  for gamma in (0.5, 1.0, 1.8):
    cubic = -2 * t ** 3 / gamma ** 3 + 3 * t / (2 * gamma) + 0.5
    expected = np.where(t <= -gamma / 2, 0, np.where(t >= gamma / 2, 1, cubic))
    found = jax.vmap(lambda x: dselect_k.smooth_step(x, gamma))(jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    slope = jax.grad(lambda x: dselect_k.smooth_step(x, gamma))(0.0)
    np.testing.assert_allclose(slope, 1.5 / gamma, rtol=1e-6)


@pytest.mark.parametrize("experts", [2, 3, 4, 6])
def test_selectors_share_out_one_and_decided_ones_pick_one_expert(experts):
  bits = int(np.ceil(np.log2(experts)))
  rng = np.random.default_rng(0)
  open_codes = jnp.asarray(rng.uniform(-0.5, 0.5, size=(5, bits)), jnp.float32)
  np.testing.assert_allclose(dselect_k.selections(open_codes, experts, 1.0).sum(-1), 1, rtol=1e-6)
  number = jnp.arange(experts)
  decided = jnp.where((number[:, None] >> jnp.arange(bits)[::-1][None]) % 2 == 1, 0.5, -0.5)
  np.testing.assert_array_equal(dselect_k.selections(decided, experts, 1.0), np.eye(experts))


@pytest.mark.parametrize("reads", [False, True])
def test_a_decided_gate_has_k_experts(reads):
  """Codes 01 and 10, mixed in the shares e² : 1; a wider step leaves them undecided."""
  codes, logits = jnp.array([[-0.6, 0.7], [0.8, -0.9]]), jnp.array([2.0, 0.0])
  params, read = {"codes": codes, "logits": logits}, None
  if reads:  # the same through dense layers whose kernels are zero
    params = {"codes": {"kernel": jnp.zeros((3, 4)), "bias": codes.reshape(-1)},
              "logits": {"kernel": jnp.zeros((3, 2)), "bias": logits}}
    read = jnp.ones((1, 3))
  weights = dselect_k.DSelectGate(4, 2, 1.0).apply({"params": params}, read)[0]
  share = np.exp(2) / (1 + np.exp(2))
  np.testing.assert_allclose(weights, [0, share, 1 - share, 0], rtol=1e-6)
  assert (weights == 0).sum() == 2
  wide = dselect_k.DSelectGate(4, 2, 2.0).apply({"params": params}, read)[0]
  assert (wide > 0).all()
  np.testing.assert_allclose(wide.sum(), 1, rtol=1e-6)


@pytest.mark.parametrize("gate_input", [
    "nothing", "pixels", pytest.param("stem", marks=pytest.mark.slow)])
def test_dselect_k_mixes_by_its_gates(gate_input):
  sharing = models.DSelectK(CNN, ("a", "b"), experts=3, gate_input=gate_input)
  variables, images = filled(sharing, TWO), images_of(TWO)
  found, _ = run(sharing, variables, TWO)
  params = variables["params"]
  for task, stream in TWO.items():
    read = None
    if gate_input != "nothing":
      read = gates.GateInput(gate_input).apply({"params": params.get("gate_features", {})},
                                               images[stream])
    weights = dselect_k.DSelectGate(3, 2, 1.0).apply({"params": params[f"gates_{task}"]}, read)
    experts = [CNN.apply({"params": params[f"trunks_{e}"]}, images[stream]) for e in range(3)]
    expected = sum(np.asarray(weights)[:, e:e + 1] * np.asarray(x) for e, x in enumerate(experts))
    np.testing.assert_allclose(found[task], expected, rtol=1e-4, atol=1e-5)


def test_the_entropy_penalty_decides_gates():
  """Descending on it alone brings every code out of the slope, for every task."""
  sharing = models.DSelectK(CNN, ("a", "b"), entropy=0.5)
  params = jax.tree.map(lambda x: x * 20, sharing.init(  # beyond the flat top in the middle
      jax.random.key(0), images_of(ONE), ONE, False)["params"])
  value = lambda params: sharing.penalties(params)["selector_entropy"]
  start = {task: params[f"gates_{task}"]["codes"] for task in "ab"}
  expected = sum(0.5 * gates.entropy(dselect_k.selections(codes, 4, 1.0))
                 for codes in start.values())
  np.testing.assert_allclose(value(params), expected, rtol=1e-6)
  descend = lambda _, params: jax.tree.map(lambda x, g: x - 0.05 * g, params,
                                           jax.grad(value)(params))
  params = jax.jit(lambda params: jax.lax.fori_loop(0, 200, descend, params))(params)
  np.testing.assert_allclose(value(params), 0, atol=1e-6)
  for task in "ab":
    assert (np.abs(params[f"gates_{task}"]["codes"]) >= 0.5 - 1e-3).all()
  assert models.DSelectK(CNN, ("a",)).penalties(params) == {}


class Plain(nn.Module):
  """A trunk without stages."""


@pytest.mark.parametrize("make, message", [
    (lambda: models.MMoE(CNN, ("a",), experts=0), "mmoe: experts: expected at least 1, found 0"),
    (lambda: models.MMoE(CNN, ("a",), gate_input="x"),
     r"mmoe: gate_input: expected one of \['stem', 'pixels'\], found 'x'"),
    (lambda: models.CGC(CNN, ("a",), own_experts=-1), "own_experts: expected at least 0, found -1"),
    (lambda: models.PLE(CNN, ("a",), levels=3), "levels: expected at most 2, one a stage"),
    (lambda: models.PLE(Plain(), ("a",)), "expected a trunk that names its stages, found Plain"),
    (lambda: models.DSelectK(CNN, ("a",), k=5), "k: expected 1 to 4, the number of experts, found"),
    (lambda: models.DSelectK(CNN, ("a",), gamma=0.0), "gamma: expected a number > 0, found 0.0"),
    (lambda: models.DSelectK(CNN, ("a",), entropy=-0.1), "entropy: expected a number >= 0, found"),
])
def test_what_does_not_fit_is_said(make, message):
  with pytest.raises(ValueError, match=message):
    make()
