"""How a kernel moves over images."""

from collections.abc import Sequence
import dataclasses

from jax import lax


@dataclasses.dataclass(frozen=True)
class Window:
  """How a kernel (rows, columns) moves over images (rows, columns), and what is pooled after it.

  Attributes:
    image: size of the images.
    kernel: size of the kernel.
    strides: from one position of the kernel to the next.
    padding: zeros before and after the rows and the columns.
    pool: size of the windows of the output, side by side, that are pooled.
  """

  image: tuple[int, int]
  kernel: tuple[int, int]
  strides: tuple[int, int]
  padding: tuple[tuple[int, int], tuple[int, int]]
  pool: tuple[int, int] = (1, 1)

  @property
  def out(self) -> tuple[int, ...]:
    """Rows and columns of the output, before it is pooled."""
    return tuple((image + sum(pad) - kernel) // stride + 1 for image, kernel, stride, pad in
                 zip(self.image, self.kernel, self.strides, self.padding))

  @property
  def pooled(self) -> tuple[int, ...]:
    """Rows and columns of the pooled output; a rest at the edge is left out."""
    return tuple(out // pool for out, pool in zip(self.out, self.pool))

  @property
  def pointwise(self) -> bool:
    """Whether the convolution is a matrix product at every position, or every few."""
    return self.kernel == (1, 1) and self.padding == ((0, 0), (0, 0))

  @property
  def reach(self) -> tuple[int, ...]:
    """From the first to the last position of the kernel, in rows and columns of the image."""
    return tuple((out - 1) * stride + 1 for out, stride in zip(self.out, self.strides))


def window_of(image: Sequence[int], kernel: Sequence[int], strides: Sequence[int],
              padding: str | Sequence[tuple[int, int]], pool: Sequence[int] = (1, 1)) -> Window:
  """A window whose padding may be in words, "SAME" or "VALID"."""
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(image, kernel, strides, padding)
  return Window(image=tuple(image), kernel=tuple(kernel), strides=tuple(strides),
                padding=tuple((int(low), int(high)) for low, high in padding), pool=tuple(pool))
