"""The table of sources, and what stands in for one that cannot be had."""

from mtl_jax.data import cifar, coco, folders
from mtl_jax.data.source import Source

SOURCES = {
    "cifar10": cifar.cifar10,
    "cifar100": cifar.cifar100,
    "coco": coco.coco,
    "image_folder": folders.image_folder,
}


SAMPLES = ("cifar10", "cifar100")  # those that the bundled sample can stand for


def sample(name: str) -> Source:
  """The bundled sample in the schema of the named source."""
  from mtl_jax.data import sample as digits
  return digits.digits(name)
