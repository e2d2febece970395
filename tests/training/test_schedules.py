"""Schedules of tasks: who takes part, what the others cost, and that nothing else changes."""

import collections
import functools

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import balancing, models
from mtl_jax.training import schedules, sharding
from mtl_jax.training.optimizer import optimizer
from tests.training.test_step import assert_close, make

TASKS = ("a", "b", "c")
STREAMS = {"a": "x", "b": "y", "c": "y"}
SIZES = {"a": 100, "b": 400, "c": 300}
ADAM = optimizer("adam", 0.1)


def drawn(schedule, steps, seed=0, num_steps=100):
  at = jax.jit(jax.vmap(lambda step: schedule.group_at(jnp.uint32(seed), step, num_steps)))
  return np.asarray(at(jnp.arange(steps)))


def without(batch, some_tasks, names):
  """The batch with every label of some tasks missing."""
  gone = {(task.stream, task.label) for task in some_tasks if task.name in names}
  return {stream: {key: jnp.full_like(x, -1) if (stream, key) in gone else x
                   for key, x in columns.items()} for stream, columns in batch.items()}


def test_tasks_of_a_stream_take_turns_together():
  schedule = schedules.alternating(TASKS, STREAMS, SIZES)
  assert schedule.groups == (("a",), ("b", "c")) and schedule.shares == {"x": 0.5, "y": 0.5}
  assert drawn(schedule, 5).tolist() == [0, 1, 0, 1, 0]
  by_task = schedules.alternating(TASKS, STREAMS, SIZES, by="task", steps=2)
  assert drawn(by_task, 7).tolist() == [0, 0, 1, 1, 2, 2, 0]
  assert by_task.shares == pytest.approx({"x": 1 / 3, "y": 2 / 3})


@pytest.mark.parametrize("temperature,expected", [(1.0, [0.2, 0.8]), (2.0, [1 / 3, 2 / 3])])
def test_sampling_follows_sizes_and_temperature(temperature, expected):
  """Sizes 100 and 400: 1 to 4, and at temperature 2 the roots, 1 to 2."""
  schedule = schedules.sampled(TASKS, STREAMS, SIZES, temperature=temperature)
  assert [schedule.shares["x"], schedule.shares["y"]] == pytest.approx(expected, abs=1e-6)
  groups = drawn(schedule, 4000)
  assert np.bincount(groups) / 4000 == pytest.approx(expected, abs=0.03)  # 4 deviations
  assert (groups == drawn(schedule, 4000)).all() and (groups != drawn(schedule, 4000, seed=1)).any()


def test_a_curriculum_starts_tasks_and_follows_optax():
  schedule = schedules.curriculum(
      TASKS, STREAMS, SIZES, start={"b": 0.5}, weights={"c": {
          "name": "linear_schedule", "init_value": 0.0, "end_value": 2.0, "transition_steps": 4}})
  assert schedule.groups == (("a", "c"), ("a", "b", "c"))
  assert drawn(schedule, 10, num_steps=10).tolist() == [0] * 5 + [1] * 5
  factors = [schedule.factors_at(jnp.int32(step), 10, ()).tolist() for step in (0, 2, 6)]
  assert factors == [[1, 1, 0], [1, 1, 1], [1, 1, 2]]
  drops = schedules.curriculum(TASKS, STREAMS, SIZES, weights={"a": {
      "name": "piecewise_constant_schedule", "init_value": 1.0,
      "boundaries_and_scales": {"3": 0.5}}})
  assert float(drops.factors_at(jnp.int32(4), 10, ())[0]) == 0.5


def test_easy_tasks_weigh_more_until_it_fades():
  schedule = schedules.curriculum(("a", "b"), STREAMS, SIZES, easy_first=0.5, sharpness=2.0)
  progress = schedules.Progress(jnp.array([2.0, 4.0]), jnp.array([1.0, 4.0]))
  at = lambda step, progress: schedule.factors_at(jnp.int32(step), 8, progress)
  e = np.exp([-1.0, -2.0])  # sharpness times what is left: 1/2 and 1
  np.testing.assert_allclose(at(0, progress), 2 * e / e.sum(), rtol=1e-5)
  half = np.exp([-0.5, -1.0])
  np.testing.assert_allclose(at(2, progress), 2 * half / half.sum(), rtol=1e-5)
  assert at(4, progress).tolist() == [1, 1] == at(0, schedule.init(2)).tolist()


def test_progress_is_that_of_unweighted_losses_and_waits_for_absent_tasks():
  logs = {"losses": jnp.array([3.0, 0.0]), "task_weights": jnp.array([0.5, 1.0]),
          "active": jnp.array([True, False])}
  schedule = schedules.curriculum(("a", "b"), STREAMS, SIZES, easy_first=0.5)
  one = schedules._watched(schedule.init(2), logs)
  assert one.first.tolist()[0] == one.smoothed.tolist()[0] == 6 and np.isnan(one.first[1])
  two = schedules._watched(one, {**logs, "losses": jnp.array([1.0, 0.0])})
  assert float(two.first[0]) == 6 and float(two.smoothed[0]) == pytest.approx(0.95 * 6 + 0.05 * 2)


@pytest.mark.parametrize("make_schedule,message", [
    (lambda: schedules.alternating(("b", "c"), STREAMS, SIZES), "by: expected several streams"),
    (lambda: schedules.alternating(("b",), STREAMS, SIZES, by="task"), "several tasks"),
    (lambda: schedules.alternating(TASKS, STREAMS, SIZES, by="batch"), "by: expected 'stream'"),
    (lambda: schedules.alternating(TASKS, STREAMS, SIZES, steps=0), "steps: expected at least 1"),
    (lambda: schedules.sampled(TASKS, STREAMS, SIZES, temperature=0), "temperature: expected"),
    (lambda: schedules.curriculum(TASKS, STREAMS, SIZES, start={"d": 0.5}), "start.d: expected"),
    (lambda: schedules.curriculum(TASKS, STREAMS, SIZES, start={"a": 1.0}), "start.a: expected"),
    (lambda: schedules.curriculum(("a",), STREAMS, SIZES, start={"a": 0.5}), "begins at once"),
    (lambda: schedules.curriculum(TASKS, STREAMS, SIZES, easy_first=2), "easy_first: expected"),
    (lambda: schedules.curriculum(TASKS, STREAMS, SIZES, weights={"a": {"name": "linear"}}),
     "weights.a.name: expected one of constant_schedule"),
    (lambda: schedules.curriculum(TASKS, STREAMS, SIZES, weights={"a": {
        "name": "constant_schedule", "valeu": 1}}), "weights.a: expected arguments of optax's"),
])
def test_mistakes_are_named(make_schedule, message):
  with pytest.raises(ValueError, match=message):
    make_schedule()


@pytest.mark.parametrize("balancer,engine,streams", [
    (balancing.mgda(), "exact", ("s", "r", "r")),
    (balancing.cagrad(), "features", ("s", "s", "s")),
    pytest.param(balancing.equal(), "exact", ("s", "s", "s"), marks=pytest.mark.slow),
    pytest.param(balancing.pcgrad(), "features", ("s", "r", "r"), marks=pytest.mark.slow),
    pytest.param(balancing.graddrop(), "exact", ("s", "s", "s"), marks=pytest.mark.slow),
    pytest.param(balancing.nash_mtl(), "exact", ("s", "s", "s"), marks=pytest.mark.slow),
    pytest.param(balancing.graddrop(), "features", ("s", "s", "s"), marks=pytest.mark.slow),
    pytest.param(balancing.famo(), "exact", ("s", "r", "r"), marks=pytest.mark.slow),
    pytest.param(balancing.sdmgrad(), "exact", ("s", "s", "s"), marks=pytest.mark.slow),
    pytest.param(balancing.auto_lambda(), "exact", ("s", "r", "r"), marks=pytest.mark.slow),
])
def test_left_out_equals_unlabelled(balancer, engine, streams):
  """A task that takes no part moves the others as one without any label in the batch."""
  state, batch, step, model, some_tasks = make(streams, balancer, gradients=engine)
  plain, expected = jax.jit(step)(state, without(batch, some_tasks, ["t1"]))
  only = tuple(task.name for task in some_tasks if task.name != "t1")
  new, logs = jax.jit(functools.partial(step, only=only))(state, batch)
  assert_close(new.params, plain.params)
  assert logs["active"].tolist() == expected["active"].tolist()
  np.testing.assert_allclose(logs["weights"], expected["weights"], atol=1e-5)
  assert (jax.tree.map(lambda x: (x.shape, x.dtype), logs)
          == jax.tree.map(lambda x: (x.shape, x.dtype), expected))
  jax.tree.map(np.testing.assert_array_equal, logs["metrics"], expected["metrics"])
  assert list(logs["metrics"]) == list(expected["metrics"])


def test_what_an_absent_task_owns_stands_still():
  state, batch, step, model, some_tasks = make(opt=ADAM)
  moving, _ = jax.jit(step)(state, batch)  # Adam has momentum now
  new, _ = jax.jit(functools.partial(step, only=("t0",)))(moving, batch)
  for path, before in flatten_dict(moving.params).items():
    stands = model.owner(path) not in (None, "t0")
    assert np.array_equal(before, flatten_dict(new.params)[path]) == stands, path
    mu = lambda state, path=path: flatten_dict(state.opt_state[0][0].mu)[path]
    assert np.array_equal(mu(moving), mu(new)) == stands, path


def test_absent_heads_and_streams_cost_nothing():
  """Operations of a step of one of two streams are those of a model that has no other."""
  state, batch, step, *_ = make(("s", "r"))
  flops = lambda step, state, batch: jax.jit(step).lower(state, batch).cost_analysis()["flops"]
  alone_state, alone_batch, alone, *_ = make(("s",))
  both = flops(step, state, batch)
  one = flops(functools.partial(step, only=("t0",)), state, batch)
  expected = flops(alone, alone_state, alone_batch)
  updates = 40 * sum(x.size for x in jax.tree.leaves(state.params))  # of the absent head, at most
  assert expected <= one <= expected + updates < both


def test_a_factor_of_zero_leaves_a_task_out():
  state, batch, step, model, some_tasks = make(balancer=balancing.mgda())
  places = {task.name: i for i, task in enumerate(some_tasks)}
  factors = jnp.ones(3).at[places["t1"]].set(0)
  new, logs = jax.jit(step)(state, batch, factors=factors)
  plain, _ = jax.jit(step)(state, without(batch, some_tasks, ["t1"]))
  assert_close(new.params, plain.params)
  assert not logs["active"][places["t1"]] and logs["weights"][places["t1"]] == 0
  assert logs["task_weights"].tolist() == factors.tolist()


def test_scheduled_steps_take_turns_inside_one_program_on_any_number_of_devices():
  state, batch, step, model, some_tasks = make(("s", "r", "r"), balancing.pcgrad(), opt=ADAM)
  names = tuple(task.name for task in some_tasks)
  schedule = schedules.alternating(names, {t.name: t.stream for t in some_tasks}, {})
  run = functools.partial(schedules.scheduled_step, schedule=schedule, num_steps=4,
                          step=lambda state, batch, **part: step(state, batch, **part))
  ends = []
  for devices in (1, 8):
    mesh = sharding.data_mesh(jax.devices()[:devices])
    current = jax.device_put(jax.tree.map(jnp.copy, state), sharding.replicated(mesh))
    compiled = sharding.sharded_step(run, mesh)
    for _ in range(4):
      current, logs = compiled(current, jax.device_put(batch, sharding.split(mesh)))
    ends.append(current)
  assert {stream: int(turn) for stream, turn in ends[0].turns.items()} == {"s": 2, "r": 2}
  assert_close(ends[0].params, ends[1].params, 2e-5)
  by_hand = state
  for i in range(4):
    by_hand, _ = jax.jit(functools.partial(step, only=schedule.groups[i % 2]))(by_hand, batch)
  assert_close(ends[0].params, by_hand.params, 2e-5)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in ("hard", "cross_stitch", "ple") else pytest.mark.slow)
    for name in models.SHARINGS])
def test_every_sharing_serves_some_tasks_alone(name):
  from tests.models.sharing_cases import IMAGES, TASKS, TRUNKS, TWO, filled
  trunk = TRUNKS["resnet" if name in ("task_norm", "adashare") else "cnn"]
  sharing = models.SHARINGS[name](trunk, TASKS)
  model = models.MultiTaskModel(sharing, {task: models.Linear(2) for task in TASKS}, TWO)
  batch = {stream: {"image": images} for stream, images in IMAGES.items()}
  variables = filled(model, batch)
  whole = jax.jit(lambda v: model.apply(v, batch))(variables)
  some = jax.jit(lambda v: model.apply(v, {"x": batch["x"]}, only=("b",)))(variables)
  assert list(some) == ["b"]
  np.testing.assert_allclose(some["b"], whole["b"], rtol=1e-5, atol=1e-6)


def test_streams_are_seen_whole_whatever_the_turns():
  """Two of three steps read y: after ten of its turns each of 40 examples came exactly once."""
  from mtl_jax.data import streams
  schedule = schedules.alternating(TASKS, STREAMS, SIZES, by="task")
  columns = {s: {"image": jnp.arange(40)} for s in ("x", "y")}
  turns, seen = {"x": 0, "y": 0}, collections.Counter()
  for group in drawn(schedule, 15):
    batch = streams.resident_batch(columns, 4, jnp.uint32(0),
                                   {s: jnp.int32(turn) for s, turn in turns.items()})
    stream = STREAMS[schedule.groups[group][0]]
    if stream == "y":
      seen.update(batch["y"]["image"].tolist())
    turns[stream] += 1
  assert turns == {"x": 5, "y": 10} and sorted(seen.values()) == [1] * 40
