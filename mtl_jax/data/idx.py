"""IDX files, the format of MNIST and of the sets made after it (Fashion-MNIST, KMNIST, EMNIST).

A folder holds four of them, gzipped or not: `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`
and the same for test, `t10k-…` or `test-…`. A dot instead of a dash before "idx", a prefix such as
EMNIST's `emnist-letters-` and the extension `.gz` may come with the names.
"""

import gzip
import os
import pathlib
import re
import zlib

import numpy as np

from mtl_jax.data.source import ArrayExamples, Label, Source
from mtl_jax.errors import UserError

_NAME = re.compile(r"(?P<prefix>.*?)(?P<split>train|t10k|test)-(?P<part>images|labels)"
                   r"[-.]idx[13]-ubyte(\.gz)?")
_UBYTE = 8  # the type's number in the header


def idx(dir: str | os.PathLike[str], *, download: bool = True, path: str | None = None) -> Source:
  """The data set in a folder of IDX files: grey images [H, W, 1] and a `label`.

  Classes are as many as the greatest label in the files says: MNIST's 10, EMNIST letters' 27, of
  which the first is never seen.

  Args:
    dir: taken as every source does, and not used.
    download: likewise; nothing is downloaded.
    path: the folder.

  Raises:
    UserError: a file is missing, damaged or of another kind, or files do not fit each other.
  """
  del dir, download
  if not path:
    raise UserError("path: expected a folder of IDX files, found none given")
  folder = pathlib.Path(path).expanduser()
  columns = read_folder(folder)
  num_classes = 1 + max(int(column["label"].max()) for column in columns.values())
  return Source(origin=f"idx:{folder.absolute().name}",
                splits={split: ArrayExamples(column) for split, column in columns.items()},
                labels={"label": Label("class", num_classes)}, augmentation=("crop",))


def read_folder(folder: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
  """The columns of "train" and "test": `image` uint8 [N, H, W, 1] and `label` int32 [N].

  Raises:
    UserError: as `idx` does.
  """
  columns = {}
  for split, files in _found(folder).items():
    images, labels = read_file(files["images"], 3), read_file(files["labels"], 1)
    if len(images) != len(labels) or not len(images):
      raise UserError(f"expected as many images as labels, found {len(images)} in "
                      f"{files['images']}\nand {len(labels)} in {files['labels']}")
    columns[split] = {"image": images[..., None], "label": labels.astype(np.int32)}
  shapes = {split: column["image"].shape[1:3] for split, column in columns.items()}
  if len(set(shapes.values())) > 1:
    raise UserError(f"expected images of one size in {folder}, found {shapes}")
  return columns


def read_file(path: pathlib.Path, num_axes: int) -> np.ndarray:
  """The array in one IDX file of unsigned bytes, gzipped or not: uint8, read-only.

  Args:
    path: of the file.
    num_axes: that it shall have.

  Raises:
    UserError: where it is none, or not whole.
  """
  try:
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
      content = gzip.decompress(content)
  except (OSError, EOFError, zlib.error) as error:
    raise UserError(f"expected {path} to be readable, found: {error}\n"
                    "fetch the file again") from error
  start = 4 + 4 * num_axes
  if len(content) < start or content[:4] != bytes([0, 0, _UBYTE, num_axes]):
    raise UserError(f"expected {path} to be an IDX file of bytes with {num_axes} axes, which "
                    f"begins with 0000080{num_axes}, found {content[:4].hex() or 'nothing'}")
  shape = np.frombuffer(content[4:start], ">u4").tolist()
  size = int(np.prod(shape, dtype=object))
  if len(content) - start != size:
    raise UserError(f"expected {path} to hold {shape}, {size} bytes after its header, "
                    f"found {len(content) - start}\nfetch the file again")
  return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _found(folder: pathlib.Path) -> dict[str, dict[str, pathlib.Path]]:
  """The four files; where one lies there gzipped as well, the other."""
  if not folder.is_dir():
    raise UserError(f"path: expected a folder of IDX files at {folder}, "
                    f"found {'a file' if folder.exists() else 'nothing there'}")
  files, prefixes = {"train": {}, "test": {}}, set()
  for path in sorted(folder.iterdir(), reverse=True):  # "….gz" comes before its twin
    match = _NAME.fullmatch(path.name)
    if match:
      prefixes.add(match["prefix"])
      files["train" if match["split"] == "train" else "test"][match["part"]] = path
  if len(prefixes) > 1:
    raise UserError(f"expected the IDX files of one data set in {folder}, found those of "
                    f"{', '.join(sorted(prefix or 'no prefix' for prefix in prefixes))}\n"
                    "give each a folder of its own")
  for split, parts in files.items():
    for part, axes in (("images", 3), ("labels", 1)):
      if part not in parts:
        name = f"{split}-{part}-idx{axes}-ubyte"
        raise UserError(f"expected {name} or {name}.gz in {folder}, found none"
                        + (" (nor t10k-…)" if split == "test" else ""))
  return files
