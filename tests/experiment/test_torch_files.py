"""PyTorch's weight files: what they hold is read, and nothing that they say is run."""

import collections
import io
import os
import pathlib
import pickle
import re
import zipfile

import numpy as np
import pytest

from mtl_jax.errors import UserError
from mtl_jax.experiment.torch_files import read_state_dict

RECORDED = pathlib.Path(__file__).parents[1] / "models" / "data" / "resnet18_narrow.pth"


class Global:
  """Pickles as a name that is looked up, and perhaps called."""

  def __init__(self, module, name):
    self.module, self.name = module, name


class Call:
  """Pickles as a call of a global."""

  def __init__(self, function, *args):
    self.function, self.args = function, args

  def __reduce__(self):
    return (self.function, self.args)


class Pickler(pickle._Pickler):
  """Writes globals that are not there, and storages as torch names them."""

  def save(self, obj, *args, **kwargs):
    if isinstance(obj, Global):
      self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
    elif isinstance(obj, Call):
      self.save(obj.function)
      self.save(obj.args)
      self.write(pickle.REDUCE)
    else:
      super().save(obj, *args, **kwargs)

  def persistent_id(self, obj):
    return obj[1:] if isinstance(obj, tuple) and obj[:1] == ("pid",) else None


def storage(kind="FloatStorage", key="0", count=6):
  return ("pid", "storage", Global("torch", kind), key, "cpu", count)


def tensor(of=None, offset=0, shape=(2, 3), strides=(3, 1)):
  return Call(Global("torch._utils", "_rebuild_tensor_v2"), of or storage(), offset, shape, strides,
              False, Call(Global("collections", "OrderedDict")))


def written(path, content, numbers=np.arange(6, dtype=np.float32), byteorder=b"little"):
  file = io.BytesIO()
  Pickler(file, protocol=2).dump(content)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("w/data.pkl", file.getvalue())
    archive.writestr("w/byteorder", byteorder)
    archive.writestr("w/data/0", numbers.tobytes())
  return path


def test_a_file_that_torch_wrote_is_read():
  found = read_state_dict(RECORDED)
  assert len(found) == 122 and found["layer4.0.downsample.0.weight"].shape == (32, 16, 1, 1)
  assert found["bn1.num_batches_tracked"] == 0 and found["bn1.weight"].dtype == np.float32
  assert 0.5 <= found["bn1.running_var"].min() and found["bn1.running_var"].max() <= 1.5


def test_strides_offsets_and_parameters(tmp_path):
  found = read_state_dict(written(tmp_path / "w.pth", {
      "turned": tensor(shape=(3, 2), strides=(1, 3)),
      "last": tensor(offset=5, shape=(), strides=()),
      "none": tensor(offset=6, shape=(0, 3), strides=(3, 1)),
      "parameter": Call(Global("torch._utils", "_rebuild_parameter"), tensor(), True, {})}))
  np.testing.assert_array_equal(found["turned"], [[0, 3], [1, 4], [2, 5]])
  np.testing.assert_array_equal(found["parameter"], [[0, 1, 2], [3, 4, 5]])
  assert found["last"] == 5 and found["none"].shape == (0, 3)


@pytest.mark.parametrize("name", ["os.mkdir", "posix.mkdir", "pathlib.Path.mkdir", "builtins.eval",
                                  "torch.load", "collections.OrderedDict.fromkeys",
                                  "torch._utils._rebuild_sparse_tensor", "numpy.load"])
def test_a_pickle_that_asks_for_more_is_refused_before_anything_runs(tmp_path, name):
  module, _, function = name.rpartition(".")
  call = Call(Global(module, function), str(tmp_path / "mark"))
  path = written(tmp_path / "w.pth", {"a": tensor(), "b": call})
  with pytest.raises(UserError, match=re.escape(f"asks for {name}, which could run anything")):
    read_state_dict(path)
  assert os.listdir(tmp_path) == ["w.pth"]


def test_a_dotted_name_does_not_lead_elsewhere(tmp_path):
  code = (pickle.PROTO + b"\x04" + pickle.SHORT_BINUNICODE + b"\x0bcollections"
          + pickle.SHORT_BINUNICODE + b"\x14OrderedDict.fromkeys"
          + pickle.STACK_GLOBAL + pickle.STOP)
  with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
    archive.writestr("w/data.pkl", code)
  with pytest.raises(UserError, match="asks for collections.OrderedDict.fromkeys"):
    read_state_dict(tmp_path / "w.pth")


@pytest.mark.parametrize("content, message", [
    ({"a": tensor(shape=(7,), strides=(1,))}, r"found one of shape \[7\] in 6 numbers"),
    ({"a": tensor(offset=3)}, "expected tensors within their storages"),
    ({"a": tensor(offset=-1, shape=(1,), strides=(1,))}, "expected tensors within their storages"),
    ({"a": tensor(shape=(2,), strides=(-1,))}, "expected tensors within their storages"),
    ({"a": tensor(shape=(9, 9), strides=(0, 0))}, "expected tensors within their storages"),
    ({"a": tensor(storage(count=5))}, "storage 0: expected 20 bytes as they are, found 24"),
    ({"a": tensor(storage("DoubleStorage"))}, "storage 0: expected 48 bytes as they are, found 24"),
    ({"a": tensor(storage(key="1"))}, "There is no item named 'w/data/1'"),
    ({"state_dict": {"a": tensor()}, "epoch": 3}, "found state_dict, epoch; save model.state_dict"),
    ({}, "expected tensors by name, found none"),
    ([tensor()], "expected tensors by name, found a list"),
])
def test_what_is_not_sound_is_refused(tmp_path, content, message):
  with pytest.raises(UserError, match=message):
    read_state_dict(written(tmp_path / "w.pth", content))


def test_other_files_are_refused_with_what_to_do(tmp_path):
  path = tmp_path / "w.pth"
  path.write_bytes(pickle.dumps(collections.OrderedDict(a=1), protocol=2))
  with pytest.raises(UserError, match=r"convert it: python -c .*torch.load\('w.pth'"):
    read_state_dict(path)
  with pytest.raises(UserError, match="expected little-endian numbers"):
    read_state_dict(written(path, {"a": tensor()}, byteorder=b"big"))
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("word/document.xml", "")
  with pytest.raises(UserError, match="expected one data.pkl in the archive"):
    read_state_dict(path)
  path.write_bytes(RECORDED.read_bytes()[:-30])
  with pytest.raises(UserError, match="expected"):
    read_state_dict(path)
