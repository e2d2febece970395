"""Identification and verification of faces, or of whatever else has an identity."""

from collections.abc import Mapping
import math

import jax
import jax.numpy as jnp

from mtl_jax.tasks import arguments
from mtl_jax.tasks.classification import cross_entropy, is_correct
from mtl_jax.tasks.metrics import MeanMetric
from mtl_jax.tasks.task import Task
from mtl_jax.tasks.verification import PairMetric, best_threshold_accuracy, roc_auc


def identity(name: str, *, num_classes: int, loss: str = "cosface", scale: float = 30.0,
             margin: float = 0.35, most_pairs: int = 3000, stream: str | None = None,
             label: str = "identity", weight: float = 1.0) -> Task:
  """One of `num_classes` identities: softmax with a margin; accuracy, verification, ROC AUC.

  The head gives {"embedding": [B, D], "cosines": [B, num_classes]}: embeddings of unit length and
  their cosines with one direction an identity, as the head `normalized` does. The loss is
  cross-entropy of `scale` times the cosines, of which the label's is made smaller by the margin.

  `accuracy` is that of the greatest cosine. `verification_accuracy` and `roc_auc` tell pairs of
  evaluated images of one identity from pairs of two by the cosine of their embeddings; see
  `verification`. They also judge identities that are not in train (an open set). Number these as
  well, after those of train, and count them in `num_classes`: their directions get no positive
  example, so that of them `accuracy` says nothing, while the other two do. Where validation is cut
  from train, `accuracy`, which selects the checkpoint, is sound.

  Args:
    name: of the task.
    num_classes: labels are 0 … num_classes - 1, or -1 where missing.
    loss: "cosface", cos θ - margin, or "arcface", cos(θ + margin).
    scale: of the cosines; the papers take 30 and 64.
    margin: the papers take 0.35 and 0.5 (radians).
    most_pairs: of one identity, for verification; with as many of two, the 6000 of Labeled Faces
      in the Wild.
    stream: whose images it reads; the task's name when left out.
    label: key of the labels in that stream.
    weight: constant factor of the loss before any balancing.

  Raises:
    ValueError: for an unknown loss, or numbers that cannot be.

  >>> task = identity("face", num_classes=2, scale=1.0, margin=0.5)
  >>> outputs = {"embedding": jnp.ones((1, 1)), "cosines": jnp.array([[0.5, 0.]])}
  >>> [round(float(x), 4) for x in task.loss(outputs, jnp.array([0]))]  # log 2
  [0.6931]

  Reference:
    Wang, Wang, Zhou, Ji, Gong, Zhou, Li, Liu: CosFace: Large Margin Cosine Loss for Deep Face
    Recognition. CVPR 2018, arXiv:1801.09414. Deng, Guo, Xue, Zafeiriou: ArcFace: Additive Angular
    Margin Loss for Deep Face Recognition. CVPR 2019, arXiv:1801.07698.

  Differences:
    Where θ + margin is above π, the label's logit falls on along a line, as in ArcFace's code.
  """
  arguments.check(name, "num_classes", num_classes >= 2, "at least 2", num_classes)
  arguments.check_choice(name, "loss", loss, ("cosface", "arcface"))
  arguments.check(name, "scale", 0 < scale < math.inf, "a number > 0", scale)
  arguments.check(name, "margin", 0 <= margin < math.pi / 2, "a number in [0, π/2)", margin)
  arguments.check(name, "most_pairs", most_pairs >= 2, "at least 2", most_pairs)
  reduced = _less_margin if loss == "cosface" else _turned

  def losses(outputs: Mapping[str, jax.Array], labels: jax.Array) -> jax.Array:
    cosines = outputs["cosines"].astype(jnp.float32)
    own = jax.nn.one_hot(labels, num_classes, dtype=jnp.bool_)
    return cross_entropy(scale * jnp.where(own, reduced(cosines, margin), cosines), labels)

  metrics = (MeanMetric("accuracy", lambda outputs, labels: is_correct(outputs["cosines"], labels),
                        "fraction", higher_is_better=True),
             PairMetric("verification_accuracy", best_threshold_accuracy, most_pairs),
             PairMetric("roc_auc", roc_auc, most_pairs))
  return Task(name=name, stream=stream or name, label=label, loss=losses, num_outputs=num_classes,
              metrics=metrics, weight=weight)


def _less_margin(cosines: jax.Array, margin: float) -> jax.Array:
  return cosines - margin


def _turned(cosines: jax.Array, margin: float) -> jax.Array:
  """cos(θ + margin), and from θ = π - margin on a line; the sine's gradient is kept finite."""
  sines = jnp.sqrt(jnp.maximum(1 - cosines ** 2, 1e-6))
  turned = cosines * math.cos(margin) - sines * math.sin(margin)
  return jnp.where(cosines > -math.cos(margin), turned, cosines - margin * math.sin(margin))
