"""What is learned: a task is a per-example loss, its metrics, and where its labels are."""

from mtl_jax.tasks.boxes import boxes
from mtl_jax.tasks.classification import classification
from mtl_jax.tasks.depth import depth
from mtl_jax.tasks.detection import detection
from mtl_jax.tasks.identity import identity
from mtl_jax.tasks.metrics import CountMetric, MeanMetric, Metric
from mtl_jax.tasks.multilabel import multilabel
from mtl_jax.tasks.nms import detect
from mtl_jax.tasks.normals import normals
from mtl_jax.tasks.parts import filled, mean_of_parts, present
from mtl_jax.tasks.reconstruction import reconstruction
from mtl_jax.tasks.regression import regression
from mtl_jax.tasks.segmentation import segmentation
from mtl_jax.tasks.task import (Task, compute_metrics, empty_metrics, labelled, labels_of,
                                merge_metrics, task_losses, task_metrics)

KINDS = {
    "boxes": boxes,
    "classification": classification,
    "depth": depth,
    "detection": detection,
    "identity": identity,
    "multilabel": multilabel,
    "normals": normals,
    "reconstruction": reconstruction,
    "regression": regression,
    "segmentation": segmentation,
}
