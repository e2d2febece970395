"""Convolutions as primitives, so that their derivatives are as fast as they are.

A convolution, the gradient of its input and that of its kernel are derivatives of one trilinear
form <convolution(x, kernel), cotangent>. Here each is a primitive, and all transposes and
derivatives of the three are among the three. Where the convolution is followed by ReLU and
max-pooling, the form sees of each window the entry at one place, where its first maximum is, or
nothing where the ReLU cuts it off. The places go with the operands, so that a map before its
pooling is only ever in memory for a slice of the batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
import jax.numpy as jnp

from mtl_jax.models.operators import cpu
from mtl_jax.models.operators.window import Window


def conv(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
  """[B, H, W, C], [h, w, C, D] -> [B, H', W', D]."""
  return _forward_p.bind(x, kernel, window=window)


def conv_relu_max_pool(x: jax.Array, kernel: jax.Array, bias: jax.Array,
                       window: Window) -> jax.Array:
  """[B, H, W, C], [h, w, C, D], [D] -> [B, H'', W'', D], the maxima of the window's pools."""
  return _block_p.bind(x, kernel, bias, window=window)[0]


def _primitive(name: str, of: Callable[..., Any], shape: Callable[[Any, Any, Window], Any],
               by_example: bool = False, several: bool = False) -> Primitive:
  """A primitive that computes `of(a, b, …, window=window)`.

  Args:
    name: in programs.
    of: the function.
    shape: of the result, or what it is if there are several, from the first two operands.
    by_example: whether the result has an entry for each of `a`, and of no other operand.
    several: whether there are several results.
  """
  primitive = Primitive(name)
  primitive.multiple_results = several
  mlir.register_lowering(primitive, mlir.lower_fun(of, multiple_results=several))
  primitive.def_impl(jax.jit(of, static_argnames="window"))
  primitive.def_abstract_eval(lambda a, b, *_, window: (
      shape(a, b, window) if several else
      jax.core.ShapedArray(shape(a.shape, b.shape, window), a.dtype)))

  def batched(args: Sequence[jax.Array], axes: Sequence[int | None], *,
              window: Window) -> tuple[Any, Any]:
    args = [x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(args, axes)]
    moved = [i for i, axis in enumerate(axes) if axis is not None]

    def one(slices: Sequence[jax.Array]) -> Any:
      operands = list(args)
      for i, x in zip(moved, slices):
        operands[i] = x
      return primitive.bind(*operands, window=window)
    a, b = args[:2]
    if (by_example and len(args) == 2 and moved == [0] and isinstance(a.shape[1], int)
        and a.shape[1] < cpu.EXAMPLES):
      found = primitive.bind(a.reshape(-1, *a.shape[2:]), b, window=window)
      found = jax.tree.map(lambda x: x.reshape(*a.shape[:2], *x.shape[1:]), found)
    else:
      # A large batch in one piece leaves the cache, and one split over devices would have to move.
      found = lax.map(one, [args[i] for i in moved])
    return found, jax.tree.map(lambda _: 0, found)

  batching.primitive_batchers[primitive] = batched
  return primitive


def _maxima_and_places(x: Any, kernel: Any, window: Window) -> list[Any]:
  shape = (x.shape[0], *window.pooled, kernel.shape[3])
  return [jax.core.ShapedArray(shape, x.dtype), jax.core.ShapedArray(shape, jnp.uint8)]


_forward_p = _primitive(
    "conv", cpu.forward,
    lambda x, kernel, window: (x[0], *window.pooled, kernel[3]), by_example=True)
_onto_p = _primitive("conv_onto", cpu.forward_onto,
                     lambda x, kernel, window: (x[0], *window.pooled, kernel[3]))
_input_gradient_p = _primitive(
    "conv_input_gradient", cpu.input_gradient,
    lambda ct, kernel, window: (ct[0], *window.image, kernel[2]), by_example=True)
_kernel_gradient_p = _primitive(
    "conv_kernel_gradient", cpu.kernel_gradient,
    lambda x, ct, window: (*window.kernel, x[3], ct[3]))
_shift_p = _primitive("conv_shift", cpu.shift, lambda bias, place, window: place)
_bias_gradient_p = _primitive("conv_bias_gradient", cpu.bias_gradient,
                              lambda ct, place, window: ct[3:])
_block_p = _primitive("conv_relu_max_pool", cpu.block, _maxima_and_places, several=True)


def _linear(primitive: Primitive, *transposes: Callable[..., jax.Array]) -> None:
  """Says that a primitive is linear in each of its first operands.

  Args:
    primitive: the primitive.
    *transposes: for each of these operands, from a cotangent of the result and the other operands
      to the operand's cotangent.
  """
  def jvp(primals: Sequence[jax.Array], tangents: Sequence[Any],
          **how: Any) -> tuple[jax.Array, jax.Array]:
    changes = [primitive.bind(*primals[:i], tangent, *primals[i + 1:], **how)
               for i, tangent in enumerate(tangents[:len(transposes)])
               if type(tangent) is not ad.Zero]
    return primitive.bind(*primals, **how), sum(changes[1:], changes[0])

  def transpose(ct: Any, *operands: Any, **how: Any) -> list[Any]:
    of, = (i for i, x in enumerate(operands) if ad.is_undefined_primal(x))
    if type(ct) is ad.Zero:
      found = ad.Zero(operands[of].aval)
    else:
      found = transposes[of](ct, *operands[:of], *operands[of + 1:], **how)
    return [found if i == of else None for i in range(len(operands))]

  ad.primitive_jvps[primitive] = jvp
  ad.primitive_transposes[primitive] = transpose


_linear(_forward_p,
        lambda ct, kernel, *place, **how: _input_gradient_p.bind(ct, kernel, *place, **how),
        lambda ct, x, *place, **how: _kernel_gradient_p.bind(x, ct, *place, **how))
_linear(_input_gradient_p,
        lambda x, kernel, *place, **how: _forward_p.bind(x, kernel, *place, **how),
        lambda x, ct, *place, **how: _kernel_gradient_p.bind(x, ct, *place, **how))
_linear(_kernel_gradient_p,
        lambda kernel, ct, *place, **how: _input_gradient_p.bind(ct, kernel, *place, **how),
        lambda kernel, x, *place, **how: _forward_p.bind(x, kernel, *place, **how))
_linear(_shift_p, lambda ct, place, **how: _bias_gradient_p.bind(ct, place, **how))
_linear(_bias_gradient_p, lambda bias, place, **how: _shift_p.bind(bias, place, **how))


def _onto_jvp(primals: Sequence[jax.Array], tangents: Sequence[Any],
              **how: Any) -> tuple[jax.Array, jax.Array]:
  return _onto_p.bind(*primals, **how), _change(*primals[:3], *tangents[:2], tangents[3], **how)


def _onto_transpose(ct: Any, x: Any, kernel: Any, place: jax.Array, total: Any,
                    **how: Any) -> list[Any]:
  """It is linear in the total and, together with that, in one of the first two operands."""
  if type(ct) is ad.Zero:
    return [ad.Zero(operand.aval) if ad.is_undefined_primal(operand) else None
            for operand in (x, kernel, place, total)]
  return [_input_gradient_p.bind(ct, kernel, place, **how) if ad.is_undefined_primal(x) else None,
          _kernel_gradient_p.bind(x, ct, place, **how) if ad.is_undefined_primal(kernel) else None,
          None, ct if ad.is_undefined_primal(total) else None]


ad.primitive_jvps[_onto_p] = _onto_jvp
ad.primitive_transposes[_onto_p] = _onto_transpose


def _block_jvp(primals: Sequence[jax.Array], tangents: Sequence[Any],
               **how: Any) -> tuple[list[jax.Array], list[Any]]:
  maxima, place = _block_p.bind(*primals, **how)
  dx, dkernel, dbias = tangents
  shift = dbias if type(dbias) is ad.Zero else _shift_p.bind(dbias, place, **how)
  change = _change(*primals[:2], place, dx, dkernel, shift, **how)
  return [maxima, place], [change, ad.Zero(jax.core.ShapedArray(place.shape, jax.dtypes.float0))]


def _change(x: jax.Array, kernel: jax.Array, place: jax.Array, dx: Any, dkernel: Any, change: Any,
            **how: Any) -> Any:
  """Adds to a change what tangents of the images and the kernel change at places."""
  for operands in ((dx, kernel), (x, dkernel)):
    if any(type(operand) is ad.Zero for operand in operands):
      continue
    if type(change) is ad.Zero:
      change = _forward_p.bind(*operands, place, **how)
    else:
      change = _onto_p.bind(*operands, place, change, **how)
  return change


ad.primitive_jvps[_block_p] = _block_jvp
