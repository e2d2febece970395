"""COCO's average precision: by hand, and whatever the order and the batches."""

import numpy as np
import pytest

from mtl_jax.tasks.average_precision import AveragePrecision, Detected, average_precisions

BOXES = np.array([[0, 0, 0.2, 0.2], [0.4, 0.4, 0.6, 0.6], [0.7, 0.1, 0.9, 0.5]])


def detected(detections, objects, mask=None):
  """Of images of rows (box, score, class) and (box, class), filled up with absent rows."""
  def padded(images, width):
    rows = max(map(len, images)) + 2
    full = np.zeros((len(images), rows, width), np.float32)
    full[..., -1] = -1
    for image, found in zip(full, images):
      image[:len(found)] = found if len(found) else image[:0]
    return full
  return Detected(padded(detections, 6), padded(objects, 5),
                  np.ones(len(objects), bool) if mask is None else np.array(mask))


def metric(**kwargs):
  return AveragePrecision("mAP", 3, detect=lambda outputs: outputs, **kwargs)


def random_detected(seed, images=20, levels=None):
  """Some objects, most found about where they are; scores of few levels, if given, tie."""
  rng = np.random.default_rng(seed)
  detections, objects = [], []
  for _ in range(images):
    count = rng.integers(0, 4)
    low = rng.uniform(0, 0.5, (count, 2))
    box = np.concatenate([low, low + rng.uniform(0.1, 0.4, (count, 2))], 1)
    label = rng.integers(0, 3, (count, 1))
    score = rng.uniform(0.1, 1, (count, 1))
    score = score if levels is None else np.ceil(score * levels) / levels
    objects.append(np.concatenate([box, label], 1))
    guess = np.where(rng.uniform(size=(count, 1)) < 0.8, label, rng.integers(0, 3, (count, 1)))
    detections.append(np.concatenate([box + rng.normal(0, 0.02, box.shape), score, guess], 1))
  return detected(detections, objects)


def test_by_hand():
  """Three objects; right, wrong, right: precision 1 up to recall 1/3, 2/3 up to 2/3, then 0.

  Of COCO's recalls 0, 0.01, …, 1, 34 are up to 1/3 and 33 more up to 2/3.
  """
  objects = [[(*BOXES[0], 1), (*BOXES[1], 1)], [(*BOXES[2], 1)]]
  detections = [[(*BOXES[0], 0.9, 1), (0.8, 0.8, 1, 1, 0.8, 1)], [(*BOXES[2], 0.7, 1)]]
  found = average_precisions(detected(detections, objects), 3)
  np.testing.assert_allclose(found, [np.nan, (34 + 33 * 2 / 3) / 101, np.nan], rtol=1e-12)
  assert metric().compute(detected(detections, objects)) == pytest.approx(56 / 101)


def test_overlap_counts_by_hand():
  """A box of IoU 0.72 is right at 5 of the 10 thresholds: 0.5, …, 0.7."""
  state = detected([[(0, 0, 0.5, 0.36, 0.9, 0)]], [[(0, 0, 0.5, 0.5, 0)]])
  assert metric().compute(state) == pytest.approx(0.5)
  assert metric(ious=(0.5,)).compute(state) == pytest.approx(1)
  assert metric(ious=(0.75,)).compute(state) == 0


def test_a_second_detection_of_one_object_is_wrong():
  state = detected([[(*BOXES[0], 0.9, 0), (*BOXES[0], 0.8, 0), (*BOXES[1], 0.7, 0)]],
                   [[(*BOXES[0], 0), (*BOXES[1], 0)]])
  assert metric().compute(state) == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_perfect_detections_are_1_and_none_are_0():
  objects = [[(*BOXES[0], 0), (*BOXES[1], 2)], [], [(*BOXES[2], 1)]]
  perfect = [[(*row[:4], 0.5, row[4]) for row in rows] for rows in objects]
  assert metric().compute(detected(perfect, objects)) == pytest.approx(1)
  assert metric().compute(detected([[], [], []], objects)) == 0


def test_classes_without_object_do_not_count_but_their_detections_are_not_others():
  objects = [[(*BOXES[0], 0)], [(*BOXES[1], 1)]]
  detections = [[(*BOXES[0], 0.9, 0), (*BOXES[0], 0.99, 2)], []]
  state = detected(detections, objects)
  assert metric().compute(state) == pytest.approx(0.5)
  values = [metric(only=i).compute(state) for i in range(3)]
  np.testing.assert_allclose(values, [1, 0, np.nan], rtol=1e-9)


def test_detections_on_images_without_objects_are_wrong():
  objects, right = [[(*BOXES[0], 0)], []], [(*BOXES[0], 0.5, 0)]
  assert metric().compute(detected([right, [(*BOXES[1], 0.9, 0)]], objects)) == pytest.approx(0.5)


@pytest.mark.parametrize("objects, mask", [
    ([[], []], [True, True]),
    ([[(*BOXES[0], 0)], []], [False, True]),
    ([[(0, 0, 0, 0, 0)], []], [True, True]),  # what a missing label is replaced by
])
def test_no_object_is_nan(objects, mask):
  state = detected([[(*BOXES[0], 0.9, 0)], []], objects, mask)
  assert np.isnan(metric().compute(state)) and np.isnan(metric(only=0).compute(state))


def test_images_that_do_not_count_change_nothing():
  state = random_detected(0)
  mask = np.arange(20) % 3 > 0
  few = Detected(*(x[mask] for x in state))
  assert metric().compute(state._replace(mask=mask)) == metric().compute(few)


@pytest.mark.parametrize("levels", [None, 3])
def test_order_and_batches_do_not_matter(levels):
  state = random_detected(1, levels=levels)
  whole = metric().compute(state)
  assert 0.2 < whole < 0.9
  rng = np.random.default_rng(0)
  for cut in (1, 7, 19):
    order = rng.permutation(20)
    a, b = (Detected(*(x[part] for x in state)) for part in (order[:cut], order[cut:]))
    assert metric().compute(metric().merge(a, b)) == whole


def test_nothing_is_printed(capsys):
  metric().compute(random_detected(0))
  assert capsys.readouterr() == ("", "")


def test_it_knows_its_kind():
  assert metric().gathered and metric().higher_is_better and metric().unit == "fraction"
