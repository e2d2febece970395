"""Heads: modules from features [B, F] to one task's outputs [B, num_outputs]."""

from mtl_jax.models.heads.detection import Detection
from mtl_jax.models.heads.linear import Linear
from mtl_jax.models.heads.mlp import MLP
from mtl_jax.models.heads.pyramid import FeaturePyramid

HEADS = {
    "detection": Detection,
    "linear": Linear,
    "mlp": MLP,
}
