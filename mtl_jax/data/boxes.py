"""Boxes of an image file: checked, clipped, and brought to where the image shows them."""

import collections

import numpy as np

from mtl_jax.data.images import Reading, follow

_SLACK = 0.01  # pixels that a box may jut out unnoticed: rounding in the file

NOT_FINITE = "box that is not four finite numbers"
NO_AREA = "box without area"
OUTSIDE = "box outside its image"
CLIPPED = "box clipped to its image"
CUT_AWAY = "box in a part that fit=crop cuts off"


def placed(boxes: np.ndarray, width: int, height: int, how: Reading
           ) -> tuple[np.ndarray, np.ndarray, collections.Counter[str]]:
  """Boxes in pixels of an original as fractions of the image that is read from it.

  >>> placed(np.array([[50., 0., 150., 60.], [9., 9., 9., 20.]]), 100, 100, Reading(32, 32))[:2]
  (array([[0.5, 0. , 1. , 0.6]], dtype=float32), array([ True, False]))

  Args:
    boxes: [N, 4] of x1, y1, x2, y2 in pixels of the original, upright.
    width: of the original.
    height: of the original.
    how: it is read.

  Returns:
    the boxes that are to be used, float32 [M, 4], within 0 … 1 and with an area; which of those
    given they are, bool [N]; and how many had what wrong.
  """
  report = collections.Counter()
  limits = np.array([width, height, width, height], np.float64)
  finite = np.isfinite(boxes).all(axis=1)
  known = np.where(finite[:, None], boxes, 0.0)
  inside = np.clip(known, 0.0, limits)
  shown = np.clip(follow(inside / limits, width, height, how), 0.0, 1.0).astype(np.float32)
  solid, within, visible = _has_area(known), _has_area(inside), _has_area(shown)
  report[NOT_FINITE] = int((~finite).sum())
  report[NO_AREA] = int((finite & ~solid).sum())
  report[OUTSIDE] = int((solid & ~within).sum())
  report[CUT_AWAY] = int((solid & within & ~visible).sum())
  usable = solid & within & visible
  report[CLIPPED] = int((usable & (np.abs(inside - known) > _SLACK).any(axis=1)).sum())
  return shown[usable], usable, report


def _has_area(boxes: np.ndarray) -> np.ndarray:
  return (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
