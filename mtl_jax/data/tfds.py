"""Any data set that TFDS has prepared, read without TensorFlow."""

from collections.abc import Iterator, Mapping, Sequence
import io
import os
import pathlib
from typing import TYPE_CHECKING

import numpy as np

from mtl_jax.data import images
from mtl_jax.data.features import Column, column
from mtl_jax.data.records import (ArrayRecords, Records, TFRecords, broken, full_name,
                                  local_folder, prepared, preparing, serialized)
from mtl_jax.data.source import Source
from mtl_jax.errors import MissingData, UserError

if TYPE_CHECKING:
  from tensorflow_datasets import features as tfds_features
  from tensorflow_datasets.core import DatasetBuilder

SPLITS = ("train", "validation", "test")

_CHUNK = 64  # records read at a time where all are looked through


def tfds(dir: str | os.PathLike[str], *, download: bool = True, dataset: str = "",
         size: int | Sequence[int] | None = None, splits: Mapping[str, str] | None = None,
         image: str = "", labels: Sequence[str] | None = None) -> Source:
  """A data set of TFDS by name, as TFDS has prepared it in `dir`.

  Features become labels by the table in `data/features.py`; those that do not are named in the
  source's report. The examples' order is that of the files.

  A mask whose classes TFDS does not number, and objects, are counted once over all examples before
  anything else, which takes as long as reading the data set; name other `labels` to be spared that.

  Args:
    dir: a data_dir of TFDS. A data set that is not there is prepared only where that needs no
      download and no TensorFlow, as for a builder of one's own.
    download: taken as every source does; nothing is ever downloaded.
    dataset: "mnist", "oxford_iiit_pet:3.*", "coco/2017", "namespace:name/config".
    size: pixels of both sides, or (height, width), that images and what is known of their pixels
      are stretched to; as stored when None, which is for data sets of one size.
    splits: TFDS's split of each of train, validation and test, such as {"train": "train[:90%]",
      "test": "train[90%:]"}; those of the same name when None.
    image: the feature that is the image; "image", or else the only one in colour, when empty.
    labels: the features to keep as labels; all that can be when None.

  Raises:
    MissingData: the data set is not there.
    UserError: it is damaged, an argument does not fit it, or it has no image or no label.
  """
  del download
  root = local_folder(dir)
  if not dataset:
    raise UserError("dataset: expected the name of a TFDS data set, such as mnist, found none")
  builder = prepared(dataset, root)
  if builder is None:
    _prepare(dataset, root)
    builder = prepared(dataset, root)
  if builder is None:
    raise broken(root, f"{dataset} is missing, though TFDS has prepared it")
  return source(builder, size=size, splits=splits, image=image, labels=labels)


def source(builder: "DatasetBuilder", *, size: int | Sequence[int] | None = None,
           splits: Mapping[str, str] | None = None, image: str = "",
           labels: Sequence[str] | None = None, augmentation: Sequence[str] = ()) -> Source:
  """The source of a prepared data set; see `tfds`."""
  name, _, version = builder.info.full_name.rpartition("/")
  origin = f"tfds:{name}:{version}"
  features = builder.info.features
  image = _image_name(origin, features, image)
  columns, report = _columns(origin, features, image, labels)
  parts = {split: serialized(builder, part) for split, part in _parts(builder, splits).items()}
  columns = _counted(origin, columns, features, parts)
  kept = _only(features, [image, *columns])
  how = _reading(origin, features[image], size, image, parts)
  return Source(
      origin=origin,
      splits={split: Records(f"{origin} {split}", records, kept, image, how, size is not None,
                             columns) for split, records in parts.items()},
      labels={name: column.label for name, column in columns.items()},
      augmentation=augmentation,
      report=report,
  )


# ---- What becomes what.


def _image_name(origin: str, features: "tfds_features.FeaturesDict", chosen: str) -> str:
  from tensorflow_datasets import features as kinds
  found = [name for name, feature in features.items()
           if isinstance(feature, kinds.Image) and feature.np_dtype == np.uint8]
  colour = [name for name in found if features[name].shape[-1] == 3]
  for candidates in ([chosen], ["image"], colour, found):
    if len(candidates) == 1 and candidates[0] in found:
      return candidates[0]
    if chosen:
      break
  raise UserError(f"{origin}: image: expected one of {', '.join(sorted(found)) or 'none'} "
                  f"among {', '.join(sorted(features))}, found {chosen!r}")


def _columns(origin: str, features: "tfds_features.FeaturesDict", image: str,
             labels: Sequence[str] | None) -> tuple[dict[str, Column], dict[str, int]]:
  found = {name: column(feature, features[image])
           for name, feature in features.items() if name != image}
  columns = {name: made for name, made in sorted(found.items()) if made is not None}
  if not columns:
    raise UserError(f"{origin}: expected a feature that can be a label, "
                    f"found none among {', '.join(sorted(features))}")
  if labels is not None:
    for name in labels:
      if name not in columns:
        raise UserError(f"labels: expected some of {', '.join(columns)}, found {name!r}")
    return {name: columns[name] for name in labels}, {}
  return columns, {f"feature that is no label (left out): {name}": 1
                   for name, made in sorted(found.items()) if made is None}


def _parts(builder: "DatasetBuilder", splits: Mapping[str, str] | None) -> dict[str, str]:
  known = builder.info.splits
  if splits is None:
    splits = {split: split for split in SPLITS if split in known}
  wrong = [split for split in splits if split not in SPLITS]
  if wrong or "train" not in splits or "test" not in splits:
    raise UserError(
        f"splits: expected train and test, found {', '.join(splits) or 'none'}; TFDS has "
        f"{', '.join(known)}\nsay which is which, such as splits={{'train': 'train[:90%]', "
        "'test': 'train[90%:]'}")
  for split, part in splits.items():
    try:
      size = known[part].num_examples
    except ValueError as error:
      raise UserError(f"splits.{split}: expected some of {', '.join(known)}, whole or as "
                      f"'train[:90%]', found {part!r}") from error
    if not size:
      raise UserError(f"splits.{split}: expected examples, found none in {part!r}")
  return dict(splits)


def _counted(origin: str, columns: Mapping[str, Column], features: "tfds_features.FeaturesDict",
             parts: Mapping[str, ArrayRecords | TFRecords]) -> dict[str, Column]:
  """The columns, once everything has been counted that takes all examples."""
  from tensorflow_datasets import decode
  from tensorflow_datasets import features as kinds
  most = {name: 1 for name, column in columns.items() if column.count}
  counted = _only(features, most)
  undecoded = {name: decode.SkipDecoding() for name in most
               if isinstance(features[name], kinds.Image)}
  for split, records in parts.items() if most else ():
    try:
      for record in _all(records):
        example = counted.deserialize_example_np(record, decoders=undecoded)
        for name in most:
          most[name] = max(most[name], columns[name].count(example[name]))
    except ValueError as error:
      raise UserError(f"{origin} {split}: {error}") from error
  return {name: column.counted(most[name]) if name in most else column
          for name, column in columns.items()}


def _all(records: ArrayRecords | TFRecords) -> Iterator[bytes]:
  for start in range(0, len(records), _CHUNK):
    yield from records.read(range(start, min(start + _CHUNK, len(records))))


def _only(features: "tfds_features.FeaturesDict",
          names: Sequence[str]) -> "tfds_features.FeaturesDict":
  from tensorflow_datasets import features as kinds
  return kinds.FeaturesDict({name: features[name] for name in names})


def _reading(origin: str, feature: "tfds_features.Image", size: int | Sequence[int] | None,
             name: str, parts: Mapping[str, ArrayRecords | TFRecords]) -> images.Reading:
  """How images are read: stretched, so that labels of pixels and boxes follow; never turned."""
  from PIL import Image
  from tensorflow_datasets import decode
  from tensorflow_datasets import features as kinds
  if size is None:
    only = kinds.FeaturesDict({name: feature})
    record = parts["train"][0]
    first = only.deserialize_example_np(record, decoders={name: decode.SkipDecoding()})[name]
    try:
      with Image.open(io.BytesIO(first)) as opened:
        size = opened.height, opened.width
    except OSError as error:
      raise UserError(f"{origin}: expected images, found the first one damaged: {error}") from error
  return images.reading(size, fit="stretch", channels=1 if feature.shape[-1] == 1 else 3,
                        upright=False)


# ---- Where it is not prepared.


def _prepare(dataset: str, root: pathlib.Path) -> None:
  """Has TFDS prepare the data set, where that needs neither a download nor TensorFlow."""
  import tensorflow_datasets
  from tensorflow_datasets.core import naming, registered
  dataset = full_name(dataset)
  if "*" in dataset:  # whatever version TFDS prepares now
    dataset = dataset.rpartition(":")[0]
  reason = "preparing it takes TensorFlow"
  try:
    builder = tensorflow_datasets.builder(dataset, data_dir=root)
    if not (builder.url_infos or builder.MANUAL_DOWNLOAD_INSTRUCTIONS):
      with preparing(dataset, root):
        builder.download_and_prepare(file_format="array_record")
      return
  except registered.DatasetNotFoundError:
    reason = "TFDS knows none of that name"
  except ImportError:  # of TensorFlow, by the builder's own code or by what it calls
    pass
  name = naming.parse_builder_name_kwargs(dataset)[0].name
  found = ", ".join(sorted(path.name for path in root.glob(f"{name}/[!.]*"))) or "nothing"
  raise MissingData(
      f"expected {dataset} prepared by TFDS in {root / name}, found {found} there; {reason}\n"
      "where that is installed, run: python -c 'import tensorflow_datasets as tfds; "
      f'tfds.builder("{dataset}", data_dir="{root}").download_and_prepare('
      'file_format="array_record")\'')
