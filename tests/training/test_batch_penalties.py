"""Penalties that depend on the batch: the entropies of gates that read the examples."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax
from mtl_jax import balancing, models, tasks
from mtl_jax.models.sharing import dselect_k, gates
from mtl_jax.training import passes, penalties

STREAMS = {"a": "x", "b": "x", "c": "y"}
SOME_TASKS = tuple(tasks.classification(task, num_classes=2, stream=stream, label=task)
                   for task, stream in STREAMS.items())
FIELDS = {"mmoe": {"experts": 3}, "cgc": {"shared_experts": 1}, "ple": {"shared_experts": 1},
          "dselect_k": {"experts": 4, "gate_input": "stem"}}
STRENGTH = 0.7


def make_batch(size=6):
  rng = np.random.default_rng(0)
  batch = {"x": {"image": jnp.asarray(rng.normal(size=(size, 5)), jnp.float32)},
           "y": {"image": jnp.asarray(rng.normal(size=(size - 2, 5)), jnp.float32)}}
  for task, stream in STREAMS.items():
    count = len(batch[stream]["image"])
    batch[stream][task] = jnp.asarray(rng.integers(0, 2, count), jnp.int32)
  return batch


def model_of(name, trunk=None, **fields):
  return models.MultiTaskModel(
      models.SHARINGS[name](trunk or models.MLPTrunk(widths=(4, 3)), tuple(STREAMS),
                            **FIELDS[name], **fields),
      heads={task: models.Linear(2) for task in STREAMS}, streams=STREAMS)


def make(name, balancer=None, **fields):
  """A state with gates that lean to some side, and the step, whose update is minus the gradient."""
  statics = dict(model=model_of(name, **fields), tasks=SOME_TASKS,
                 balancer=balancer or balancing.equal(), optimizer=optax.sgd(1.0))
  batch = make_batch()
  shapes = jax.eval_shape(lambda: mtl_jax.create_train_state(0, batch, **statics))
  rng = np.random.default_rng(1)
  state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes).replace(
      params=jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype),
                          shapes.params),
      model_state=jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes.model_state),
      task_weights=jnp.ones(3))
  if balancer:
    state = state.replace(balancer_state=balancer.init(3))
  return state, batch, functools.partial(mtl_jax.train_step, **statics)


def mean_entropy(logits):
  """Of softmax gates [B, E], as log Σ e^x − Σ p x."""
  shares = jax.nn.softmax(logits)
  return (jax.nn.logsumexp(logits, axis=1) - (shares * logits).sum(axis=1)).mean()


def dense(params, x):
  return x @ params["kernel"] + params["bias"][None]


def of_cgc(params, batch):
  """One gate a task, on what a dense layer makes of the inputs; `mmoe` has the same."""
  read = lambda x: nn.relu(dense(params["gate_features"]["stem"], x))
  return sum(mean_entropy(dense(params[f"gates_{task}"], read(batch[stream]["image"])))
             for task, stream in STREAMS.items())


def of_ple(params, batch):
  """Two levels of one stage each: all gates of the first see both streams."""
  x = jnp.concatenate([batch["x"]["image"], batch["y"]["image"]])
  read = nn.relu(dense(params["gate_features"]["stem"], x))
  expert = lambda name: nn.relu(dense(params[name]["dense1"], x))
  total, size = mean_entropy(dense(params["shared_gates_0"], read)), len(batch["x"]["image"])
  for task, stream in STREAMS.items():
    logits = dense(params[f"gates_{task}_0"], read)
    shares = jax.nn.softmax(logits)
    entering = (shares[:, :1] * expert(f"own_trunks_{task}_0_0")
                + shares[:, 1:] * expert("trunks_0_0"))
    entering = entering[:size] if stream == "x" else entering[size:]
    total += mean_entropy(logits) + mean_entropy(dense(params[f"gates_{task}_1"], entering))
  return total


def of_dselect_k(params, batch):
  """The entropy of the weights in which two selectors are mixed."""
  total = 0.0
  for task, stream in STREAMS.items():
    read = nn.relu(dense(params["gate_features"]["stem"], batch[stream]["image"]))
    gate = params[f"gates_{task}"]
    picked = dselect_k.selections(dense(gate["codes"], read).reshape(-1, 2, 2), 4, 1.0)
    weights = (jax.nn.softmax(dense(gate["logits"], read))[..., None] * picked).sum(axis=1)
    positive = weights > 0
    logs = jnp.log(jnp.where(positive, weights, 1.0))
    total -= jnp.where(positive, weights * logs, 0.0).sum(axis=1).mean()
  return total


def penalties_of(step, state, batch):
  """What a pass sows, as the step sees it."""
  of = passes.PassOf(step.keywords["model"], SOME_TASKS, state.task_weights, {})
  return jax.jit(of.penalties)(state.params, {}, batch)


BY_HAND = {"mmoe": of_cgc, "cgc": of_cgc, "ple": of_ple, "dselect_k": of_dselect_k}


def assert_close(a, b, tolerance=2e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=tolerance), a, b)


@pytest.mark.parametrize("name", [
    name if name == "cgc" else pytest.param(name, marks=pytest.mark.slow)
    for name in FIELDS])
def test_the_step_descends_the_losses_and_the_entropy_of_all_gates(name):
  """Against `jax.grad` of the sum written out; it reaches gates and, through them, what is shared."""
  state, batch, step = make(name, gate_entropy=STRENGTH)
  model = step.keywords["model"]

  def total(params):
    losses, _ = tasks.task_losses(SOME_TASKS, model.apply({"params": params}, batch), batch)
    return losses.sum() + STRENGTH * BY_HAND[name](params["sharing"], batch)

  @jax.jit
  def run(state):
    new, logs = step(state, batch)
    taken = jax.tree.map(jnp.subtract, state.params, new.params)
    entropy = lambda params: STRENGTH * BY_HAND[name](params["sharing"], batch)
    return taken, logs["penalties"], jax.grad(total)(state.params), *jax.value_and_grad(entropy)(
        state.params)

  taken, values, expected, value, alone = run(state)
  assert set(values) == {"gate_entropy"} and float(value) > 0.1
  np.testing.assert_allclose(values["gate_entropy"], value, rtol=1e-5)
  assert_close(taken, expected)
  reached = {path for path, x in alone["sharing"].items()
             if any(np.any(leaf) for leaf in jax.tree.leaves(x))}
  assert "gate_features" in reached and reached > {path for path in alone["sharing"]
                                                   if path.startswith("gates_")}
  assert ("trunks_0_0" in reached) == (name == "ple")  # whose later gates read experts


@pytest.mark.parametrize("name, extra", [
    ("imtl_g", {"diagnose_every": 1, "gradients": "features"}),
    *((name, {}) for name in ("modo", "auto_lambda", "famo"))])
@pytest.mark.slow
def test_it_is_added_after_balancing_whatever_the_balancer(name, extra):
  """Weights, Gramian and what the balancer keeps do not see it; parts and look-aheads work."""
  results = []
  for strength in (0.0, STRENGTH):
    state, batch, step = make("mmoe", balancing.get(name), gate_entropy=strength)
    new, logs = jax.jit(functools.partial(step, **extra))(state, batch)
    results.append((new, logs))
  (plain, plain_logs), (new, logs) = results
  extra_taken = jax.tree.map(jnp.subtract, plain.params, new.params)
  alone = jax.jit(jax.grad(lambda params: STRENGTH * of_cgc(params["sharing"], batch)))(
      state.params)  # of the whole batch, also where the balancer cuts it in parts
  assert_close(extra_taken, alone)
  for key in ("losses", "weights", "gramian"):
    if key in logs:
      assert_close(logs[key], plain_logs[key])
  if name != "famo":  # it looks at the losses after the step
    assert_close(new.balancer_state, plain.balancer_state)


@pytest.mark.parametrize("fields, shares, expected", [
    ({}, (0.5, 0.25, 0.25), 1.5 * np.log(2)), ({}, (1 / 3, 1 / 3, 1 / 3), np.log(3)),
    ({"gate_entropy": -2.0}, (0.5, 0.25, 0.25), 1.5 * np.log(2))])
def test_known_gates_have_known_entropies(fields, shares, expected):
  """The same for all examples of three tasks: the mean over examples, the sum over tasks."""
  fields = {"gate_entropy": STRENGTH, **fields}
  state, batch, step = make("mmoe", **fields)
  for task in STREAMS:
    gate = state.params["sharing"][f"gates_{task}"]
    gate |= {"kernel": jnp.zeros_like(gate["kernel"]),
             "bias": jnp.log(jnp.asarray(shares, jnp.float32))}
  np.testing.assert_allclose(penalties_of(step, state, batch)["gate_entropy"],
                             3 * fields["gate_entropy"] * expected, rtol=1e-5)


@pytest.mark.slow
def test_selectors_that_read_the_examples_have_the_papers_entropy():
  """The mean over examples, summed over two selectors and tasks, beside that of the weights."""
  state, batch, step = make("dselect_k", entropy=0.3, gate_entropy=STRENGTH)
  params = state.params["sharing"]
  found, expected = penalties_of(step, state, batch), 0.0
  for task, stream in STREAMS.items():
    read = nn.relu(dense(params["gate_features"]["stem"], batch[stream]["image"]))
    codes = dense(params[f"gates_{task}"]["codes"], read).reshape(-1, 2, 2)
    picked = np.asarray(dselect_k.selections(codes, 4, 1.0), np.float64)
    logs = np.log(np.where(picked > 0, picked, 1))
    expected -= 0.3 * (picked * logs).sum(axis=(1, 2)).mean()
  np.testing.assert_allclose(found["selector_entropy"], expected, rtol=1e-4)
  assert set(found) == {"selector_entropy", "gate_entropy"}


@pytest.mark.parametrize("name", [
    name if name in ("cgc", "dselect_k") else pytest.param(name, marks=pytest.mark.slow)
    for name in FIELDS])
def test_without_strength_the_program_is_as_if_there_were_no_such_penalty(name, monkeypatch):
  state, batch, step = make(name)
  program = str(jax.make_jaxpr(step)(state, batch))
  _, logs = jax.eval_shape(step, state, batch)
  assert logs["penalties"] == {}
  monkeypatch.setattr(gates, "sow_entropy", lambda *_: None)
  assert str(jax.make_jaxpr(step)(state, batch)) == program


@pytest.mark.parametrize("name", FIELDS)
def test_nothing_of_it_is_kept_or_sown_at_evaluation(name):
  fields = {"entropy": 0.3} if name == "dselect_k" else {}
  model = model_of(name, models.ResNet(blocks=(), channels=3), gate_entropy=STRENGTH, **fields)
  images = {stream: {"image": jnp.zeros((2, 4, 4, 3))} for stream in "xy"}
  for train in (False, True):
    variables = jax.eval_shape(functools.partial(model.init, train=train), jax.random.key(0), images)
    assert set(variables) == {"params", "batch_stats"}
  _, found = jax.eval_shape(lambda v: model.apply(v, images, mutable=True), variables)
  assert set(found) == {"params", "batch_stats"}


def test_batch_statistics_move_and_stand_alone():
  model = model_of("mmoe", models.ResNet(blocks=(), channels=3), gate_entropy=STRENGTH)
  batch = {stream: {**columns, "image": jnp.ones((len(columns["image"]), 4, 4, 3))}
           for stream, columns in make_batch().items()}
  statics = dict(model=model, tasks=SOME_TASKS, balancer=balancing.equal(),
                 optimizer=optax.sgd(1.0))
  state = jax.eval_shape(lambda: mtl_jax.create_train_state(0, batch, **statics))
  new, logs = jax.eval_shape(functools.partial(mtl_jax.train_step, **statics), state, batch)
  assert jax.tree.structure(new) == jax.tree.structure(state)
  assert set(logs["penalties"]) == {"gate_entropy"}


def test_a_penalty_of_the_same_name_is_refused():
  state, batch, step = make("mmoe", gate_entropy=STRENGTH)
  with pytest.raises(ValueError, match=r"does not use itself, found \['gate_entropy'\]"):
    jax.eval_shape(functools.partial(step, penalties={"gate_entropy": penalties.l2(1.0)}), state,
                   batch)
