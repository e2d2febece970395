"""PyTorch's weight files without PyTorch, and without what else a pickle could do.

A `.pth` file as torch has written it since version 1.6 is a zip archive: `data.pkl`, a pickle that
says how to put tensors together, and one file of bytes a storage. We let the pickle name what
puts a tensor together, our own versions of it, and nothing else.
"""

from collections.abc import Callable, Mapping
import math
import pathlib
import pickle
from typing import Any
import zipfile

import jax.numpy as jnp
import numpy as np

from mtl_jax.errors import UserError, reason

_STORAGES = {"BFloat16Storage": jnp.bfloat16, "BoolStorage": np.bool_, "ByteStorage": np.uint8,
             "CharStorage": np.int8, "DoubleStorage": np.float64, "FloatStorage": np.float32,
             "HalfStorage": np.float16, "IntStorage": np.int32, "LongStorage": np.int64,
             "ShortStorage": np.int16}


def read_state_dict(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of a `state_dict` by name.

  Raises:
    UserError: for a file of another format, of another content than named tensors, or whose pickle
      names anything but what tensors are put together of.
  """
  if not zipfile.is_zipfile(path):
    raise UserError(
        f"{path}: expected a zip archive, as torch.save writes since torch 1.6; found another "
        "format\nwhere torch is, convert it: python -c \"import torch; torch.save(torch.load("
        f"'{path.name}', weights_only=True), '{path.stem}_zip.pth')\"")
  try:
    with zipfile.ZipFile(path) as archive:
      found = _load(archive)
  except (_Refused, OSError) as error:
    raise UserError(f"{path}: {error}") from error
  except Exception as error:  # damage, and malice, show in many types
    raise UserError(f"{path}: expected tensors as torch.save writes them, found: {reason(error)}"
                    ) from error
  if not found or not all(isinstance(name, str) and isinstance(x, np.ndarray)
                          for name, x in found.items()):
    keys = ", ".join(str(name)[:40] for name in list(found)[:4])
    raise UserError(f"{path}: expected tensors by name, found {keys or 'none'}; save "
                    "model.state_dict() alone")
  return found


class _Refused(Exception):
  """Something that no file of weights needs."""


def _load(archive: zipfile.ZipFile) -> dict[Any, Any]:
  names = archive.namelist()
  pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
  if len(pickles) != 1:
    raise _Refused("expected one data.pkl in the archive, as torch.save writes; "
                   f"found {', '.join(names[:4])}")
  folder = pickles[0].removesuffix("data.pkl")
  if folder + "byteorder" in names and archive.read(folder + "byteorder") != b"little":
    raise _Refused("expected little-endian numbers, found others; save the file anew on a "
                   "little-endian machine")
  with archive.open(pickles[0]) as file:
    found = _Unpickler(file, archive, folder).load()
  if not isinstance(found, dict):
    raise _Refused(f"expected tensors by name, found a {type(found).__name__}; save "
                   "model.state_dict() alone")
  return dict(dict.items(found))  # whatever the pickle made of its methods


class _Unpickler(pickle.Unpickler):
  """Knows tensors, their storages and dictionaries, and refuses every other name."""

  def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str):
    super().__init__(file)
    self._archive, self._folder = archive, folder
    self._known = _names()

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) in self._known:
      return self._known[module, name]
    raise _Refused(f"expected tensors alone, found a pickle that asks for {module}.{name}, which "
                   "could run anything; nothing of it was run\nwhere torch is and the file is "
                   "trusted, save model.state_dict() alone")

  def persistent_load(self, pid: Any) -> np.ndarray:
    kind, storage, key, _, count = pid
    if kind != "storage" or storage not in _STORAGES or type(count) is not int:
      raise _Refused(f"expected a storage of numbers, found {kind!r} of {storage!r}")
    dtype = np.dtype(_STORAGES[storage])
    member = self._archive.getinfo(f"{self._folder}data/{key}")
    if member.file_size != count * dtype.itemsize or member.compress_type != zipfile.ZIP_STORED:
      raise _Refused(f"storage {key}: expected {count * dtype.itemsize} bytes as they are, found "
                     f"{member.file_size}")
    return np.frombuffer(self._archive.read(member), dtype)


def _names() -> Mapping[tuple[str, str], Any]:
  """What a pickle may ask for; made anew each time, as a pickle can set attributes of it."""
  class Tensors(dict):
    """Stands for OrderedDict; what torch hangs on it besides its items is dropped."""

    def __setstate__(self, state: Any) -> None:
      del state

  def tensor(storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...],
             *rest: Any) -> np.ndarray:
    del rest  # whether it wants gradients, hooks, metadata
    return _view(storage, offset, shape, strides)

  def parameter(data: np.ndarray, *rest: Any) -> np.ndarray:
    del rest
    return data

  functions: dict[str, Callable[..., Any]] = {"_rebuild_tensor_v2": tensor,
                                              "_rebuild_parameter": parameter}
  return {("collections", "OrderedDict"): Tensors,
          **{("torch._utils", name): function for name, function in functions.items()},
          **{("torch", name): name for name in _STORAGES}}


def _view(storage: np.ndarray, offset: int, shape: tuple[int, ...],
          strides: tuple[int, ...]) -> np.ndarray:
  """The tensor of that shape whose strides count elements, copied out of its storage."""
  numbers = (offset, *shape, *strides)
  sound = len(shape) == len(strides) and all(type(x) is int and x >= 0 for x in numbers)
  end = offset + sum((n - 1) * stride for n, stride in zip(shape, strides)) if sound else 0
  if not sound or math.prod(shape) > len(storage) or (math.prod(shape) and end >= len(storage)):
    raise _Refused(f"expected tensors within their storages of numbers, found one of shape "
                   f"{list(shape)} in {len(storage)} numbers")
  if not math.prod(shape):
    return np.zeros(shape, storage.dtype)
  return np.lib.stride_tricks.as_strided(
      storage[offset:], shape, [stride * storage.itemsize for stride in strides]).copy()
