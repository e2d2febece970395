"""Arrays of all examples out of those read one by one; what is known of pixels at another size."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures

import numpy as np


def stacked(first: Mapping[str, np.ndarray], size: int,
            read: Callable[[Sequence[int]], Iterable[Mapping[str, np.ndarray]]],
            chunk: int = 1) -> Mapping[str, np.ndarray]:
  """The arrays of all examples, read by several threads.

  >>> stacked({"square": np.int32(0)}, 4, lambda rows: [{"square": row ** 2} for row in rows])
  {'square': array([0, 1, 4, 9], dtype=int32)}

  Args:
    first: an example, which all the others have the shapes and types of.
    size: how many there are.
    read: from some indices to their examples.
    chunk: how many are read in one go.
  """
  columns = {name: np.empty((size, *value.shape), value.dtype) for name, value in first.items()}

  def fill(start: int) -> None:
    indices = range(start, min(start + chunk, size))
    for index, example in zip(indices, read(indices)):
      for name, value in example.items():
        columns[name][index] = value

  with futures.ThreadPoolExecutor() as pool:
    list(pool.map(fill, range(0, size, chunk)))
  return columns


def nearest(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Pixels at another size, each the one of the original that its centre lies in.

  >>> nearest(np.array([[1, 2, 3, 4]]), (2, 2)).tolist()
  [[2, 4], [2, 4]]

  Args:
    pixels: [H, W, …].
    size: height and width of the result.
  """
  rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new)
                   for old, new in zip(pixels.shape[:2], size))
  return pixels[rows[:, None], columns]
