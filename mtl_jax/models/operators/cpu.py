"""What convolutions and dense layers are computed by on CPUs, where XLA has weak points.

A convolution is fast there only in canonical form, `NHWC, HWIO -> NHWC` with no kernel reversed;
XLA brings gradients into it in a program's outermost computation only, so that in a loop or a
branch they are many times slower. The gradient of a kernel has the whole batch as the channels of
one convolution, which leaves the cache; so does a map that is pooled at once. A convolution reads
the three colours of an image one by one. And a product reads a tall transposed matrix slowly.

All of these functions go to and from maps [B, H', W', D] or, where they are given the places of
first maxima, to and from pools [B, H'', W'', D].
"""

from collections.abc import Sequence
import math

import jax
from jax import lax
import jax.numpy as jnp

from mtl_jax.models.operators.max_pooling import (NOWHERE, at_places, first_maxima, to_places,
                                                  windows)
from mtl_jax.models.operators.slices import add_slices, map_slices, sum_slices
from mtl_jax.models.operators.window import Window

LAYOUT = ("NHWC", "HWIO", "NHWC")
EXAMPLES = 16  # of a slice of the batch, at least
_POSITIONS = 512  # of a slice's maps, at least; small maps are sliced more coarsely
_SMALL = 256  # positions of a map; more than eight of larger maps, as one kernel, leave the cache
_AT_ONCE = 2**15  # positions of maps, at most, in slices side by side
_PACKET = 4  # channels that are read at once; fewer are read one by one


def block(x: jax.Array, kernel: jax.Array, bias: jax.Array,
           *, window: Window) -> tuple[jax.Array, jax.Array]:
  """Convolution, bias, ReLU and max-pooling, [B, H'', W'', D], and the places of first maxima."""
  def of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Bias and ReLU are monotone: after the maximum they are less work.
    maxima, place = first_maxima(_values(x, kernel, window))
    maxima += bias[None, None, None]
    return jnp.maximum(maxima, 0), jnp.where(maxima > 0, place, jnp.uint8(NOWHERE))
  return map_slices(of, _slice(window), x, at_once=_slices_at_once(window))


def shift(bias: jax.Array, place: jax.Array, *, window: Window) -> jax.Array:
  """The bias [D] wherever there is a place, [B, H'', W'', D]."""
  del window
  return jnp.where(place != NOWHERE, bias[None, None, None], jnp.zeros((), bias.dtype))


def bias_gradient(ct: jax.Array, place: jax.Array, *, window: Window) -> jax.Array:
  """[B, H'', W'', D] -> [D]; summed in float32 or better."""
  def of(ct: jax.Array, place: jax.Array) -> jax.Array:
    # Sums of columns are slow. Halves are added in vectors until there is one example.
    felt = jnp.where(place.astype(ct.dtype) != NOWHERE, ct, jnp.zeros((), ct.dtype))
    felt = felt.astype(_sum_dtype(ct))
    while isinstance(felt.shape[0], int) and felt.shape[0] % 2 == 0:
      half = felt.shape[0] // 2
      felt = felt[:half] + felt[half:]
    return felt.sum(0)
  return sum_slices(of, _slice(window), ct, place).sum((0, 1)).astype(ct.dtype)


def forward(x: jax.Array, kernel: jax.Array, *place: jax.Array, window: Window) -> jax.Array:
  """[B, H, W, C], [h, w, C, D] -> [B, H', W', D], or [B, H'', W'', D] at places."""
  if not place:
    return _map(x, kernel, window)
  return map_slices(lambda x, place: at_places(_values(x, kernel, window), place),
                    _slice(window), x, *place)


def forward_onto(x: jax.Array, kernel: jax.Array, place: jax.Array, total: jax.Array,
                 *, window: Window) -> jax.Array:
  """What `forward` gives at places, added to the total [B, H'', W'', D] in its memory."""
  return add_slices(lambda x, place: at_places(_values(x, kernel, window), place),
                    _slice(window), total, x, place)


def input_gradient(ct: jax.Array, kernel: jax.Array, *place: jax.Array,
                   window: Window) -> jax.Array:
  """[B, H', W', D], [h, w, C, D] -> [B, H, W, C]."""
  if not place:
    return _map_gradient(ct, kernel, window)
  return map_slices(lambda ct, place: _map_gradient(_unpooled(ct, place, window), kernel, window),
                    _slice(window), ct, *place, at_once=_slices_at_once(window))


def kernel_gradient(x: jax.Array, ct: jax.Array, *place: jax.Array, window: Window) -> jax.Array:
  """[B, H, W, C], [B, H', W', D] -> [h, w, C, D]; summed in float32 or better."""
  dtype = _sum_dtype(x)
  if place and _in_blocks(window, x.shape[3]):
    return _kernel_gradient_in_blocks(x, ct, *place, window=window)
  if window.pointwise and not place:
    x = _positions(x, window).reshape(-1, x.shape[3]).T
    if isinstance(x.shape[1], int) and x.shape[1] < x.shape[0]:
      # A copy is read faster, and made once for a loop over many cotangents.
      x = lax.optimization_barrier(x)
    return _dot(x, ct.reshape(-1, ct.shape[3])).reshape(1, 1, x.shape[0], -1)
  pads = [(low, size + reach - 1 - image - low) for image, size, reach, (low, _) in
          zip(window.image, window.kernel, window.reach, window.padding)]

  def of(x: jax.Array, ct: jax.Array, *place: jax.Array) -> jax.Array:
    # The cotangent is a kernel that moves over the image; examples are the channels.
    x, ct = x.transpose(3, 1, 2, 0).astype(dtype), ct.transpose(1, 2, 0, 3).astype(dtype)
    if place:
      ct = _unpooled(ct, place[0].transpose(1, 2, 0, 3), window, rows=0)
    return _canonical(x, ct, (1, 1), pads, rhs_dilation=window.strides)

  size = 8 if math.prod(window.out) > _SMALL else _slice(window)
  total = sum_slices(of, size, x, ct, *place, at_once=2)
  return total.transpose(1, 2, 0, 3).astype(x.dtype)


def _slice(window: Window) -> int:
  """Examples of a slice, a multiple of 8."""
  return 8 * math.ceil(max(EXAMPLES, _POSITIONS / math.prod(window.out)) / 8)


def _slices_at_once(window: Window) -> int:
  """Slices of maps side by side, so that a core that waits for one of them goes on with another."""
  positions = _slice(window) * math.prod(window.out)
  return next((count for count in (4, 2) if count * positions <= _AT_ONCE), 1)


def _map(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
  """The convolution [B, H', W', D]."""
  if window.pointwise:
    return _dot(_positions(x, window), kernel[0, 0])
  return _canonical(x, kernel, window.strides, window.padding)


def _map_gradient(ct: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
  """The gradient of its input, [B, H, W, C]."""
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


def _positions(x: jax.Array, window: Window) -> jax.Array:
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
                                  rhs_dilation=rhs_dilation, dimension_numbers=LAYOUT)


def _unpooled(ct: jax.Array, place: jax.Array, window: Window, rows: int = 1) -> jax.Array:
  """Cotangents of pools at their places in the map: [B, H', W', D], or [H', W', B, D]."""
  sides = [n * size for n, size in zip(window.pooled, window.pool)]
  x = to_places(ct, place, window.pool, rows)
  x = x.reshape(*ct.shape[:rows], *sides, *ct.shape[rows + 2:])
  rest = [(0, out - side) for out, side in zip(window.out, sides)]
  return jnp.pad(x, [(0, 0)] * rows + rest + [(0, 0)] * (2 - rows))


def _values(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
  """All pools' values, [B, H'', h, W'', w, D] or, each pool's in a row, [B, H'', 1, W'', hw, D]."""
  if not _in_blocks(window, x.shape[3]):
    return windows(_map(x, kernel, window), window.pool)
  values = _canonical(_blocks(x, window), _kernels(kernel, window), (1, 1), ((0, 0), (0, 0)))
  return values.reshape(x.shape[0], window.pooled[0], 1, window.pooled[1], -1, kernel.shape[3])


def _in_blocks(window: Window, channels: int) -> bool:
  """Whether few channels are better read in blocks: in packets, for more products.

  A pool's values are products of the part of the image under all of them, blocks as large as the
  pool, with the kernel at every place of the pool.
  """
  rows, columns = (pool * n for pool, n in zip(window.pool, _blocks_of_pool(window)))
  return (window.strides == (1, 1) and channels < _PACKET
          and rows * columns * channels <= 2 * math.prod(window.kernel) * _PACKET)


def _blocks_of_pool(window: Window) -> list[int]:
  return [math.ceil((size + pool - 1) / pool) for size, pool in zip(window.kernel, window.pool)]


def _blocks(x: jax.Array, window: Window) -> jax.Array:
  """Images [B, H, W, C] as blocks of the pool's size, as channels: [B, rows, columns, hwC]."""
  counts = [n + more - 1 for n, more in zip(window.pooled, _blocks_of_pool(window))]
  pads = [(low, count * pool - low - image, 0) for image, count, pool, (low, _) in
          zip(window.image, counts, window.pool, window.padding)]
  x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
  (rows, columns), (height, width) = counts, window.pool
  x = x.reshape(x.shape[0], rows, height, columns, width, x.shape[3])
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], rows, columns, -1)


def _kernels(kernel: jax.Array, window: Window) -> jax.Array:
  """The kernel [h, w, C, D] at each place of a pool, for blocks: [rows, columns, …C, …D]."""
  (rows, columns), (height, width) = _blocks_of_pool(window), window.pool
  rest = (rows * height - kernel.shape[0], columns * width - kernel.shape[1])
  kernels = jnp.stack([jnp.pad(kernel, [(i, rest[0] - i), (j, rest[1] - j), (0, 0), (0, 0)])
                       for i in range(height) for j in range(width)], 3)
  kernels = kernels.reshape(rows, height, columns, width, *kernels.shape[2:])
  kernels = kernels.transpose(0, 2, 1, 3, 4, 5, 6)
  return kernels.reshape(rows, columns, height * width * kernel.shape[2], -1)


def _kernel_gradient_in_blocks(x: jax.Array, ct: jax.Array, place: jax.Array,
                               window: Window) -> jax.Array:
  dtype = _sum_dtype(x)
  rows, columns = _blocks_of_pool(window)

  def of(x: jax.Array, ct: jax.Array, place: jax.Array) -> jax.Array:
    blocks = _blocks(x, window)
    under = jnp.concatenate([blocks[:, i:i + window.pooled[0], j:j + window.pooled[1]]
                             for i in range(rows) for j in range(columns)], 3)
    ct = to_places(ct, place, (1, math.prod(window.pool)))
    return lax.dot(under.reshape(-1, under.shape[3]).T,
                   ct.reshape(-1, ct.shape[4] * ct.shape[5]), preferred_element_type=dtype)

  total = sum_slices(of, _slice(window), x, ct, place)
  kernel = jax.ShapeDtypeStruct((*window.kernel, x.shape[3], ct.shape[3]), dtype)
  kernels = jax.eval_shape(lambda kernel: _kernels(kernel, window), kernel)
  total, = jax.linear_transpose(lambda kernel: _kernels(kernel, window), kernel)(
      total.reshape(kernels.shape))
  return total.astype(x.dtype)
