"""Peers beside ours: asks `torch_side.py`, a process of its own, for samples of its steps."""

from collections.abc import Mapping
import json
import pathlib
import subprocess
from typing import Any

from flax.traverse_util import flatten_dict
import numpy as np
from timing import Sample

NOT_INSTALLED = "not installed"


class Peers:
  """PyTorch's process, started when first asked for.

  Args:
    python: interpreter of an environment with PyTorch.
    threads: how many it may use.
    folder: for files of weights and batches.
  """

  def __init__(self, python: str, threads: int, folder: pathlib.Path):
    self._command = [python, str(pathlib.Path(__file__).with_name("torch_side.py")), str(threads)]
    self._folder, self._files = folder, 0
    self._process: subprocess.Popen | None = None
    self.versions: dict[str, str] | None = None

  def start(self) -> bool:
    """Whether PyTorch is there."""
    if self.versions is None:
      find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
      probe = subprocess.run([self._command[0], "-c", find], capture_output=True)
      if probe.returncode:
        self.versions = {"torch": NOT_INSTALLED}
      else:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, text=True,
                                         stdout=subprocess.PIPE)
        self.versions = self._read()
    return self._process is not None

  def write(self, params: Mapping[str, Any], images: Any, labels: Any) -> pathlib.Path:
    """A file with our parameters, images [B, H, W, C] and labels [T, B], for `add`."""
    self._files += 1
    path = self._folder / f"start{self._files}.npz"
    flat = {"/".join(names): np.asarray(x) for names, x in flatten_dict(params).items()}
    np.savez(path, images=np.asarray(images), labels=np.asarray(labels), **flat)
    return path

  def add(self, name: str, steps: int, **fields: Any) -> tuple[Sample, list[float]] | str:
    """A warm training there: a sample of it and the losses of its first step.

    Args:
      name: that nothing else has since the last `drop`.
      steps: in a sample.
      **fields: arguments of `torch_side.Training`.

    Returns:
      In place of these, "not installed", where something that it takes is not.
    """
    if not self.start():
      return NOT_INSTALLED
    found = self._ask(do="add", name=name, **{k: str(v) for k, v in fields.items()})
    if "missing" in found:
      return NOT_INSTALLED
    return lambda: self._ask(do="time", name=name, steps=steps)["seconds"], found["losses"]

  def drop(self) -> None:
    """Forgets all trainings."""
    if self._process:
      self._ask(do="drop")

  def close(self) -> None:
    """Ends the process."""
    if self._process:
      self._process.stdin.close()
      self._process.wait()

  def _ask(self, **request: Any) -> dict[str, Any]:
    self._process.stdin.write(json.dumps(request) + "\n")
    self._process.stdin.flush()
    return self._read()

  def _read(self) -> dict[str, Any]:
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError("PyTorch's process ended; its message stands above")
    return json.loads(line)
