"""What is learned: a task is a per-example loss, its metrics, and where its labels are."""

from mtl_jax.tasks.classification import classification
from mtl_jax.tasks.detection import detection
from mtl_jax.tasks.metrics import MeanMetric, Metric
from mtl_jax.tasks.nms import detect
from mtl_jax.tasks.task import (Task, compute_metrics, labelled, labels_of, merge_metrics,
                                present, task_losses, task_metrics)

KINDS = {
    "classification": classification,
    "detection": detection,
}
