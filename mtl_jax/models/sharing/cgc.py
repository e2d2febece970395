"""CGC: trunks that all tasks share, trunks of each task, and a gate of each among what it sees."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from mtl_jax.models.calling import call_together, call_trunk
from mtl_jax.models.sharing import gates


class CGC(nn.Module):
  """Customized gate control: each task mixes its own experts and the shared ones.

  The shared experts, and what the gates read, are shared; own experts and gates belong to their
  tasks. Without own experts it is `MMoE`, parameter by parameter. A head that reads maps gets the
  experts' maps mixed in the same shares.

  Attributes:
    trunk: module from images to features, copied for every expert.
    tasks: names of the tasks.
    shared_experts: number of experts that all tasks share.
    own_experts: number of experts of each task's own, possibly 0.
    gate_input: what the gates read, "stem" or "pixels"; see `MMoE`.
    gate_entropy: strength of the penalty on the gates' entropies; see `MMoE`.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import models
  >>> sharing = CGC(models.MLPTrunk(widths=(4,)), ("a", "b"), shared_experts=1)
  >>> variables = sharing.init(jax.random.key(0), {"s": jnp.ones((2, 5))}, {"a": "s", "b": "s"},
  ...                          False)
  >>> {name: sharing.owner((name,)) for name in sorted(variables["params"])}
  ... # doctest: +NORMALIZE_WHITESPACE
  {'gate_features': None, 'gates_a': 'a', 'gates_b': 'b', 'own_trunks_a_0': 'a',
   'own_trunks_b_0': 'b', 'trunks_0': None}

  Reference:
    Tang, Liu, Zhao, Gong: Progressive Layered Extraction (PLE): A Novel Multi-Task Learning Model
    for Personalized Recommendations. RecSys 2020.

  Differences:
    As for `MMoE`, gates read what `gate_input` says, and have a bias. All tasks have the same
    number of own experts. Raises ValueError for fields out of range.
  """

  trunk: nn.Module
  tasks: Sequence[str]
  shared_experts: int = 2
  own_experts: int = 1
  gate_input: str = "stem"
  gate_entropy: float = 0.0
  one_representation = False

  def __post_init__(self):
    gates.check_count("cgc", "shared_experts", self.shared_experts)
    gates.check_count("cgc", "own_experts", self.own_experts, least=0)
    gates.check_gate_input("cgc", self.gate_input)
    super().__post_init__()

  def setup(self):
    def copies(count):
      return [self.trunk.clone(parent=None, name=None) for _ in range(count)]
    self.trunks = copies(self.shared_experts)
    self.own_trunks = {task: copies(self.own_experts) for task in self.tasks}
    self.gate_features = gates.GateInput(self.gate_input)
    self.gates = {task: nn.Dense(self.own_experts + self.shared_experts) for task in self.tasks}

  def __call__(self, images: Mapping[str, jax.Array], streams: Mapping[str, str],
               train: bool, maps: bool = False) -> dict[str, Any]:
    """Features of each task, or its maps, mixed from experts; arguments as in `Hard`."""
    shared = [call_together(lambda x, t=trunk: call_trunk(t, x, train, maps), images)
              for trunk in self.trunks]
    read = {stream: self.gate_features(x) for stream, x in images.items()}
    mixed = {}
    for task, stream in streams.items():
      own = [call_trunk(trunk, images[stream], train, maps) for trunk in self.own_trunks[task]]
      weights = gates.softmax_gate(self.gates[task](read[stream]))
      gates.sow_entropy(self, "gate_entropy", self.gate_entropy, weights, train)
      mixed[task] = gates.mix(weights, [*own, *(output[stream] for output in shared)])
    return mixed

  def owner(self, path: tuple[str, ...]) -> str | None:
    """Which task alone owns the parameter at `path`: that of its gate or of its own expert."""
    if path[0].startswith("own_trunks_"):
      return path[0].removeprefix("own_trunks_").rsplit("_", 1)[0]
    return path[0].removeprefix("gates_") if path[0].startswith("gates_") else None
