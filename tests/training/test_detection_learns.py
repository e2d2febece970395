"""The detection head learns to find things, with plain optax around it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import models, tasks

SIZE, MOST = 48, 3


class SmallTrunk(nn.Module):
  """Three strided convolutions, whose maps have 2, 4 and 8 pixels a location."""

  @nn.compact
  def __call__(self, images):
    x, maps = images, {}
    for i, channels in enumerate((16, 32, 32)):
      x = nn.Conv(channels, (3, 3), strides=2, name=f"conv{i + 1}")(x)
      x = nn.relu(nn.GroupNorm(num_groups=None, group_size=8, name=f"norm{i + 1}")(x))
      maps[f"layer{i + 1}"] = x
    return {**maps, "features": x.mean(axis=(1, 2))}


class Detector(nn.Module):
  """The head on the maps of the trunk."""

  @nn.compact
  def __call__(self, images):
    return models.Detection(num_outputs=3, size=(SIZE, SIZE), name="head")(SmallTrunk()(images))


def scenes(count, rng):
  """Noise with up to three red, green or blue rectangles, the class; later ones lie in front."""
  images = rng.normal(0, 0.1, (count, SIZE, SIZE, 3))
  objects = np.zeros((count, MOST, 5))
  objects[..., 4] = -1
  for image, rows in zip(images, objects):
    for row in rows[:rng.integers(0, MOST + 1)]:
      w, h = rng.integers(8, 25, 2)
      x, y, label = rng.integers(SIZE - w + 1), rng.integers(SIZE - h + 1), rng.integers(3)
      image[y:y + h, x:x + w] = np.eye(3)[label] + rng.normal(0, 0.1, 3)
      row[:] = x / SIZE, y / SIZE, (x + w) / SIZE, (y + h) / SIZE, label
  return images.astype(np.float32), objects.astype(np.float32)


@pytest.mark.slow
def test_it_learns_to_find_coloured_rectangles():
  rng = np.random.default_rng(0)
  (images, objects), (new_images, new_objects) = scenes(1600, rng), scenes(160, rng)
  task = tasks.detection("things", num_classes=3)
  model = Detector()
  optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 3e-3, 20, 200))

  @jax.jit
  def step(params, state, images, objects):
    grads = jax.grad(lambda p: task.loss(model.apply(p, images), objects).mean())(params)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
      updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  @jax.jit
  def evaluate(params, images, objects):
    outputs = model.apply(params, images)
    return [metric.update(outputs, objects, jnp.ones(len(images), bool)) for metric in task.metrics]

  def scores(params):
    states = jax.device_get(evaluate(params, new_images, new_objects))
    return [metric.compute(state) for metric, state in zip(task.metrics, states)]

  params = jax.jit(model.init)(jax.random.key(0), images[:2])
  state = optimizer.init(params)
  assert max(scores(params)) < 0.1
  for _ in range(200):
    chosen = rng.integers(len(images), size=32)
    params, state = step(params, state, images[chosen], objects[chosen])
  precision, precision50 = scores(params)
  assert precision50 >= 0.8 and precision >= 0.45, (precision, precision50)
