"""MMoE: all tasks share several trunks, and each task mixes them by a gate of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from mtl_jax.models.calling import call_together, call_trunk
from mtl_jax.models.sharing import gates


class MMoE(nn.Module):
  """Multi-gate mixture of experts: `z_t = Σ_e softmax(W_t g(x))_e · expert_e(x)`.

  The experts, and what the gates read, are shared; the gates belong to their tasks. A head that
  reads maps gets the experts' maps mixed in the same shares.

  Attributes:
    trunk: module from images to features, copied for every expert.
    tasks: names of the tasks.
    experts: their number E.
    gate_input: what the gates read: "stem", a small convolution; or "pixels", the input pooled to
      4x4 cells.
    gate_entropy: strength of the penalty "gate_entropy" on the gates' entropies, averaged over the
      batch and summed over tasks: above 0 gates decide sooner, below 0 they stay open.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import models
  >>> sharing = MMoE(models.MLPTrunk(widths=(4,)), ("a", "b"), experts=3)
  >>> variables = sharing.init(jax.random.key(0), {"s": jnp.ones((2, 5))}, {"a": "s", "b": "s"},
  ...                          False)
  >>> {name: sharing.owner((name,)) for name in sorted(variables["params"])}
  ... # doctest: +NORMALIZE_WHITESPACE
  {'gate_features': None, 'gates_a': 'a', 'gates_b': 'b', 'trunks_0': None, 'trunks_1': None,
   'trunks_2': None}

  Reference:
    Ma, Zhao, Yi, Chen, Hong, Chi: Modeling Task Relationships in Multi-task Learning with
    Multi-gate Mixture-of-Experts. KDD 2018.

  Differences:
    The paper's gates are linear in the input, a vector, and LibMTL's in all pixels, so that they
    grow with the images. Ours are linear in what `gate_input` says, and have a bias, as LibMTL's.
    The penalty is ours.
    Raises ValueError for fields out of range.
  """

  trunk: nn.Module
  tasks: Sequence[str]
  experts: int = 4
  gate_input: str = "stem"
  gate_entropy: float = 0.0
  one_representation = False

  def __post_init__(self):
    gates.check_count("mmoe", "experts", self.experts)
    gates.check_gate_input("mmoe", self.gate_input)
    super().__post_init__()

  def setup(self):
    self.trunks = [self.trunk.clone(parent=None, name=None) for _ in range(self.experts)]
    self.gate_features = gates.GateInput(self.gate_input)
    self.gates = {task: nn.Dense(self.experts) for task in self.tasks}

  def __call__(self, images: Mapping[str, jax.Array], streams: Mapping[str, str],
               train: bool, maps: bool = False) -> dict[str, Any]:
    """Features of each task, or its maps, mixed from the experts'; arguments as in `Hard`."""
    outputs = [call_together(lambda x, t=trunk: call_trunk(t, x, train, maps), images)
               for trunk in self.trunks]
    read = {stream: self.gate_features(x) for stream, x in images.items()}
    mixed = {}
    for task, stream in streams.items():
      weights = gates.softmax_gate(self.gates[task](read[stream]))
      gates.sow_entropy(self, "gate_entropy", self.gate_entropy, weights, train)
      mixed[task] = gates.mix(weights, [output[stream] for output in outputs])
    return mixed

  def owner(self, path: tuple[str, ...]) -> str | None:
    """Which task alone owns the parameter at `path`: that of its gate."""
    return path[0].removeprefix("gates_") if path[0].startswith("gates_") else None
