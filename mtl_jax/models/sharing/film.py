"""FiLM: one trunk, whose channels each task scales and shifts."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from mtl_jax.models.calling import stage_names
from mtl_jax.models.sharing.stages import run_changed


class StageAffines(nn.Module):
  """γ and β of each channel that a stage gives, which start at one and zero.

  >>> import jax.numpy as jnp
  >>> params = {"conv1_scale": jnp.array([2., 3.]), "conv1_bias": jnp.array([0., 1.])}
  >>> StageAffines().apply({"params": params}, "conv1", jnp.ones((1, 2))).tolist()
  [[2.0, 4.0]]
  """

  @nn.compact
  def __call__(self, stage: str, x: jax.Array) -> jax.Array:
    """`γ x + β` of what the stage gives, [B, …, C]."""
    scale = self.param(f"{stage}_scale", nn.initializers.ones, (x.shape[-1],))
    bias = self.param(f"{stage}_bias", nn.initializers.zeros, (x.shape[-1],))
    shape = (1,) * (x.ndim - 1) + x.shape[-1:]
    return x * scale.astype(x.dtype).reshape(shape) + bias.astype(x.dtype).reshape(shape)


class FiLM(nn.Module):
  """Feature-wise linear modulation by the task: after every stage, `γ_t x + β_t` a channel.

  The trunk is shared; γ and β belong to their tasks. At the start, when they are one and zero, it
  is `Hard`. Each task goes through the trunk on its own, but for the first stage.

  Attributes:
    trunk: module that names its stages.
    tasks: names of the tasks.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import models
  >>> sharing = FiLM(models.MLPTrunk(widths=(4, 3)), ("a",))
  >>> variables = sharing.init(jax.random.key(0), {"s": jnp.ones((2, 5))}, {"a": "s"}, False)
  >>> {name: x.shape for name, x in variables["params"]["films_a"].items()}
  ... # doctest: +NORMALIZE_WHITESPACE
  {'hidden1_scale': (4,), 'hidden1_bias': (4,), 'features_scale': (3,), 'features_bias': (3,)}

  Reference:
    Perez, Strub, de Vries, Dumoulin, Courville: FiLM: Visual Reasoning with a General Conditioning
    Layer. AAAI 2018, arXiv:1709.07871.

  Differences:
    The paper computes γ and β from a question, and applies them between a block's normalisation and
    its ReLU; here they are parameters of the task, applied after each stage of the trunk. Raises
    ValueError for a trunk that names no stages.
  """

  trunk: nn.Module
  tasks: Sequence[str]
  one_representation = False

  def __post_init__(self):
    stage_names(self.trunk, "film")
    super().__post_init__()

  def setup(self):
    self.films = {task: StageAffines() for task in self.tasks}

  def __call__(self, images: Mapping[str, jax.Array], streams: Mapping[str, str],
               train: bool, maps: bool = False) -> dict[str, Any]:
    """Features of each task, or its maps; arguments as in `Hard`."""
    found = run_changed(self.trunk, images, streams, train,
                        lambda task, stage, x: self.films[task](stage, x))
    return found if maps else {task: stages["features"] for task, stages in found.items()}

  def owner(self, path: tuple[str, ...]) -> str | None:
    """Which task alone owns the parameter at `path`: that of its γ and β."""
    return path[0].removeprefix("films_") if path[0].startswith("films_") else None
