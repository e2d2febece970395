"""LoRA: one trunk, to whose kernels each task adds a matrix of low rank."""

from collections.abc import Mapping
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models.sharing.own_passes import Flat, OwnPasses


class LoRA(OwnPasses):
  """Low-rank adaptation by the task: `W_t = W + α/r · D_t U_t` for every kernel W of the trunk.

  The trunk is shared, and trained as in `Hard`; the factors D (random) and U (zero at the start,
  when it is `Hard`) belong to their tasks. BatchNorm's running statistics are the task's own.

  Attributes:
    trunk: module from images to features; its parameters named "kernel" are adapted.
    tasks: names of the tasks.
    rank: r; of a kernel with fewer rows or columns, their number.
    alpha: α.

  >>> from mtl_jax import models
  >>> sharing = LoRA(models.MLPTrunk(widths=(4,)), ("a",), rank=2)
  >>> variables = sharing.init(jax.random.key(0), {"s": jnp.ones((2, 5))}, {"a": "s"}, False)
  >>> {name: x.shape for name, x in variables["params"]["own_a"]["dense1"].items()}
  {'down': (5, 2), 'up': (2, 4)}

  Reference:
    Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen: LoRA: Low-Rank Adaptation of Large Language
    Models. ICLR 2022, arXiv:2106.09685.

  Differences:
    The paper freezes W and adapts attention alone. A kernel of more than two axes is taken as a
    matrix, all axes but the last by the last as for convolutions, or the first by all others as for
    attention's queries, whichever has fewer rows and columns together. D is normal with variance
    one over its rows. Raises ValueError for fields out of range, or a
    trunk without kernels.
  """

  rank: int = 4
  alpha: float = 4.0

  def __post_init__(self):
    if self.rank < 1:
      raise ValueError(f"lora: rank: expected at least 1, found {self.rank}")
    super().__post_init__()

  def divide(self, params: Flat, state: Flat, keys: Mapping[str, jax.Array]
             ) -> tuple[Flat, dict[str, Flat]]:
    """All of the trunk's parameters, and two factors for each kernel and task."""
    kernels = {path: kernel for path, kernel in params.items() if path[-1] == "kernel"}
    if not kernels:
      raise ValueError("lora: expected a trunk with parameters named 'kernel', found "
                       f"{sorted({path[-1] for path in params})}")
    own = {}
    for task, key in keys.items():
      own[task] = {}
      for (path, kernel), one in zip(kernels.items(), jax.random.split(key, len(kernels))):
        rows, columns = matrix_shape(kernel.shape)
        rank = min(self.rank, rows, columns)
        down = jax.random.normal(one, (rows, rank), kernel.dtype) / math.sqrt(rows)
        own[task][*path[:-1], "down"] = down
        own[task][*path[:-1], "up"] = jnp.zeros((rank, columns), kernel.dtype)
    return params, own

  def join(self, shared: Flat, own: Flat) -> Flat:
    """The trunk's parameters with `α/r · D U` added to each kernel."""
    joined = dict(shared)
    for path in (path for path in own if path[-1] == "down"):
      down, up = own[path], own[*path[:-1], "up"]
      kernel = shared[*path[:-1], "kernel"]
      delta = (down @ up) * (self.alpha / down.shape[1])
      joined[*path[:-1], "kernel"] = kernel + delta.reshape(kernel.shape)
    return joined


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
  """Rows and columns of a kernel as a matrix, cut behind its first axis or before its last.

  >>> matrix_shape((3, 3, 64, 32)), matrix_shape((192, 3, 64))
  ((576, 32), (192, 192))
  """
  cuts = (len(shape) - 1, 1)
  return min(((math.prod(shape[:cut]), math.prod(shape[cut:])) for cut in cuts), key=sum)
