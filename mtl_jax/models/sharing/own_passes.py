"""A pass of the trunk for each task, with parameters of which some are shared and some its own."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
import jax

from mtl_jax.models.calling import call_trunk

Flat = dict[tuple[str, ...], jax.Array]  # parameters by path


class OwnPasses(nn.Module):
  """What `LoRA` and `TaskNorm` have in common.

  Shared parameters lie under "trunk", those of a task under "own_<task>", and there the other
  variables of its passes, such as BatchNorm's running statistics: they are those of the network
  that the task sees. A subclass says how the trunk's parameters come about, all of them by path:
  `divide(params, state, keys) -> (shared, {task: own})` from those of a fresh trunk, its other
  variables and a random key for each task; and `join(shared, own) -> params` for one task.

  Attributes:
    trunk: module from images to features.
    tasks: names of the tasks.
  """

  trunk: nn.Module
  tasks: Sequence[str]
  one_representation = False

  def setup(self):
    self.own = {task: self.trunk.clone(parent=None, name=None) for task in self.tasks}

  def __call__(self, images: Mapping[str, jax.Array], streams: Mapping[str, str],
               train: bool, maps: bool = False) -> dict[str, Any]:
    """Features of each task, or its maps, by its own pass; arguments as in `Hard`."""
    if self.is_initializing():
      self._start(next(iter(images.values())), maps)
    shared = flatten_dict(self.trunk.variables["params"])
    found = {}
    for task, stream in streams.items():
      own = flatten_dict(self.own[task].variables.get("params", {}))
      params = unflatten_dict(self.join(shared, own))
      run = nn.map_variables(lambda trunk, x: call_trunk(trunk, x, train, maps), "params",
                             trans_in_fn=lambda _: {"params": params})  # noqa: B023
      found[task] = run(self.own[task], images[stream])
    return found

  def _start(self, images: jax.Array, maps: bool) -> None:
    """Puts fresh parameters in their places."""
    fresh = self.trunk.clone(parent=None, name=None).init(
        self.make_rng("params"), images, False, maps, method=call_trunk)
    params = flatten_dict(fresh["params"])
    state = flatten_dict({name: tree for name, tree in fresh.items() if name != "params"})
    keys = {task: self.make_rng("params") for task in self.tasks}
    shared, own = self.divide(params, state, keys)
    places = [(self.trunk, shared), *((self.own[task], own[task]) for task in self.tasks)]
    for module, flat in places:
      for name, tree in unflatten_dict(flat).items():
        module.put_variable("params", name, tree)

  def owner(self, path: tuple[str, ...]) -> str | None:
    """Which task alone owns the parameter at `path`: that whose own it is."""
    return path[0].removeprefix("own_") if path[0].startswith("own_") else None
