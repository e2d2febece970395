"""What holds for every kind of task: masks, splits, devices, gradients, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import tasks
from mtl_jax.training.sharding import data_mesh, replicated, split

N, H, W = 37, 4, 6
CHUNK = 16

TASKS = (
    tasks.classification("class", num_classes=7, stream="s", label="class", label_smoothing=0.1,
                         class_weights=(1, 2, 3, 1, 1, 1, 0.5)),
    tasks.multilabel("attributes", num_labels=3, stream="s", positive_weights=(1, 2, 3),
                     per_label=True, names=("hat", "tie", "smile")),
    tasks.regression("number", size=1, stream="s", label="number", mean=40.0, std=10.0),
    tasks.regression("numbers", size=2, stream="s", label="numbers", loss="huber",
                     scale_targets=False),
    tasks.regression("angle", size=1, stream="s", label="angle", period=360.0),
    tasks.boxes("box", stream="s"),
    tasks.segmentation("mask", num_classes=4, stream="s", class_weights=(1, 2, 1, 1)),
    tasks.depth("depth", stream="s", unit="m"),
    tasks.normals("normals", stream="s"),
    tasks.reconstruction("photo", num_channels=3, stream="s", value_range=(4, 5, 6)),
    tasks.identity("face", num_classes=5, stream="s", label="identity"),
)
UNITS_AND_DIRECTIONS = {  # first letter: is higher or lower better
    "class": {"accuracy": "h fraction", "top5_accuracy": "h fraction", "macro_f1": "h fraction"},
    "attributes": {"f1": "h fraction", "accuracy": "h fraction"} | {
        f"{kind}_{name}": "h fraction" for name in ("hat", "tie", "smile")
        for kind in ("f1", "accuracy")},
    "number": {"mae": "l ", "rmse": "l ", "r2": "h "},
    "numbers": {"mae": "l ", "rmse": "l ", "r2": "h "},
    "angle": {"mae": "l "},
    "box": {"iou": "h fraction", "hit_rate_50": "h fraction", "hit_rate_75": "h fraction"},
    "mask": {"miou": "h fraction", "pixel_accuracy": "h fraction"},
    "depth": {"absolute_error": "l m", "relative_error": "l ", "rmse": "l m"},
    "normals": {"mean_angle": "l °", "median_angle": "l °", "within_11.25": "h fraction",
                "within_22.5": "h fraction", "within_30": "h fraction"},
    "photo": {"mse": "l ", "psnr": "h dB"},
    "face": {"accuracy": "h fraction", "verification_accuracy": "h fraction",
             "roc_auc": "h fraction"},
}


def unit(vectors):
  return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def examples(seed=0):
  """Outputs and a batch of N examples, of which some lack labels as a whole, some in part."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=(N, *shape)).astype(np.float32)
  integers = lambda high, *shape: rng.integers(-1, high, (N, *shape)).astype(np.int32)

  def holes(values, share, axes):
    """NaN for a share of the parts along the leading axes, and for every fifth example."""
    values = values.copy()
    values[rng.uniform(size=values.shape[:axes]) < share] = np.nan
    values[::5] = np.nan
    return values

  corner = rng.uniform(0, 0.5, (N, 2)).astype(np.float32)
  box = np.concatenate([corner, corner + rng.uniform(0.1, 0.5, (N, 2)).astype(np.float32)], 1)
  embedding, normals = unit(normal(8)), unit(normal(H, W, 3))
  columns = {
      "image": normal(H, W, 3),
      "class": integers(7),
      "attributes": np.where(np.arange(N)[:, None] % 5 == 0, -1, integers(2, 3)),
      "number": holes(40 + 10 * normal(), 0.1, 1),
      "numbers": holes(normal(2), 0.2, 2),
      "angle": holes(rng.uniform(0, 360, N).astype(np.float32), 0.1, 1),
      "box": holes(box, 0.1, 1),
      "mask": np.where(np.arange(N)[:, None, None] % 5 == 0, -1, integers(4, H, W)),
      "depth": holes(rng.uniform(1, 9, (N, H, W)).astype(np.float32), 0.2, 3),
      "normals": holes(normals, 0.2, 3),
      "identity": integers(5),
  }
  outputs = {
      "class": normal(7), "attributes": normal(3), "number": normal(1), "numbers": normal(2),
      "angle": normal(2), "box": normal(4), "mask": normal(H, W, 4), "depth": 5 + normal(H, W, 1),
      "normals": unit(np.nan_to_num(columns["normals"]) + 0.3 * normal(H, W, 3)),
      "photo": columns["image"] + normal(H, W, 3),
      "face": {"embedding": embedding, "cosines": np.tanh(normal(5))},
  }
  return outputs, {"s": columns}


OUTPUTS, BATCH = examples()


@jax.jit
def states_of(outputs, batch):
  return tasks.task_metrics(TASKS, outputs, batch)


@jax.jit
def losses_of(outputs, batch):
  return tasks.task_losses(TASKS, outputs, batch)


@jax.jit
def gradients_of(outputs, batch):
  def total(outputs):
    losses, active = tasks.task_losses(TASKS, outputs, batch)
    return losses.sum(), (losses, active)
  return jax.grad(total, has_aux=True)(outputs)


@jax.jit
def merged(a, b):
  return tasks.merge_metrics(TASKS, a, b)


def chosen(tree, indices):
  return jax.tree.map(lambda x: x[indices], tree)


def padded_states(indices):
  """Metric states of some examples in a batch of CHUNK, the rest of which is not present."""
  filled = np.concatenate([indices, np.zeros(CHUNK - len(indices), int)]).astype(int)
  batch = chosen(BATCH, filled)
  batch["s"]["present"] = np.arange(CHUNK) < len(indices)
  return states_of(chosen(OUTPUTS, filled), batch)


def missing_everywhere():
  columns = {name: np.full_like(column, np.nan if column.dtype.kind == "f" else -1)
             for name, column in BATCH["s"].items()}
  return {"s": columns}


WHOLE = tasks.compute_metrics(TASKS, states_of(OUTPUTS, BATCH))


def test_all_kinds_are_here():
  named = {"number": "regression", "numbers": "regression", "angle": "regression"}
  kinds = {"class": "classification", "attributes": "multilabel", "box": "boxes",
           "mask": "segmentation", "depth": "depth", "normals": "normals",
           "photo": "reconstruction", "face": "identity"} | named
  assert set(kinds) == {task.name for task in TASKS} == set(OUTPUTS)
  assert set(kinds.values()) <= set(tasks.KINDS)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_units_and_directions(task):
  found = {m.name: f"{'h' if m.higher_is_better else 'l'} {m.unit}" for m in task.metrics}
  assert found == UNITS_AND_DIRECTIONS[task.name]


def test_every_value_is_a_finite_float():
  assert len(WHOLE) == sum(len(task.all_metrics) for task in TASKS)
  assert all(type(value) is float and np.isfinite(value) for value in WHOLE.values()), WHOLE


@pytest.mark.parametrize("seed", range(4))
def test_metrics_are_exact_over_any_order_and_split(seed):
  rng = np.random.default_rng(seed)
  order = rng.permutation(N)
  cuts, size = [], 0
  while (size := size + rng.integers(0, CHUNK + 1)) < N:  # parts may be empty
    cuts.append(size)
  total, gathered = None, []
  for part in np.split(order, cuts):
    states = padded_states(part)
    gathered.append({metric: states["face"].pop(metric)
                     for metric in ("verification_accuracy", "roc_auc")})
    total = states if total is None else merged(total, states)
  total["face"] |= jax.tree.map(lambda *parts: np.concatenate(parts), *gathered)
  found = tasks.compute_metrics(TASKS, total)
  assert found.keys() == WHOLE.keys()
  rounds = {f"{task.name}/{m.name}" for task in TASKS for m in task.all_metrics
            if m.name in ("loss", "r2", "iou", "psnr") or m.unit != "fraction"}
  rounds -= {"normals/median_angle"}
  for name, value in found.items():
    if name in rounds:
      np.testing.assert_allclose(value, WHOLE[name], rtol=2e-6, err_msg=name)
    else:
      assert value == WHOLE[name], name


def test_metrics_and_losses_are_the_same_over_eight_devices():
  mesh = data_mesh()
  indices = np.arange(8 * mesh.size) % N
  some = tuple(task for task in TASKS if task.name in ("numbers", "mask", "normals", "face"))
  outputs, batch = chosen(OUTPUTS, indices), chosen(BATCH, indices)
  of = lambda o, b: (tasks.task_metrics(some, o, b), tasks.task_losses(some, o, b))
  found = jax.jit(of, in_shardings=split(mesh), out_shardings=replicated(mesh))(outputs, batch)
  alone = jax.jit(of)(outputs, batch)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
    if a.dtype == jnp.float32:
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    else:
      np.testing.assert_array_equal(a, b)


def test_a_batch_without_labels_is_inactive_with_a_loss_of_zero_and_no_metric():
  batch = missing_everywhere()
  gradients, (losses, active) = gradients_of(OUTPUTS, batch)
  assert not losses.any() and not active.any()
  assert all(not g.any() for g in jax.tree.leaves(gradients))
  assert all(np.isnan(value) for value in
             tasks.compute_metrics(TASKS, states_of(OUTPUTS, batch)).values())


def test_gradients_are_finite_and_zero_where_labels_are_missing():
  gradients, _ = gradients_of(OUTPUTS, BATCH)
  assert all(np.isfinite(g).all() and g.any() for name, g in gradients.items() if name != "face")
  assert np.isfinite(gradients["face"]["cosines"]).all()
  columns = BATCH["s"]
  for name in ("class", "number", "angle", "box", "mask", "depth", "normals"):
    labels = columns[name]
    missing = labels < 0 if labels.dtype.kind == "i" else np.isnan(labels)
    missing = missing.any(-1) if name in ("box", "normals") else missing
    assert missing.any() and not np.asarray(gradients[name])[missing].any(), name
  for name in ("attributes", "numbers"):
    missing = np.isnan(columns[name]) | (columns[name] < 0 if name == "attributes" else False)
    assert not np.asarray(gradients[name])[missing].any(), name


def test_outputs_of_low_precision_are_computed_in_float32():
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), OUTPUTS)
  columns = {**BATCH["s"], "image": BATCH["s"]["image"].astype(jnp.bfloat16)}
  rounded = jax.tree.map(lambda x: x.astype(np.float32), low)
  kept = {"s": {**columns, "image": columns["image"].astype(np.float32)}}
  assert losses_of.eval_shape(low, {"s": columns})[0].dtype == jnp.float32
  a, b = (tasks.compute_metrics(TASKS, states_of(o, batch))  # the losses are among the metrics
          for o, batch in ((low, {"s": columns}), (rounded, kept)))
  for name in a:
    np.testing.assert_allclose(a[name], b[name], rtol=2e-6, err_msg=name)


def test_counts_do_not_overflow():
  metric = tasks.MeanMetric("share", lambda o, y: o == y, "fraction", True)
  state = metric.update(jnp.zeros(7), jnp.array([0., 0., 0., 1., 1., 1., 1.]), jnp.ones(7, bool))
  for _ in range(40):  # 7 * 2^40 parts
    state = metric.merge(state, state)
  assert metric.compute(state) == 3 / 7
  assert int(tasks.metrics.number(state.count)) == 7 * 2 ** 40


@pytest.mark.parametrize("a, b", [(2 ** 31 - 1, 1), (2 ** 30 - 1, 1), (2 ** 30, 2 ** 30), (0, 5)])
def test_counts_carry(a, b):
  a, b = (jnp.asarray([x], jnp.int32) for x in (a, b))
  total = tasks.metrics.added(tasks.metrics.counted(a), tasks.metrics.counted(b))
  assert tasks.metrics.number(total).tolist() == [int(a[0]) + int(b[0])]
  assert (total.low < 2 ** 30).all() and (total.low >= 0).all()


@pytest.mark.parametrize("kind, kwargs, message", [
    ("classification", {"num_classes": 3, "class_weights": (1, 2)}, "class_weights: expected 3"),
    ("classification", {"num_classes": 3, "class_weights": (1, 2, -1)}, "not below 0"),
    ("classification", {"num_classes": 3, "label_smoothing": 1.0}, r"a share in \[0, 1\)"),
    ("multilabel", {"num_labels": 0}, "num_labels: expected at least 1, found 0"),
    ("multilabel", {"num_labels": 2, "names": ("a",)}, "names: expected 2 names or none"),
    ("multilabel", {"num_labels": 2, "positive_weights": (1, 0)}, "2 numbers above 0"),
    ("regression", {"size": 1}, "mean and std: expected those of the labels in train"),
    ("regression", {"size": 1, "mean": 0, "std": 0}, "std: expected 1 number above 0, found 0"),
    ("regression", {"size": 2, "mean": (0, 0, 0), "std": 1}, "mean: expected 2 numbers"),
    ("regression", {"size": 1, "loss": "l2", "scale_targets": False}, "'mse', 'l1' or 'huber'"),
    ("regression", {"size": 1, "period": -1.0}, "period: expected a number > 0"),
    ("boxes", {"loss": "ciou"}, "loss: expected 'iou', 'giou', 'diou' or 'l1', found 'ciou'"),
    ("segmentation", {"num_classes": 1}, "num_classes: expected at least 2, found 1"),
    ("reconstruction", {"num_channels": 3, "value_range": 0.0}, "value_range: expected 3 numbers"),
    ("identity", {"num_classes": 5, "margin": 2.0}, "margin: expected a number in"),
])
def test_bad_arguments(kind, kwargs, message):
  with pytest.raises(ValueError, match=f"^t: .*{message}"):
    tasks.KINDS[kind]("t", **kwargs)


@pytest.mark.parametrize("name, shape", [("mask", (N, H, W, 3)), ("depth", (N, H, W, 2)),
                                         ("normals", (N, W, H, 3)), ("box", (N, 5))])
def test_outputs_of_another_shape_are_refused(name, shape):
  task = next(task for task in TASKS if task.name == name)
  with pytest.raises(ValueError, match=f"task {name}: expected outputs .* found .*{shape[-1]}"):
    tasks.task_losses((task,), {name: jnp.zeros(shape)}, BATCH)
