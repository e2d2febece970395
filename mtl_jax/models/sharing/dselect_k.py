"""DSelect-k: gates that pick k of the experts, and are smooth all the same."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.models.calling import call_together, call_trunk
from mtl_jax.models.sharing import gates


def smooth_step(t: jax.Array, gamma: float) -> jax.Array:
  """A step from 0 to 1 of width `gamma`: 0 up to -γ/2, 1 from γ/2, between them a cubic.

  >>> smooth_step(jnp.array([-0.5, 0.0, 0.25, 0.5]), gamma=1.0).tolist()
  [0.0, 0.5, 0.84375, 1.0]
  >>> smooth_step(jnp.array([-0.5, 0.0, 0.25, 0.5]), gamma=0.5).tolist()
  [0.0, 0.5, 1.0, 1.0]
  """
  t = jnp.clip(t / gamma, -0.5, 0.5)
  return 0.5 + 1.5 * t - 2.0 * t ** 3


def selections(codes: jax.Array, experts: int, gamma: float) -> jax.Array:
  """Shares [..., k, E] of the experts, of which those of each selector sum to one.

  Each selector has a code of as many bits as the number of an expert; an expert's share is the
  product over the bits of how far they are its own. Numbers beyond the last expert count from the
  first one again.

  Args:
    codes: [..., k, bits]; a bit is 1 from γ/2, and 0 up to -γ/2.
    experts: E.
    gamma: the width of the step between the two.

  >>> selections(jnp.array([[1.0, -1.0], [1.0, 1.0]]), experts=3, gamma=1.0).tolist()
  [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
  """
  bits = codes.shape[-1]
  numbers = np.arange(2 ** bits)
  is_one = (numbers[:, None] >> np.arange(bits)[::-1]) % 2 == 1  # [2^bits, bits]
  ones = jnp.broadcast_to(smooth_step(codes, gamma)[..., None, :],
                          (*codes.shape[:-1], *is_one.shape))
  shares = jnp.where(jnp.broadcast_to(is_one, ones.shape), ones, 1.0 - ones).prod(axis=-1)
  return shares[..., :experts].at[..., :len(numbers) - experts].add(shares[..., experts:])


class DSelectGate(nn.Module):
  """Weights of E experts of which at most k are not zero, once the bits of all codes are decided.

  Attributes:
    experts: E.
    k: number of selectors.
    gamma: width of the smooth step.
    entropy: strength of the penalty "selector_entropy" in training, where the gate reads something.
  """

  experts: int
  k: int
  gamma: float
  entropy: float = 0.0

  @nn.compact
  def __call__(self, read: jax.Array | None, train: bool = False) -> jax.Array:
    """Weights [B, E] from what the gate reads [B, D]; [1, E] where it reads nothing."""
    bits = math.ceil(math.log2(self.experts))
    near_zero, small = _around_zero(self.gamma / 100), _around_zero(0.05)
    if read is None:
      codes = self.param("codes", near_zero, (self.k, bits))[None]
      logits = self.param("logits", small, (self.k,))[None]
    else:
      codes = nn.Dense(self.k * bits, kernel_init=near_zero, bias_init=near_zero,
                       name="codes")(read).reshape(-1, self.k, bits)
      logits = nn.Dense(self.k, kernel_init=small, bias_init=small, name="logits")(read)
    picked = selections(codes.astype(jnp.float32), self.experts, self.gamma)
    if read is not None:
      gates.sow_entropy(self, "selector_entropy", self.entropy, picked, train)
    return (gates.softmax_gate(logits)[..., None] * picked).sum(axis=1)


def _around_zero(scale: float) -> nn.initializers.Initializer:
  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -scale, scale)
  return init


class DSelectK(nn.Module):
  """A mixture of experts as `MMoE`, with gates that pick k of them.

  A gate has k selectors, mixed by a softmax; each has a code of ⌈log₂ E⌉ bits, made of logits by
  a smooth step, and the code is an expert's number. A bit whose logit has left the step's slope is
  0 or 1 exactly, so that experts come to have no weight at all.

  Attributes:
    trunk: module from images to features, copied for every expert.
    tasks: names of the tasks.
    experts: their number E.
    k: selectors of each gate, and so the largest number of experts that a task ends with.
    gamma: width of the smooth step; the wider, the longer gates stay undecided.
    entropy: strength of the penalty "selector_entropy" on the entropy of each selector's shares,
      summed over selectors and tasks, which makes their codes decide sooner; where gates read the
      examples, averaged over the batch.
    gate_input: what the gates read: "nothing", so that a task has the same weights for all
      examples; or "stem" or "pixels" as in `MMoE`, with weights for each example.
    gate_entropy: strength of the penalty on the entropies of the gates' weights, in which selectors
      are mixed; see `MMoE`.

  >>> from mtl_jax import models
  >>> sharing = DSelectK(models.MLPTrunk(widths=(4,)), ("a",), experts=4, k=1, entropy=0.5)
  >>> {name: round(float(x), 3) for name, x in sharing.penalties(  # 0.5 · log 4
  ...     {"gates_a": {"codes": jnp.zeros((1, 2)), "logits": jnp.zeros(1)}}).items()}
  {'selector_entropy': 0.693}

  Reference:
    Hazimeh, Zhao, Chowdhery, Sathiamoorthy, Chen, Mazumder, Hong, Chi: DSelect-k: Differentiable
    Selection in the Mixture of Experts with Applications to Multi-Task Learning. NeurIPS 2021,
    arXiv:2106.03760.

  Differences:
    Where E is no power of two some codes are no expert's: the official code lets weights sum to
    less than one and adds a penalty against such codes; here these codes stand for the first
    experts again, and weights sum to one always. LibMTL ignores its γ, and its entropy never
    reaches the gradient. The penalty "gate_entropy" is ours. Raises ValueError for fields out of
    range.
  """

  trunk: nn.Module
  tasks: Sequence[str]
  experts: int = 4
  k: int = 2
  gamma: float = 1.0
  entropy: float = 0.0
  gate_input: str = "nothing"
  gate_entropy: float = 0.0
  one_representation = False

  def __post_init__(self):
    gates.check_count("dselect_k", "experts", self.experts, least=2)
    gates.check_gate_input("dselect_k", self.gate_input, ("nothing", *gates.GATE_INPUTS))
    if not 1 <= self.k <= self.experts:
      raise ValueError(f"dselect_k: k: expected 1 to {self.experts}, the number of experts, "
                       f"found {self.k}")
    if self.gamma <= 0:
      raise ValueError(f"dselect_k: gamma: expected a number > 0, found {self.gamma}")
    if self.entropy < 0:
      raise ValueError(f"dselect_k: entropy: expected a number >= 0, found {self.entropy}")
    super().__post_init__()

  def setup(self):
    self.trunks = [self.trunk.clone(parent=None, name=None) for _ in range(self.experts)]
    self.gates = {task: DSelectGate(self.experts, self.k, self.gamma, self.entropy)
                  for task in self.tasks}
    if self.gate_input != "nothing":
      self.gate_features = gates.GateInput(self.gate_input)

  def __call__(self, images: Mapping[str, jax.Array], streams: Mapping[str, str],
               train: bool, maps: bool = False) -> dict[str, Any]:
    """Features of each task, or its maps, mixed from the experts'; arguments as in `Hard`."""
    outputs = [call_together(lambda x, t=trunk: call_trunk(t, x, train, maps), images)
               for trunk in self.trunks]
    mixed = {}
    for task, stream in streams.items():
      x = images[stream]
      read = None if self.gate_input == "nothing" else self.gate_features(x)
      weights = self.gates[task](read, train)
      gates.sow_entropy(self, "gate_entropy", self.gate_entropy, weights, train)
      weights = jnp.broadcast_to(weights, (x.shape[0], self.experts))
      mixed[task] = gates.mix(weights, [output[stream] for output in outputs])
    return mixed

  def owner(self, path: tuple[str, ...]) -> str | None:
    """Which task alone owns the parameter at `path`: that of its gate."""
    return path[0].removeprefix("gates_") if path[0].startswith("gates_") else None

  def penalties(self, params: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What is added to the loss, by name: `entropy` times that of all selectors' shares.

    Where gates read the examples it depends on them, and their passes tell.

    Args:
      params: of this module.
    """
    if not self.entropy or self.gate_input != "nothing":
      return {}
    total = sum(gates.entropy(selections(params[f"gates_{task}"]["codes"], self.experts, self.gamma))
                for task in self.tasks)
    return {"selector_entropy": self.entropy * total}
