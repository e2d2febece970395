"""One call of a module for the inputs of several streams or tasks."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def together(call: Callable[[jax.Array], Any],
             inputs: Mapping[str, jax.Array]) -> dict[str, Any]:
  """What a function of a batch gives for each input; those of one shape go in one call.

  So BatchNorm sees all their examples at once, and its running statistics move once.

  Args:
    call: from [B, …] to a pytree of [B, …].
    inputs: by name, [B_n, …]; the sizes may differ.

  >>> calls = []
  >>> def double(x):
  ...   calls.append(x.shape)
  ...   return {"twice": 2 * x}
  >>> inputs = {"a": jnp.ones((1, 2)), "b": jnp.ones((1, 3)), "c": jnp.ones((2, 2))}
  >>> found = together(double, inputs)
  >>> calls, found["c"]["twice"].tolist()
  ([(3, 2), (1, 3)], [[2.0, 2.0], [2.0, 2.0]])
  """
  found = {}
  for shape in dict.fromkeys(x.shape[1:] for x in inputs.values()):
    group = [name for name, x in inputs.items() if x.shape[1:] == shape]
    joined = call(jnp.concatenate([inputs[name] for name in group]))
    ends, start = [], 0
    for name in group:
      start += inputs[name].shape[0]
      ends.append(start)
    leaves, structure = jax.tree.flatten(joined)
    parts = zip(*(jnp.split(leaf, ends[:-1]) for leaf in leaves))
    found |= {name: jax.tree.unflatten(structure, part) for name, part in zip(group, parts)}
  return found
