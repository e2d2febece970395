"""A head that finds objects: at each location of several maps a class, a box and a centre-ness."""

from collections.abc import Mapping, Sequence
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.models.heads.pyramid import FeaturePyramid, spatial_maps
from mtl_jax.models.operators import Conv

_FINEST = 4  # pixels a location of the finest level that is taken unasked
_MOST = 3  # levels that are taken unasked
_CELLS = 8  # a level's objects reach this many of its cells from a location, as in the paper
_GROUP = 8  # channels a group of the normalisation, as in the paper


class _Tower(nn.Module):
  """3x3 convolutions, each with group normalisation and ReLU: [B, h, w, C] -> [B, h, w, C]."""

  channels: int
  depth: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(self.depth):
      x = Conv(self.channels, (3, 3), name=f"conv{i + 1}")(x)
      group = math.gcd(self.channels, _GROUP)
      x = nn.relu(nn.GroupNorm(num_groups=None, group_size=group, name=f"norm{i + 1}")(x))
    return x


class Detection(nn.Module):
  """A feature pyramid, and on each of its levels the same two small towers of convolutions.

  Every location, the centre of a cell of a level, says how likely each class is, how far the sides
  of its object are and how central in it the location is.

  Attributes:
    num_outputs: number C of classes.
    channels: of the pyramid and the towers.
    depth: number of convolutions in each tower.
    stages: the trunk's stages that become levels, from fine to coarse. When left out the last
      stage of each resolution of at least 4 pixels a location, or the coarsest resolution where
      all are finer; at most the last three.
    size: (H, W) of the images in pixels, which tells how many pixels a location has; when left
      out no resolution is too fine.
    prior: probability of each class at each location before training.

  >>> maps = {"layer1": jnp.ones((2, 8, 8, 4)), "layer2": jnp.ones((2, 4, 4, 8)),
  ...         "features": jnp.ones((2, 8))}
  >>> head = Detection(num_outputs=3)
  >>> outputs, _ = jax.eval_shape(head.init_with_output, jax.random.key(0), maps)
  >>> {name: output.shape for name, output in outputs.items()}  # doctest: +NORMALIZE_WHITESPACE
  {'box': (2, 80, 4), 'centerness': (2, 80), 'class': (2, 80, 3),
   'points': (1, 80, 2), 'reach': (1, 80, 2), 'stride': (1, 80, 2)}

  Reference:
    Tian, Shen, Chen, He: FCOS: Fully Convolutional One-Stage Object Detection. ICCV 2019,
    arXiv:1904.01355.

  Differences:
    The paper has five levels of 8 to 128 pixels, 256 channels and four convolutions a tower. It
    takes the centre-ness from the tower of the classes; as in the authors' later code it comes
    from the tower of the boxes here. Distances count in cells of their level before they are
    scaled, as there, but stay exponentials as in the paper.
  """

  num_outputs: int
  channels: int = 32
  depth: int = 2
  stages: Sequence[str] | None = None
  size: Sequence[int] | None = None
  prior: float = 0.01
  reads = "maps"

  @nn.compact
  def __call__(self, maps: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What is at each of the N locations of all levels, fine levels first, each row by row.

    Args:
      maps: of the trunk, `{stage: [B, h, w, c]}`; what is of other shapes is left alone.

    Returns:
      Arrays by name; boxes are (x1, y1, x2, y2) and, like points, in fractions of the image.

      * class: [B, N, C] logits;
      * box: [B, N, 4] float32, which may reach out of the image;
      * centerness: [B, N] logits;
      * points: [1, N, 2] float32, x and y of the locations;
      * stride: [1, N, 2] float32, width and height of a cell of their level;
      * reach: [1, N, 2] float32, from how far on and up to how far the farthest side of its
        object may be, in cells of the finest level.

    Raises:
      ValueError: where there is no such stage, or no map at all.
    """
    if not 0 < self.prior < 1:
      raise ValueError(f"detection: prior: expected a probability in (0, 1), found {self.prior}")
    levels = FeaturePyramid(self.channels, levels=self._stages(maps), name="pyramid")(maps)
    class_tower = _Tower(self.channels, self.depth, name="class_tower")
    box_tower = _Tower(self.channels, self.depth, name="box_tower")
    small = nn.initializers.normal(0.01)
    rare = nn.initializers.constant(math.log(self.prior / (1 - self.prior)))
    to_class = Conv(self.num_outputs, (3, 3), kernel_init=small, bias_init=rare, name="class")
    to_box = Conv(4, (3, 3), kernel_init=small, name="box")
    to_centerness = Conv(1, (3, 3), kernel_init=small, name="centerness")

    where = {name: jnp.asarray(x)[None] for name, x in
             locations([x.shape[1:3] for x in levels.values()]).items()}
    classes, distances, centerness = [], [], []
    for stage, x in levels.items():
      seen = box_tower(x)
      classes.append(_rows(to_class(class_tower(x))))
      centerness.append(_rows(to_centerness(seen))[..., 0])
      scale = self.param(f"scale_{stage}", nn.initializers.ones, ())
      farthest = math.log(2 * max(x.shape[1:3]))  # keeps the exponential finite
      distances.append(jnp.exp(jnp.minimum(
          scale.astype(jnp.float32) * _rows(to_box(seen)).astype(jnp.float32), farthest)))
    distances = jnp.concatenate(distances, axis=1)
    boxes = jnp.concatenate([where["points"] - distances[..., :2] * where["stride"],
                             where["points"] + distances[..., 2:] * where["stride"]], axis=-1)
    return {"class": jnp.concatenate(classes, axis=1), "box": boxes,
            "centerness": jnp.concatenate(centerness, axis=1), **where}

  def _stages(self, maps: Mapping[str, jax.Array]) -> Sequence[str]:
    if self.stages is not None:
      return self.stages
    last = {x.shape[1:3]: stage for stage, x in spatial_maps("detection", maps).items()}
    sizes = sorted(last, reverse=True)
    if self.size is not None:
      coarse = [size for size in sizes if round(max(self.size) / max(size)) >= _FINEST]
      sizes = coarse or sizes[-1:]
    return [last[size] for size in sizes[-_MOST:]]


def locations(grids: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
  """The locations of levels with these grids (rows, columns), from fine to coarse.

  Returns:
    points, stride and reach, each [N, 2] float32, as in the outputs of `Detection`.

  >>> found = locations([(2, 2), (1, 1)])
  >>> found["points"].tolist()
  [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75], [0.5, 0.5]]
  >>> found["reach"][3:].tolist()
  [[0.0, 8.0], [8.0, inf]]
  """
  points, strides, reaches, nearest = [], [], [], 0.0
  for i, (rows, columns) in enumerate(grids):
    y, x = np.mgrid[:rows, :columns]
    points.append(np.stack([(x + 0.5) / columns, (y + 0.5) / rows], axis=-1).reshape(-1, 2))
    strides.append(np.full((rows * columns, 2), (1 / columns, 1 / rows)))
    cell = math.sqrt(grids[0][0] * grids[0][1] / (rows * columns))
    farthest = _CELLS * cell if i + 1 < len(grids) else math.inf
    reaches.append(np.full((rows * columns, 2), (nearest, farthest)))
    nearest = farthest
  return {name: np.concatenate(parts).astype(np.float32) for name, parts in
          (("points", points), ("stride", strides), ("reach", reaches))}


def _rows(x: jax.Array) -> jax.Array:
  """Maps [B, h, w, C] as a list of locations [B, h * w, C]."""
  return x.reshape(x.shape[0], -1, x.shape[-1])
