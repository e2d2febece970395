"""PLE: own and shared experts, mixed anew after every few stages of the trunk."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models.calling import call_stages, call_together, stage_names
from mtl_jax.models.sharing import gates


class PLE(nn.Module):
  """Progressive layered extraction: levels of `CGC` over the trunk's stages.

  A level is a run of the trunk's stages; its experts are copies of that run. Each task's gate mixes
  the task's own experts with the shared ones, which its own experts of the next level read; the
  shared gate mixes all experts, which the shared ones of the next level read. So below the last
  level own experts reach all tasks, and are shared as far as balancing goes; a task owns its
  experts of the last level, and its gates of the last two. With one level it is `CGC`.

  Tasks on different streams: every example goes through all experts up to the last level, where a
  task's own experts see its own stream alone. A head that reads maps gets, of every stage, the maps
  mixed in the shares of its level.

  Attributes:
    trunk: module that names its stages, copied for every expert of every level.
    tasks: names of the tasks.
    levels: their number, at most that of the stages.
    shared_experts: number of experts a level that all tasks share.
    own_experts: number of experts a level of each task's own, possibly 0.
    gate_input: what the gates of the first level read, "stem" or "pixels", see `MMoE`; gates of
      later levels read what enters their experts, averaged over space.
    gate_entropy: strength of the penalty on the entropies of all gates, the shared ones among them,
      averaged over the examples that pass them; see `MMoE`.

  >>> import jax.numpy as jnp
  >>> from mtl_jax import models
  >>> sharing = PLE(models.MLPTrunk(widths=(4, 4, 4)), ("a",), levels=3, shared_experts=1)
  >>> variables = sharing.init(jax.random.key(0), {"s": jnp.ones((2, 5))}, {"a": "s"}, False)
  >>> [name for name in sorted(variables["params"]) if sharing.owner((name,)) == "a"]
  ['gates_a_1', 'gates_a_2', 'own_trunks_a_2_0']

  Reference:
    Tang, Liu, Zhao, Gong: Progressive Layered Extraction (PLE): A Novel Multi-Task Learning Model
    for Personalized Recommendations. RecSys 2020.

  Differences:
    The paper's levels are dense layers; ours runs of the trunk's stages. LibMTL leaves out the
    shared gate, and gives shared experts each task's own mixture. Raises ValueError for fields out
    of range, or a trunk that names no stages.
  """

  trunk: nn.Module
  tasks: Sequence[str]
  levels: int = 2
  shared_experts: int = 2
  own_experts: int = 1
  gate_input: str = "stem"
  gate_entropy: float = 0.0
  one_representation = False

  def __post_init__(self):
    stages = stage_names(self.trunk, "ple")
    gates.check_count("ple", "levels", self.levels)
    gates.check_count("ple", "shared_experts", self.shared_experts)
    gates.check_count("ple", "own_experts", self.own_experts, least=0)
    gates.check_gate_input("ple", self.gate_input)
    if self.levels > len(stages):
      raise ValueError(f"ple: levels: expected at most {len(stages)}, one a stage of the trunk, "
                       f"found {self.levels}")
    super().__post_init__()

  def setup(self):
    def copies(count):
      return [[self.trunk.clone(parent=None, name=None) for _ in range(count)]
              for _ in range(self.levels)]
    reach = self.own_experts + self.shared_experts
    self.trunks = copies(self.shared_experts)
    self.own_trunks = {task: copies(self.own_experts) for task in self.tasks}
    self.gate_features = gates.GateInput(self.gate_input)
    self.gates = {task: [nn.Dense(reach) for _ in range(self.levels)] for task in self.tasks}
    self.shared_gates = [nn.Dense(len(self.tasks) * self.own_experts + self.shared_experts)
                         for _ in range(self.levels - 1)]

  def __call__(self, images: Mapping[str, jax.Array], streams: Mapping[str, str],
               train: bool, maps: bool = False) -> dict[str, Any]:
    """Features of each task, or its maps, mixed level by level; arguments as in `Hard`."""
    found = {task: OrderedDict() for task in streams}
    entering, entering_shared = {task: images for task in self.tasks}, images
    for level, stages in enumerate(split(self.trunk.stages, self.levels)):
      last = level == self.levels - 1
      if last:
        entering = {task: {stream: entering[task][stream]} for task, stream in streams.items()}

      def outputs(trunks, inputs, stages=stages):
        return [call_together(lambda x: call_stages(trunk, stages, x, train), inputs)  # noqa: B023
                for trunk in trunks]
      shared = outputs(self.trunks[level], entering_shared)
      own = {task: outputs(self.own_trunks[task][level], x) for task, x in entering.items()}
      mixed = {task: self._mixed(level, self.gates[task][level], x, own[task] + shared, train)
               for task, x in entering.items()}
      if not last:
        everyone = [output for outputs_of in own.values() for output in outputs_of] + shared
        leaving = self._mixed(level, self.shared_gates[level], entering_shared, everyone, train)
        entering_shared = {stream: x[stages[-1]] for stream, x in leaving.items()}
        entering = {task: {stream: x[stages[-1]] for stream, x in by_stream.items()}
                    for task, by_stream in mixed.items()}
      for task, stream in streams.items():
        found[task] |= mixed[task][stream]
    return found if maps else {task: stages["features"] for task, stages in found.items()}

  def _mixed(self, level: int, gate: Callable[[jax.Array], jax.Array],
             inputs: Mapping[str, jax.Array],
             outputs: Sequence[Mapping[str, Any]], train: bool) -> dict[str, Any]:
    """For each stream, the experts' maps in the shares that a gate gives them."""
    weights = {}
    for stream, x in inputs.items():
      read = self.gate_features(x) if level == 0 else x.mean(axis=tuple(range(1, x.ndim - 1)))
      weights[stream] = gates.softmax_gate(gate(read))
    gates.sow_entropy(self, "gate_entropy", self.gate_entropy,
                      jnp.concatenate(list(weights.values())), train)
    return {stream: gates.mix(shares, [out[stream] for out in outputs])
            for stream, shares in weights.items()}

  def owner(self, path: tuple[str, ...]) -> str | None:
    """Which task alone owns the parameter at `path`: where the way to other tasks has ended."""
    name = path[0]
    if name.startswith("own_trunks_"):
      task, level, _ = name.removeprefix("own_trunks_").rsplit("_", 2)
      return task if int(level) == self.levels - 1 else None
    if name.startswith("gates_"):
      task, level = name.removeprefix("gates_").rsplit("_", 1)
      return task if int(level) >= self.levels - 2 else None
    return None


def split(stages: Sequence[str], parts: int) -> list[Sequence[str]]:
  """Stages cut in runs whose lengths differ by at most one, later ones the longer.

  >>> split(("conv1", "conv2", "features"), 2)
  [('conv1',), ('conv2', 'features')]
  """
  cuts = [i * len(stages) // parts for i in range(parts + 1)]
  return [stages[start:end] for start, end in zip(cuts, cuts[1:])]
