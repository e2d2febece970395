"""Trunks: modules from images [B, H, W, C], or vectors [B, D], to features [B, F].

A trunk that names its `stages` (see `Trunk`) also gives their `maps`, which heads for dense
prediction and detection read. One of your own may be any module from images to features.
"""

from mtl_jax.models.trunks.cnn import CNN
from mtl_jax.models.trunks.mlp import MLPTrunk
from mtl_jax.models.trunks.resnet import ResNet, resnet18
from mtl_jax.models.trunks.trunk import Trunk
from mtl_jax.models.trunks.vit import ViT

TRUNKS = {
    "cnn": CNN,
    "mlp": MLPTrunk,
    "resnet": ResNet,
    "resnet18": resnet18,
    "vit": ViT,
}
