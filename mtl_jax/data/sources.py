"""The table of sources, and what stands in for one that cannot be had."""

from mtl_jax.data import (celeba, cifar, cityscapes, coco, folders, idx, multi_fashion, nyuv2,
                          scenes, tfds)
from mtl_jax.data.source import Source

SOURCES = {
    "cifar10": cifar.cifar10,
    "cifar100": cifar.cifar100,
    "tfds": tfds.tfds,
    "image_folder": folders.image_folder,
    "coco": coco.coco,
    "idx": idx.idx,
    "multi_fashion": multi_fashion.multi_fashion,
    "celeba": celeba.celeba,
    "nyuv2": nyuv2.nyuv2,
    "cityscapes": cityscapes.cityscapes,
    "digit_scenes": scenes.digit_scenes,
}


SAMPLES = ("cifar10", "cifar100")  # those that the bundled sample can stand for


def sample(name: str) -> Source:
  """The bundled sample in the schema of the named source."""
  from mtl_jax.data import sample as digits
  return digits.digits(name)
