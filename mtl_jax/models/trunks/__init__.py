"""Trunks: modules from images [B, H, W, C] to features [B, F]."""

from mtl_jax.models.trunks.cnn import CNN
from mtl_jax.models.trunks.resnet import ResNet, resnet18

TRUNKS = {
    "cnn": CNN,
    "resnet18": resnet18,
}
