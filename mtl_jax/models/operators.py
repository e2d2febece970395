"""Convolution and max-pooling that are fast on CPUs as well, with any derivative and under vmap.

On accelerators these are XLA's own. On CPUs XLA has three weak points. A convolution is fast there
only in canonical form, `NHWC, HWIO -> NHWC` with no kernel reversed; XLA brings gradients into it
in a program's outermost computation only, so that in a loop or a branch they are many times slower.
The gradient of a kernel has the whole batch as the channels of one convolution, which leaves the
cache. And the gradient of max-pooling is a scatter.

A convolution, the gradient of its input and that of its kernel are derivatives of one trilinear
form <convolution(x, kernel), cotangent>. Here each is a primitive, canonical from the start, and
all transposes and derivatives of the three are among the three.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
import jax.numpy as jnp

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_PACKET = 4  # channels that are read at once; fewer are read one by one
_EXAMPLES = 8  # of a slice of the batch, in the gradient of a kernel
_POSITIONS = 512  # of a slice's maps, at least; small maps are sliced more coarsely


def conv(lhs: jax.Array, rhs: jax.Array, window_strides: Sequence[int],
         padding: str | Sequence[tuple[int, int]], lhs_dilation: Sequence[int] | None = None,
         rhs_dilation: Sequence[int] | None = None, dimension_numbers: Any = None,
         feature_group_count: int = 1, precision: Any = None) -> jax.Array:
  """What `lax.conv_general_dilated` returns, for `nn.Conv(…, conv_general_dilated=conv)`.

  Faster on CPUs for two-dimensional convolutions of float maps [B, H, W, C] with kernels
  [h, w, C, D], without groups and dilation; everything else goes to `lax.conv_general_dilated`.

  Args:
    lhs: maps [B, H, W, C].
    rhs: kernel [h, w, C, D].
    window_strides: of the rows and columns.
    padding: "SAME", "VALID" or ((above, below), (left, right)) in pixels.
    lhs_dilation: of the maps.
    rhs_dilation: of the kernel.
    dimension_numbers: the layout.
    feature_group_count: number of groups.
    precision: of the products.

  Returns:
    Maps [B, H', W', D].

  >>> x, kernel = jnp.arange(9.0).reshape(1, 3, 3, 1), jnp.ones((2, 2, 1, 1))
  >>> conv(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))[0, :, :, 0]
  Array([[ 8., 12.],
         [20., 24.]], dtype=float32)
  """
  dilated = any(d != 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
  plain = feature_group_count == 1 and precision is None and not dilated
  if jax.default_backend() == "cpu" and plain and _maps_and_kernel(lhs, rhs, dimension_numbers):
    if isinstance(padding, str):
      padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
    window = _Window(image=lhs.shape[1:3], kernel=rhs.shape[:2], strides=tuple(window_strides),
                     padding=tuple((int(low), int(high)) for low, high in padding))
    if min(window.out) > 0:
      return _forward_p.bind(lhs, rhs, window=window)
  return lax.conv_general_dilated(
      lhs, rhs, window_strides, padding, lhs_dilation=lhs_dilation, rhs_dilation=rhs_dilation,
      dimension_numbers=dimension_numbers, feature_group_count=feature_group_count,
      precision=precision)


Conv = functools.partial(nn.Conv, conv_general_dilated=conv)
"""`nn.Conv` with `conv`; its parameters, their names and their initial values are the same."""


def _maps_and_kernel(x: jax.Array, kernel: jax.Array, layout: Any) -> bool:
  """Whether these are float arrays of four known, positive sizes in the canonical layout."""
  if x.ndim != 4 or kernel.ndim != 4:
    return False
  sizes = (*x.shape[1:], *kernel.shape)
  return (x.dtype == kernel.dtype and jnp.issubdtype(x.dtype, jnp.floating)
          and x.shape[3] == kernel.shape[2] and 0 not in x.shape
          and all(isinstance(size, int) and size > 0 for size in sizes)
          and lax.conv_dimension_numbers(x.shape, kernel.shape, layout)
          == lax.conv_dimension_numbers(x.shape, kernel.shape, _LAYOUT))


@dataclasses.dataclass(frozen=True)
class _Window:
  """How a kernel (rows, columns) moves over images (rows, columns)."""

  image: tuple[int, int]
  kernel: tuple[int, int]
  strides: tuple[int, int]
  padding: tuple[tuple[int, int], tuple[int, int]]

  @property
  def out(self) -> tuple[int, ...]:
    """Rows and columns of the output."""
    return tuple((image + sum(pad) - kernel) // stride + 1 for image, kernel, stride, pad in
                 zip(self.image, self.kernel, self.strides, self.padding))

  @property
  def pointwise(self) -> bool:
    """Whether the convolution is a matrix product at every position, or every few."""
    return self.kernel == (1, 1) and self.padding == ((0, 0), (0, 0))

  @property
  def reach(self) -> tuple[int, ...]:
    """From the first to the last position of the kernel, in rows and columns of the image."""
    return tuple((out - 1) * stride + 1 for out, stride in zip(self.out, self.strides))


def _forward(x: jax.Array, kernel: jax.Array, *, window: _Window) -> jax.Array:
  """[B, H, W, C], [h, w, C, D] -> [B, H', W', D]."""
  if window.pointwise:
    return _dot(_positions(x, window), kernel[0, 0])
  return _canonical(x, kernel, window.strides, window.padding)


def _input_gradient(ct: jax.Array, kernel: jax.Array, *, window: _Window) -> jax.Array:
  """[B, H', W', D], [h, w, C, D] -> [B, H, W, C]."""
  if window.pointwise:
    holes = [(0, image - reach, stride - 1) for image, reach, stride in
             zip(window.image, window.reach, window.strides)]
    at_positions = _dot(ct, kernel[0, 0].T)
    return lax.pad(at_positions, jnp.zeros((), ct.dtype), [(0, 0, 0), *holes, (0, 0, 0)])
  pads = []
  for image, size, reach, (low, _) in zip(window.image, window.kernel, window.reach,
                                          window.padding):
    pads.append((size - 1 - low, image + low - reach))
  mirrored = kernel[::-1, ::-1].swapaxes(2, 3)
  return _canonical(ct, mirrored, (1, 1), pads, lhs_dilation=window.strides)


def _kernel_gradient(x: jax.Array, ct: jax.Array, *, window: _Window) -> jax.Array:
  """[B, H, W, C], [B, H', W', D] -> [h, w, C, D]; summed in float32 or better."""
  dtype = _sum_dtype(x)
  if window.pointwise:
    x = _positions(x, window).reshape(-1, x.shape[3])
    return _dot(x.T, ct.reshape(-1, ct.shape[3])).reshape(1, 1, x.shape[1], -1)
  pads = [(low, size + reach - 1 - image - low) for image, size, reach, (low, _) in
          zip(window.image, window.kernel, window.reach, window.padding)]

  def of(x: jax.Array, ct: jax.Array) -> jax.Array:
    # The cotangent is a kernel that moves over the image; examples are the channels.
    x, ct = x.transpose(3, 1, 2, 0).astype(dtype), ct.transpose(1, 2, 0, 3).astype(dtype)
    return _canonical(x, ct, (1, 1), pads, rhs_dilation=window.strides)

  total = _sum_over_slices(of, x, ct, 8 * math.ceil(
      max(_EXAMPLES, _POSITIONS / math.prod(window.out)) / 8))
  return total.transpose(1, 2, 0, 3).astype(x.dtype)


def _sum_over_slices(of: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array,
                     ct: jax.Array, size: int) -> jax.Array:
  """The sum of `of` over slices of at most `size` examples, a multiple of 8.

  A slice takes every so many-th example, so that of a batch split over devices each device has
  its part of every slice.
  """
  batch = x.shape[0]
  if not isinstance(batch, int) or batch <= size:
    return of(x, ct)
  count = math.ceil(batch / size)
  size = 8 * math.ceil(batch / (8 * count))

  def sliced(x: jax.Array) -> jax.Array:
    x = jnp.pad(x, [(0, size * count - batch)] + [(0, 0)] * 3)
    return x.reshape(size, count, *x.shape[1:])

  x, ct = sliced(x), sliced(ct)

  def one(i: jax.Array) -> jax.Array:
    return of(lax.dynamic_index_in_dim(x, i, 1, keepdims=False),
              lax.dynamic_index_in_dim(ct, i, 1, keepdims=False))

  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, 0))
  return lax.fori_loop(0, count, lambda i, total: total + one(i), zeros)


def _positions(x: jax.Array, window: _Window) -> jax.Array:
  """Where a 1x1 kernel looks: [B, H', W', C]."""
  return x[:, ::window.strides[0], ::window.strides[1]]


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """[…, N], [N, M] -> […, M], summed in float32 or better."""
  product = lax.dot_general(a, b, (((a.ndim - 1,), (0,)), ((), ())),
                            preferred_element_type=_sum_dtype(a))
  return product.astype(a.dtype)


def _sum_dtype(x: jax.Array) -> jnp.dtype:
  return x.dtype if jnp.finfo(x.dtype).bits > 32 else jnp.dtype(jnp.float32)


def _canonical(x: jax.Array, kernel: jax.Array, strides: Sequence[int],
               padding: Sequence[tuple[int, int]], lhs_dilation: Sequence[int] = (1, 1),
               rhs_dilation: Sequence[int] = (1, 1)) -> jax.Array:
  """XLA's convolution in its fast layout; a stride-1 one of few channels with zeros for more."""
  few = isinstance(x.shape[3], int) and x.shape[3] < _PACKET
  if few and tuple(strides) == tuple(lhs_dilation) == (1, 1):
    missing = _PACKET - x.shape[3]
    x = jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, missing)])
    kernel = jnp.pad(kernel, [(0, 0), (0, 0), (0, missing), (0, 0)])
  return lax.conv_general_dilated(x, kernel, strides, padding, lhs_dilation=lhs_dilation,
                                  rhs_dilation=rhs_dilation, dimension_numbers=_LAYOUT)


def _primitive(name: str, of: Callable[..., jax.Array],
               shape: Callable[[Any, Any, _Window], tuple[int, ...]],
               by_example: bool) -> Primitive:
  """A bilinear primitive that computes `of(a, b, window=window)`.

  Args:
    name: in programs.
    of: the function.
    shape: of the result, from the shapes of a and b.
    by_example: whether the result has an entry for each of `a`.
  """
  primitive = Primitive(name)
  primitive.def_impl(jax.jit(of, static_argnames="window"))
  primitive.def_abstract_eval(
      lambda a, b, *, window: jax.core.ShapedArray(shape(a.shape, b.shape, window), a.dtype))
  mlir.register_lowering(primitive, mlir.lower_fun(of, multiple_results=False))

  def batched(args: Sequence[jax.Array], axes: Sequence[int | None], *,
              window: _Window) -> tuple[jax.Array, int]:
    a, b = (x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(args, axes))
    if axes[1] is not None and axes[0] is not None:
      return lax.map(lambda pair: primitive.bind(*pair, window=window), (a, b)), 0
    if axes[0] is None:
      return lax.map(lambda b: primitive.bind(a, b, window=window), b), 0
    if by_example and isinstance(a.shape[1], int) and a.shape[1] < _EXAMPLES:
      result = primitive.bind(a.reshape(-1, *a.shape[2:]), b, window=window)
      return result.reshape(*a.shape[:2], *result.shape[1:]), 0
    # A large batch in one piece leaves the cache, and one split over devices would have to move.
    return lax.map(lambda a: primitive.bind(a, b, window=window), a), 0

  batching.primitive_batchers[primitive] = batched
  return primitive


_forward_p = _primitive(
    "conv", _forward, lambda x, kernel, window: (x[0], *window.out, kernel[3]), by_example=True)
_input_gradient_p = _primitive(
    "conv_input_gradient", _input_gradient,
    lambda ct, kernel, window: (ct[0], *window.image, kernel[2]), by_example=True)
_kernel_gradient_p = _primitive(
    "conv_kernel_gradient", _kernel_gradient,
    lambda x, ct, window: (*window.kernel, x[3], ct[3]), by_example=False)

ad.defbilinear(_forward_p,
               lambda ct, x, kernel, **how: _input_gradient_p.bind(ct, kernel, **how),
               lambda ct, x, kernel, **how: _kernel_gradient_p.bind(x, ct, **how))
ad.defbilinear(_input_gradient_p,
               lambda x, ct, kernel, **how: _forward_p.bind(x, kernel, **how),
               lambda x, ct, kernel, **how: _kernel_gradient_p.bind(x, ct, **how))
ad.defbilinear(_kernel_gradient_p,
               lambda kernel, x, ct, **how: _input_gradient_p.bind(ct, kernel, **how),
               lambda kernel, x, ct, **how: _forward_p.bind(x, kernel, **how))


def max_pool(x: jax.Array, window: tuple[int, int], strides: tuple[int, int] = (1, 1),
             padding: str | Sequence[tuple[int, int]] = "VALID") -> jax.Array:
  """What `nn.max_pool` returns: the maximum of each window.

  The gradient goes to the first maximum of a window, row by row, as in XLA.

  Args:
    x: maps [B, H, W, C].
    window: rows and columns.
    strides: of the rows and columns.
    padding: "SAME", "VALID" or ((above, below), (left, right)) in pixels.

  Returns:
    Maps [B, H', W', C].

  >>> x = jnp.array([[3.0, 1.0, 5.0, 5.0]]).reshape(1, 1, 4, 1)
  >>> max_pool(x, (1, 2), (1, 2)).ravel().tolist()
  [3.0, 5.0]
  >>> jax.grad(lambda x: max_pool(x, (1, 2), (1, 2)).sum())(x).ravel().tolist()
  [1.0, 0.0, 1.0, 0.0]
  """
  if jax.default_backend() != "cpu" or x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
    return nn.max_pool(x, window, strides, padding)
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
  return _max_pool(x, _Window(image=x.shape[1:3], kernel=tuple(window), strides=tuple(strides),
                              padding=tuple((int(low), int(high)) for low, high in padding)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _max_pool(x: jax.Array, window: _Window) -> jax.Array:
  return nn.max_pool(x, window.kernel, window.strides, window.padding)


@_max_pool.defjvp
def _max_pool_jvp(window: _Window, primals: tuple[jax.Array],
                  tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
  (x,), (dx,) = primals, tangents
  y = _max_pool(x, window)
  count = math.prod(window.kernel)
  if window.kernel == window.strides and window.padding == ((0, 0), (0, 0)) and count <= 256:
    return y, _at_first(_windows(x, window), _windows(dx, window))
  dy, found = jnp.zeros_like(y), jnp.zeros(y.shape, bool)
  for value, change in zip(_window_values(x, window, -jnp.inf), _window_values(dx, window, 0.0)):
    first = (value == y) & ~found
    dy, found = dy + jnp.where(first, change, jnp.zeros_like(dy)), found | first
  return y, dy


def _windows(x: jax.Array, window: _Window) -> jax.Array:
  """Windows that touch and do not overlap: [B, H', h, W', w, C]."""
  (rows, columns), (height, width) = window.out, window.kernel
  x = x[:, :rows * height, :columns * width]
  return x.reshape(x.shape[0], rows, height, columns, width, x.shape[3])


def _at_first(x: jax.Array, dx: jax.Array) -> jax.Array:
  """Of each window [B, H', h, W', w, C] the entry of dx at the first maximum of x."""
  height, width = x.shape[2], x.shape[4]
  best, place = x[:, :, 0, :, 0], jnp.zeros_like(x[:, :, 0, :, 0], jnp.uint8)
  for n in range(1, height * width):
    value = x[:, :, n // width, :, n % width]
    place = jnp.where(value > best, jnp.uint8(n), place)
    best = jnp.maximum(best, value)
  # One comparison with all places: transposed, it is a single pass over the gradient.
  places = jnp.arange(height * width, dtype=jnp.uint8).reshape(1, 1, height, 1, width, 1)
  first = place[:, :, None, :, None] == places
  return jnp.where(first, dx, jnp.zeros_like(dx)).sum((2, 4))


def _window_values(x: jax.Array, window: _Window, fill: float) -> list[jax.Array]:
  """The first, second, … value of all windows, row by row: each [B, H', W', C]."""
  batch, _, _, channels = x.shape
  places = [(i, j) for i in range(window.kernel[0]) for j in range(window.kernel[1])]
  x = lax.pad(x, jnp.asarray(fill, x.dtype),
              [(0, 0, 0), *((*pad, 0) for pad in window.padding), (0, 0, 0)])
  return [lax.slice(x, (0, i, j, 0),
                    (batch, i + window.reach[0], j + window.reach[1], channels),
                    (1, *window.strides, 1)) for i, j in places]
