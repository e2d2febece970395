"""Which object each location gets: against loops, by hand, and that no object is forgotten."""

import functools

import jax
import numpy as np
import pytest

from mtl_jax.tasks.point_assignment import assign


@functools.cache
def grid(*sizes):
  """Points, stride and reach of square levels, the finest first; reach is 2 cells of its level."""
  points, strides, reaches, nearest = [], [], [], 0.0
  for size in sizes:
    y, x = np.mgrid[:size, :size]
    points.append(np.stack([x + 0.5, y + 0.5], -1).reshape(-1, 2) / size)
    strides.append(np.full((size * size, 2), 1 / size))
    farthest = np.inf if size == sizes[-1] else 2 * sizes[0] / size
    reaches.append(np.full((size * size, 2), (nearest, farthest)))
    nearest = farthest
  return tuple(np.concatenate(x).astype(np.float32) for x in (points, strides, reaches))


found_by = jax.jit(assign, static_argnames="radius")


def random_objects(seed, count, smallest, largest):
  rng = np.random.default_rng(seed)
  size = rng.uniform(smallest, largest, (count, 2))
  low = rng.uniform(0, 1 - size)
  return np.concatenate([low, low + size, rng.integers(-1, 3, (count, 1))], 1).astype(np.float32)


def by_the_rule(points, stride, reach, objects, radius):
  """FCOS's rule in loops: -1 or the smallest object that a location finds well."""
  chosen = []
  for (x, y), (w, h), (near, far) in zip(points, stride, reach):
    best, smallest = -1, np.inf
    for m, (x1, y1, x2, y2, label) in enumerate(objects):
      sides = (x - x1, y - y1, x2 - x, y2 - y)
      farthest = max(max(sides[::2]) / stride[0, 0], max(sides[1::2]) / stride[0, 1])
      central = abs(x - (x1 + x2) / 2) <= radius * w and abs(y - (y1 + y2) / 2) <= radius * h
      area = (x2 - x1) * (y2 - y1)
      if label >= 0 and min(sides) > 0 and central and near <= farthest < far and area < smallest:
        best, smallest = m, area
    chosen.append(best)
  return np.array(chosen)


@pytest.mark.parametrize("radius", [1.5, 0.6])
@pytest.mark.parametrize("seed", range(4))
def test_locations_follow_the_rule_unless_an_object_would_have_none(seed, radius):
  where = grid(8, 4)
  objects = random_objects(seed, 7, 0.05, 0.7)
  found = found_by(*where, objects, radius=radius)
  expected = by_the_rule(*where, objects, radius)
  kept = np.asarray(found.object) == expected
  assert np.all(kept | (np.asarray(found.centerness) == 1))
  forgotten = set(np.flatnonzero(objects[:, 4] >= 0)) - set(expected)
  if not forgotten:
    assert kept.all()
  assert (~kept).sum() >= len(forgotten)


@pytest.mark.parametrize("objects", [
    random_objects(0, 16, 0.001, 0.01),  # far smaller than a cell
    random_objects(1, 16, 0.3, 0.9),
    np.tile(np.float32([[0.4, 0.4, 0.6, 0.6, 1]]), (16, 1)),  # all in one place
    np.tile(np.float32([[0, 0, 1, 1, 1]]), (16, 1)),
    np.float32([[0.5 - i / 40, 0.5 - i / 40, 0.5 + i / 40, 0.5 + i / 40, 0]
                for i in range(1, 17)]),  # one inside the other
])
def test_every_object_has_a_location(objects):
  for where in (grid(8, 4), grid(4)):
    found = np.asarray(found_by(*where, objects).object)
    there = objects[:, 4] >= 0
    assert set(np.flatnonzero(there)) == set(found[found >= 0])


def test_more_objects_than_locations_fill_them_all():
  objects = random_objects(0, 16, 0.1, 0.5)
  objects[:, 4] = 0
  found = np.asarray(found_by(*grid(2), objects).object)
  assert len(set(found)) == 4 and (found >= 0).all()


def test_the_nearest_location_of_the_right_level_is_taken():
  where = grid(8, 4)
  tiny = np.float32([[0.3, 0.3, 0.301, 0.301, 0]])  # in the cell of row 2, column 2
  found = found_by(*where, tiny)
  assert np.flatnonzero(np.asarray(found.object) == 0).tolist() == [2 * 8 + 2]
  assert float(found.centerness[18]) == 1
  flat = np.float32([[0.0, 0.49, 1.0, 0.495, 0]])  # reaches 4 cells: for the coarse level
  found = np.flatnonzero(np.asarray(found_by(*where, flat).object) == 0)
  assert found.tolist() in ([64 + 4 + 1], [64 + 4 + 2])


def test_large_objects_go_to_coarse_levels_and_small_ones_to_fine_levels():
  where = grid(8, 4)
  small, large = np.float32([[0.4, 0.4, 0.6, 0.6, 0]]), np.float32([[0, 0, 1, 1, 0]])
  assert np.flatnonzero(np.asarray(found_by(*where, small).object) == 0).max() < 64
  assert np.flatnonzero(np.asarray(found_by(*where, large).object) == 0).min() >= 64


def test_centerness_by_hand():
  where = grid(4)
  found = found_by(*where, np.float32([[0, 0, 0.5, 1, 0]]), radius=9.0)
  central = np.asarray(found.centerness).reshape(4, 4)
  np.testing.assert_allclose(central[:, 0], np.sqrt([1 / 3 / 7, 1 / 3 * 3 / 5] * 2)[[0, 1, 3, 2]],
                             rtol=1e-5)
  np.testing.assert_array_equal(central[:, 2:], 0)


@pytest.mark.parametrize("rows", [
    np.zeros((3, 5)),  # what a missing label is replaced by: class 0, no area
    [[0.2, 0.2, 0.2, 0.8, 1]],  # no width
    [[0.8, 0.2, 0.2, 0.8, 1]],  # corners out of order
    [[0, 0, 0, 0, -1]],
    [[0.1, 0.1, 0.9, 0.9, -1]],
])
def test_what_is_no_object_gets_nothing(rows):
  found = found_by(*grid(8, 4), np.float32(rows))
  assert (found.object == -1).all() and (found.centerness == 0).all()


def test_absent_rows_and_the_order_of_objects_change_nothing():
  where, objects = grid(8, 4), random_objects(3, 6, 0.05, 0.6)
  objects[:, 4] = range(6)
  first = found_by(*where, objects)
  order = np.array([3, 1, 5, 0, 4, 2])
  mixed = np.concatenate([objects[order], np.float32([[0, 0, 0, 0, -1]])])
  second = found_by(*where, mixed)
  back = np.append(order, -1)[np.asarray(second.object)]
  np.testing.assert_array_equal(np.where(second.object < 0, -1, back), first.object)
  np.testing.assert_array_equal(second.centerness, first.centerness)
