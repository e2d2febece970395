"""Residual adapters: one trunk, with a small linear layer of each task after every stage."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from mtl_jax.models.calling import stage_names
from mtl_jax.models.sharing.stages import run_changed


class StageAdapters(nn.Module):
  """`x + A x` on the channels that a stage gives, with A zero at the start.

  >>> import jax.numpy as jnp
  >>> variables = {"params": {"conv1": {"kernel": jnp.array([[0., 1.], [0., 0.]])}}}
  >>> StageAdapters().apply(variables, "conv1", jnp.array([[3., 4.]])).tolist()
  [[3.0, 7.0]]
  """

  @nn.compact
  def __call__(self, stage: str, x: jax.Array) -> jax.Array:
    """`x + A x` of what the stage gives, [B, …, C]; on maps a 1x1 convolution."""
    return x + nn.Dense(x.shape[-1], use_bias=False, kernel_init=nn.initializers.zeros,
                        name=stage)(x)


class Adapters(nn.Module):
  """A shared trunk with residual adapters: after every stage `x + A_t x`, a 1x1 convolution.

  The trunk is shared; the adapters belong to their tasks. At the start, when they are zero, it is
  `Hard`. Each task goes through the trunk on its own, but for the first stage.

  Attributes:
    trunk: module that names its stages.
    tasks: names of the tasks.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import models
  >>> sharing = Adapters(models.MLPTrunk(widths=(4, 3)), ("a",))
  >>> variables = sharing.init(jax.random.key(0), {"s": jnp.ones((2, 5))}, {"a": "s"}, False)
  >>> {name: x["kernel"].shape for name, x in variables["params"]["adapters_a"].items()}
  {'hidden1': (4, 4), 'features': (3, 3)}

  Reference:
    Rebuffi, Bilen, Vedaldi: Learning multiple visual domains with residual adapters. NeurIPS 2017,
    arXiv:1705.08045.

  Differences:
    The paper has an adapter after each convolution, with a BatchNorm of the domain's own; ours
    come after each stage of the trunk, and the trunk's normalisation stays shared (`task_norm` is
    the other half). Raises ValueError for a trunk that names no stages.
  """

  trunk: nn.Module
  tasks: Sequence[str]
  one_representation = False

  def __post_init__(self):
    stage_names(self.trunk, "adapters")
    super().__post_init__()

  def setup(self):
    self.adapters = {task: StageAdapters() for task in self.tasks}

  def __call__(self, images: Mapping[str, jax.Array], streams: Mapping[str, str],
               train: bool, maps: bool = False) -> dict[str, Any]:
    """Features of each task, or its maps; arguments as in `Hard`."""
    found = run_changed(self.trunk, images, streams, train,
                        lambda task, stage, x: self.adapters[task](stage, x))
    return found if maps else {task: stages["features"] for task, stages in found.items()}

  def owner(self, path: tuple[str, ...]) -> str | None:
    """Which task alone owns the parameter at `path`: that of its adapters."""
    return path[0].removeprefix("adapters_") if path[0].startswith("adapters_") else None
