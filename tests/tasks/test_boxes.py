"""One box an image, against values computed by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import tasks

MIDDLE = [[0.0, 0.0, 0.0, 0.0]]  # the box 0.25, 0.25, 0.75, 0.75


@pytest.mark.parametrize("loss, label, expected", [
    ("iou", [0, 0, 1, 1], 1 - 1 / 4),
    ("giou", [0, 0, 1, 1], 1 - 1 / 4),
    ("diou", [0, 0, 1, 1], 1 - 1 / 4),
    ("l1", [0, 0, 1, 1], 1 / 4),
    ("iou", [0.5, 0.25, 1, 0.75], 1 - 1 / 3),
    ("giou", [0.5, 0.25, 1, 0.75], 1 - 1 / 3),
    ("diou", [0.5, 0.25, 1, 0.75], 1 - 1 / 3 + (1 / 16) / (9 / 16 + 4 / 16)),
    ("l1", [0.5, 0.25, 1, 0.75], 1 / 8),
])
def test_losses_by_hand(loss, label, expected):
  task = tasks.boxes("t", loss=loss)
  found = task.loss(jnp.array(MIDDLE), jnp.array([label], jnp.float32))
  np.testing.assert_allclose(found, [expected], rtol=1e-6)


def test_metrics_by_hand():
  labels = np.array([[0.25, 0.25, 0.75, 0.75], [0.25, 0.25, 0.75, 0.5], [0, 0, 1, 1],
                     [np.nan] * 4], np.float32)  # IoU 1, 1/2, 1/4
  task = tasks.boxes("t")
  states = tasks.task_metrics((task,), {"t": jnp.zeros((4, 4))}, {"t": {"box": labels}})
  found = tasks.compute_metrics((task,), states)
  np.testing.assert_allclose(found["t/iou"], 1.75 / 3, rtol=1e-6)
  assert found["t/hit_rate_50"] == 2 / 3 and found["t/hit_rate_75"] == 1 / 3
