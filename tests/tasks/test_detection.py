"""The detection task: losses by hand, what does not count, metrics through the task machinery."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import tasks
from mtl_jax.tasks.detection import detection_losses

TASK = tasks.detection("t", num_classes=2, stream="s")
LOSS = jax.jit(TASK.loss)
SIZE = 6
Y, X = np.mgrid[:SIZE, :SIZE]
POINTS = (np.stack([X + 0.5, Y + 0.5], -1).reshape(1, -1, 2) / SIZE).astype(np.float32)
ABSENT = (0, 0, 0, 0, -1)


def outputs_of(batch=1, seed=None):
  """Outputs of a level of 6x6 locations: boxes of 2 cells and logits of 0, or all at random."""
  rng = np.random.default_rng(seed)
  noise = lambda *shape: np.zeros(shape) if seed is None else rng.normal(size=shape)
  count = SIZE * SIZE
  half = np.exp(noise(batch, count, 4) / 2) / SIZE
  arrays = {"class": noise(batch, count, 2), "centerness": noise(batch, count),
            "box": np.concatenate([POINTS - half[..., :2], POINTS + half[..., 2:]], -1),
            "points": POINTS, "stride": np.full((1, count, 2), 1 / SIZE),
            "reach": np.tile([0, np.inf], (1, count, 1))}
  return {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}


def rows(*objects):
  return jnp.asarray([objects], jnp.float32)


def test_an_image_without_objects_by_hand():
  """36 locations and 2 classes of probability 1/2: focal loss 0.75 * 1/4 * log(2) each."""
  value = LOSS(outputs_of(), rows(ABSENT))
  np.testing.assert_allclose(value, [72 * 0.75 * 0.25 * np.log(2)], rtol=1e-5)


def test_one_object_by_hand():
  """The four central locations lie in a box of 2x2 cells, half a cell off its centre.

  Centre-ness is sqrt(1/3 * 1/3) = 1/3; the predicted box, shifted by half a cell along both axes,
  has IoU 2.25 / 5.75 with it, and the enclosing box has 6.25 of which 0.5 are outside.
  """
  found = jax.jit(detection_losses)(outputs_of(), rows((2 / 6, 2 / 6, 4 / 6, 4 / 6, 1), ABSENT))
  np.testing.assert_allclose(
      found["class"], [np.log(2) * (4 * 0.25 * 0.25 + 68 * 0.75 * 0.25) / 4], rtol=1e-5)
  np.testing.assert_allclose(found["box"], [1 - (2.25 / 5.75 - 0.5 / 6.25)], rtol=1e-5)
  np.testing.assert_allclose(found["centerness"], [np.log(2)], rtol=1e-5)


def test_factors_and_hyperparameters():
  labels = rows((2 / 6, 2 / 6, 4 / 6, 4 / 6, 1))
  task = tasks.detection("t", num_classes=2, box_weight=3.0, centerness_weight=0.5,
                         focal_alpha=0.5, focal_gamma=0.0, centre_radius=0.4)
  box = 1 - (2.25 / 5.75 - 0.5 / 6.25)
  expected = 0.5 * 72 * np.log(2) + 3 * box + 0.5 * np.log(2)  # one location, centre-ness 1
  np.testing.assert_allclose(jax.jit(task.loss)(outputs_of(), labels), [expected], rtol=1e-5)


def test_every_image_counts_the_same_whatever_is_beside_it():
  outputs = outputs_of(3, seed=0)
  labels = jnp.concatenate([rows((0.1, 0.1, 0.5, 0.4, 0), (0.3, 0.3, 0.9, 0.9, 1)),
                            rows(ABSENT, ABSENT), rows((0.6, 0, 1, 0.5, 1), ABSENT)])
  together = LOSS(outputs, labels)
  constant = ("points", "stride", "reach")
  for i in range(3):
    alone = {name: x if name in constant else x[i:i + 1] for name, x in outputs.items()}
    np.testing.assert_allclose(LOSS(alone, labels[i:i + 1]), together[i:i + 1], rtol=1e-5)


def test_perfect_outputs_have_no_loss():
  labels = rows((2 / 6, 2 / 6, 5 / 6, 5 / 6, 1))  # a centre on a location, with 8 around it
  outputs = outputs_of()
  inside = jnp.asarray(((X >= 2) & (X < 5) & (Y >= 2) & (Y < 5)).reshape(1, -1))
  near = (np.minimum(X - 1.5, 4.5 - X) * np.minimum(Y - 1.5, 4.5 - Y)
          / np.maximum(X - 1.5, 4.5 - X) / np.maximum(Y - 1.5, 4.5 - Y)).reshape(1, -1)
  central = jnp.asarray(np.sqrt(np.clip(near, 0, 1 - 1e-6)), jnp.float32)
  outputs["class"] = jnp.where(inside[..., None] & jnp.array([[[False, True]]]), 12.0, -12.0)
  outputs["centerness"] = jnp.where(inside, jnp.log(central / (1 - central)), 0)
  outputs["box"] = jnp.where(inside[..., None], labels[:, :, :4], outputs["box"])
  found = jax.jit(detection_losses)(outputs, labels)
  np.testing.assert_allclose(found["class"], 0, atol=1e-4)
  np.testing.assert_allclose(found["box"], 0, atol=1e-5)
  entropy = -(central * jnp.log(central) + (1 - central) * jnp.log1p(-central))
  np.testing.assert_allclose(found["centerness"], [entropy[inside].mean()], rtol=1e-4)


def test_what_is_missing_or_no_object_gives_no_nan():
  """An image not annotated counts for nothing; what replaces its label, zeros, is no object."""
  outputs = outputs_of(2, seed=1)
  labels = jnp.concatenate([jnp.full((1, 2, 5), jnp.nan), rows((0.1, 0.1, 0.5, 0.4, 0), ABSENT)])
  loss = lambda out, labels: tasks.task_losses((TASK,), {"t": out}, {"s": {"objects": labels}})[0][0]
  value, grads = jax.jit(jax.value_and_grad(loss))(outputs, labels)
  np.testing.assert_allclose(value, LOSS(outputs, labels.at[0].set(0))[1], rtol=1e-6)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  assert all((grads[name][0] == 0).all() for name in ("class", "box", "centerness"))
  assert all((grads[name] == 0).all() for name in ("points", "stride", "reach"))
  np.testing.assert_array_equal(LOSS(outputs, jnp.zeros((2, 2, 5))),
                                LOSS(outputs, jnp.tile(rows(ABSENT, ABSENT), (2, 1, 1))))


def test_half_precision_logits_give_a_float32_loss():
  outputs = outputs_of()
  for name in ("class", "centerness"):
    outputs[name] = outputs[name].astype(jnp.bfloat16)
  assert jax.eval_shape(TASK.loss, outputs, rows(ABSENT)).dtype == jnp.float32


def test_metrics_over_batches():
  """What is found where it is, through the machinery that joins gathered states on the host."""
  labels = jnp.concatenate([rows((2 / 6, 2 / 6, 4 / 6, 4 / 6, 1), ABSENT), rows(ABSENT, ABSENT),
                            jnp.full((1, 2, 5), jnp.nan)])
  outputs = outputs_of(3)
  outputs["class"] = outputs["class"].at[:].set(-9.0).at[0, 14, 1].set(9.0)
  outputs["box"] = outputs["box"].at[0, 14].set(labels[0, 0, :4])
  found = jax.jit(lambda out, y: tasks.task_metrics((TASK,), {"t": out}, {"s": {"objects": y}}))(
      outputs, labels)
  state = found["t"]["mAP"]
  assert [x.shape for x in state] == [(3, 100, 6), (3, 2, 5), (3,)]
  assert state.mask.tolist() == [True, True, False]
  values = tasks.compute_metrics((TASK,), jax.device_get(found))
  assert values["t/mAP"] == pytest.approx(1) and values["t/mAP50"] == pytest.approx(1)
  twice = tasks.merge_metrics((TASK,), jax.device_get(found), jax.device_get(found))
  assert tasks.compute_metrics((TASK,), twice)["t/mAP"] == pytest.approx(1)
  training = jax.eval_shape(lambda: tasks.task_metrics(
      (TASK,), {"t": outputs}, {"s": {"objects": labels}}, gathered=False))
  assert set(training["t"]) == {"loss"}


def test_metrics_by_class():
  task = tasks.KINDS["detection"]("t", num_classes=2, per_class=True)
  assert [metric.name for metric in task.metrics] == ["mAP", "mAP50", "AP_0", "AP_1"]
  assert [metric.only for metric in task.metrics] == [None, None, 0, 1]


def test_examples_on_eight_devices():
  sharding = jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(
      jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec("data"))
  outputs, labels = outputs_of(8, seed=2), jnp.tile(
      rows((0.1, 0.1, 0.5, 0.4, 0), (0.3, 0.3, 0.3001, 0.9, 1), ABSENT), (8, 1, 1))
  apart = {name: jax.device_put(x, sharding) if len(x) == 8 else x for name, x in outputs.items()}
  values = LOSS(apart, jax.device_put(labels, sharding))
  np.testing.assert_allclose(values, LOSS(outputs, labels), rtol=1e-5)
  found = jax.jit(tasks.detect)
  for a, b in zip(found(apart), found(outputs)):
    np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("kwargs, message", [
    ({"num_classes": 0}, "t: num_classes: expected at least 1, found 0"),
    ({"max_detections": 0}, "t: max_detections: expected at least 1, found 0"),
    ({"nms_iou": 60}, "t: nms_iou: expected a number from 0 to 1, found 60"),
    ({"box_weight": -1.0}, "t: box_weight: expected a number not below 0, found -1.0"),
])
def test_bad_arguments(kwargs, message):
  with pytest.raises(ValueError, match=message):
    tasks.detection("t", **{"num_classes": 2, **kwargs})
