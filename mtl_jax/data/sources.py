"""The table of sources, and what stands in for one that cannot be had."""

from mtl_jax.data import cifar, scenes
from mtl_jax.data.source import Source

SOURCES = {
    "cifar10": cifar.cifar10,
    "cifar100": cifar.cifar100,
    "digit_scenes": scenes.digit_scenes,
}


def sample(name: str) -> Source:
  """The bundled sample in the schema of the named source."""
  from mtl_jax.data import sample as digits
  return digits.digits(name)
