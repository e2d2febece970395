"""Augmentation and normalisation of image batches, inside the compiled step."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np


def crop(images: jax.Array, key: jax.Array, padding: int = 4) -> jax.Array:
  """Random crops of the original size out of images padded by reflection: [B, H, W, C]."""
  b, h, w, c = images.shape
  padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)),
                   mode="reflect")
  corners = jax.random.randint(key, (b, 2), 0, 2 * padding + 1)
  return jax.vmap(lambda image, corner: jax.lax.dynamic_slice(
      image, (corner[0], corner[1], 0), (h, w, c)))(padded, corners)


def shift(images: jax.Array, key: jax.Array) -> jax.Array:
  """Random shifts by up to two pixels: small crops, for images whose content nears the border."""
  return crop(images, key, padding=2)


def flip(images: jax.Array, key: jax.Array) -> jax.Array:
  """Mirrors each image left to right with probability one half."""
  mirrored = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
  return jnp.where(mirrored, images[:, :, ::-1], images)


AUGMENTATIONS = {
    "crop": crop,
    "flip": flip,
    "shift": shift,
}


def augment(images: jax.Array, key: jax.Array, names: Sequence[str]) -> jax.Array:
  """Applies the named augmentations in order, each with its own randomness."""
  for i, name in enumerate(names):
    images = AUGMENTATIONS[name](images, jax.random.fold_in(key, i))
  return images


def channel_statistics(images: np.ndarray) -> Mapping[str, tuple[float, ...]]:
  """Mean and standard deviation of each channel of uint8 images, on the scale 0 … 1.

  >>> channel_statistics(np.array([[[[0]], [[255]]]], np.uint8))
  {'mean': (0.5,), 'std': (0.5,)}
  """
  counts = [np.bincount(images[..., c].reshape(-1), minlength=256)
            for c in range(images.shape[-1])]
  levels = np.arange(256) / 255.0
  mean = [float(count @ levels / count.sum()) for count in counts]
  std = [float(np.sqrt(count @ (levels - m) ** 2 / count.sum())) for count, m in zip(counts, mean)]
  return {"mean": tuple(mean), "std": tuple(max(s, 1e-3) for s in std)}


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
  """uint8 images [B, H, W, C] to float32 with each channel's mean and deviation taken out."""
  scale = jnp.asarray(std, jnp.float32).reshape(1, 1, 1, -1)
  shift_by = jnp.asarray(mean, jnp.float32).reshape(1, 1, 1, -1)
  return (images.astype(jnp.float32) / 255.0 - shift_by) / scale
