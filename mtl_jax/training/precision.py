"""In which numbers the model computes; losses, inner products and all state stay in float32."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

PRECISIONS = ("float32", "bfloat16")


def apply(model: nn.Module, variables: Mapping[str, Any], inputs: Any, precision: str,
          **options: Any) -> Any:
  """`model.apply(variables, inputs, **options)`, computed in the given precision.

  Under "bfloat16" parameters and inputs are rounded to it at the model's entry and its outputs are
  made float32 again, so that gradients with respect to either arrive in their own dtype. Other
  variables, such as BatchNorm's statistics, go in and come out as they are; integers are left
  alone. Norm layers take their means and variances in float32, as linen's do.

  Args:
    model: the model.
    variables: "params" and other collections.
    inputs: the argument of the method that is called, any pytree.
    precision: one of `PRECISIONS`.
    **options: of `apply`, such as `method` and `mutable`.

  Raises:
    ValueError: for an unknown precision.

  >>> layer = nn.Dense(1, use_bias=False)
  >>> variables = {"params": {"kernel": jnp.full((1, 1), 1.001)}}
  >>> for precision in PRECISIONS:
  ...   print(f"{apply(layer, variables, jnp.ones((1, 1)), precision).item():.4f}")
  1.0010
  1.0000

  Reference:
    Kalamkar et al.: A Study of BFLOAT16 for Deep Learning Training. 2019, arXiv:1905.12322.
    Micikevicius et al.: Mixed Precision Training. ICLR 2018, arXiv:1710.03740.

  Differences:
    No loss is scaled, since bfloat16 reaches as far as float32.
  """
  check_precision(precision)
  if precision == "float32":
    return model.apply(variables, inputs, **options)
  rounded = {**variables, "params": _cast(variables["params"], jnp.bfloat16)}
  # Norm layers combine float32 statistics with what they normalise, which promotes.
  with jax.numpy_dtype_promotion("standard"):
    found = model.apply(rounded, _cast(inputs, jnp.bfloat16), **options)
  if "mutable" not in options:
    return _cast(found, jnp.float32)
  outputs, state = found
  return _cast(outputs, jnp.float32), _like(state, variables)


def check_precision(precision: str) -> None:
  """Raises ValueError where the word is none of `PRECISIONS`."""
  if precision not in PRECISIONS:
    raise ValueError(f"precision: expected one of {list(PRECISIONS)}, found {precision!r}")


def _cast(tree: Any, dtype: Any) -> Any:
  """The tree with its floating-point leaves in another dtype."""
  return jax.tree.map(
      lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _like(state: Any, variables: Mapping[str, Any]) -> Any:
  """New variables in the dtypes of those before; what was not there before, in float32."""
  return {name: jax.tree.map(lambda new, old: new.astype(old.dtype), tree, variables[name])
          if name in variables else _cast(tree, jnp.float32) for name, tree in state.items()}
