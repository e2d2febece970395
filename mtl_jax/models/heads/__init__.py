"""Heads: modules from features [B, F] to one task's outputs [B, num_outputs].

A head with `reads = "maps"` gets the maps of the trunk's stages instead, `{stage: [B, h, w, c], …,
"features": [B, F]}`; one for dense prediction gives [B, H, W, num_outputs] of its field `size`, one
for detection an output a location.
"""

from mtl_jax.models.heads.detection import Detection
from mtl_jax.models.heads.fpn import SemanticFPN
from mtl_jax.models.heads.linear import Linear
from mtl_jax.models.heads.mlp import MLP
from mtl_jax.models.heads.normalized import Normalized
from mtl_jax.models.heads.pyramid import FeaturePyramid
from mtl_jax.models.heads.upsampling import Upsampling

HEADS = {
    "detection": Detection,
    "fpn": SemanticFPN,
    "linear": Linear,
    "mlp": MLP,
    "normalized": Normalized,
    "upsampling": Upsampling,
}
