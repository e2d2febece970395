"""The detection head: which levels, which locations, what comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models
from mtl_jax.models.heads.detection import locations


def maps_of(size, strides, channels=4, batch=2):
  """Maps of ones of a trunk for images of `size`, and features."""
  shapes = {f"layer{i + 1}": (batch, -(-size[0] // s), -(-size[1] // s), channels)
            for i, s in enumerate(strides)}
  return {**{stage: jnp.ones(shape) for stage, shape in shapes.items()},
          "features": jnp.ones((batch, channels))}


def traced(head, maps):
  return jax.eval_shape(head.init_with_output, jax.random.key(0), maps)


@pytest.mark.parametrize("size, strides, head, count", [
    ((32, 32), (1, 2, 4, 8), {"size": (32, 32)}, 8 * 8 + 4 * 4),  # 1 and 2 are too fine
    ((32, 32), (1, 2, 4, 8), {}, 16 * 16 + 8 * 8 + 4 * 4),
    ((480, 640), (4, 8, 16, 32), {"size": (480, 640)}, 60 * 80 + 30 * 40 + 15 * 20),
    ((480, 640), (4, 8, 16, 32), {"stages": ("layer1",)}, 120 * 160),
    ((50, 30), (4, 8), {"size": (50, 30)}, 13 * 8 + 7 * 4),
    ((8, 8), (1, 2), {"size": (8, 8)}, 4 * 4),  # nothing is coarse enough
    ((32, 32), (4, 8, 8), {"size": (32, 32)}, 8 * 8 + 4 * 4),  # two stages of one resolution
])
def test_levels_that_are_taken(size, strides, head, count):
  outputs, _ = traced(models.HEADS["detection"](num_outputs=3, channels=8, **head),
                      maps_of(size, strides))
  assert {name: x.shape for name, x in outputs.items()} == {
      "class": (2, count, 3), "box": (2, count, 4), "centerness": (2, count),
      "points": (1, count, 2), "stride": (1, count, 2), "reach": (1, count, 2)}


def test_locations_and_reach_by_hand():
  found = locations([(2, 4), (1, 2)])
  np.testing.assert_allclose(found["points"][:5], [
      (1 / 8, 1 / 4), (3 / 8, 1 / 4), (5 / 8, 1 / 4), (7 / 8, 1 / 4), (1 / 8, 3 / 4)])
  np.testing.assert_allclose(found["points"][8:], [(1 / 4, 1 / 2), (3 / 4, 1 / 2)])
  np.testing.assert_allclose(found["stride"], [(1 / 4, 1 / 2)] * 8 + [(1 / 2, 1)] * 2)
  np.testing.assert_allclose(found["reach"], [(0, 8)] * 8 + [(8, np.inf)] * 2)


def test_reaches_leave_no_gap_where_sizes_are_odd():
  reach = np.unique(locations([(15, 20), (8, 10), (4, 5)])["reach"], axis=0)
  assert reach[0, 0] == 0 and np.isinf(reach[-1, 1])
  np.testing.assert_array_equal(reach[1:, 0], reach[:-1, 1])


@pytest.mark.slow
def test_it_starts_with_rare_classes_and_small_boxes_around_their_location():
  head = models.Detection(num_outputs=5, channels=8, depth=1, prior=0.02)
  maps = maps_of((32, 32), (4, 8))
  outputs, _ = jax.jit(head.init_with_output)(jax.random.key(0), maps)
  np.testing.assert_allclose(jax.nn.sigmoid(outputs["class"]), 0.02, rtol=0.3)
  assert (outputs["box"][..., :2] < outputs["points"]).all()
  assert (outputs["box"][..., 2:] > outputs["points"]).all()
  width = (outputs["box"][..., 2:] - outputs["box"][..., :2]) / outputs["stride"]
  np.testing.assert_allclose(width, 2, rtol=0.2)


def test_towers_are_the_same_on_every_level():
  one, two = (traced(models.Detection(num_outputs=3, channels=8, stages=stages),
                     maps_of((32, 32), (4, 8)))[1]["params"]
              for stages in (("layer1",), ("layer1", "layer2")))
  assert set(two) - set(one) == {"scale_layer2"}


def test_whatever_the_maps_boxes_and_gradients_are_finite():
  head = models.Detection(num_outputs=3, channels=8, depth=1, stages=("layer1",))
  maps = maps_of((16, 16), (4,))
  params = jax.jit(head.init)(jax.random.key(0), maps)
  params = jax.tree.map(lambda x: x * 1e4, params)
  value, grads = jax.jit(jax.value_and_grad(lambda p: head.apply(p, maps)["box"].sum()))(params)
  assert np.isfinite(value)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("head, maps, message", [
    ({"stages": ("layer9",)}, maps_of((8, 8), (4,)), "found 'layer9'"),
    ({}, {"features": jnp.ones((2, 4))}, r"detection: expected a trunk with maps \[B, h, w, c\]"),
    ({"prior": 1.0}, maps_of((8, 8), (4,)), r"detection: prior: expected a probability"),
])
def test_mistakes(head, maps, message):
  with pytest.raises(ValueError, match=message):
    traced(models.Detection(num_outputs=3, **head), maps)
