"""Checkpoints by Orbax, each with checksums: what is damaged is noticed, and never used."""

from collections.abc import Callable, Collection, Mapping, Sequence
import functools
import json
import pathlib
from typing import TYPE_CHECKING, Any
import zlib

import jax
import numpy as np

from mtl_jax.errors import UserError, reason

if TYPE_CHECKING:
  import orbax.checkpoint as ocp

_NOT_DAMAGE = (MemoryError, jax.errors.JaxRuntimeError)  # of sound files, too: memory ran out


def _checksum(text: str) -> int:
  return zlib.crc32(text.encode())


def _leaf_checksums(state: Any) -> dict[str, int]:
  """CRC-32 of every array, by its path."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  for _, leaf in leaves:
    leaf.copy_to_host_async()
  return {jax.tree_util.keystr(path): zlib.crc32(np.ascontiguousarray(leaf.addressable_data(0)))
          for path, leaf in leaves}


class Damaged(Exception):
  """A checkpoint that does not hold what was saved."""


class Checkpoints:
  """The checkpoints of one run: the latest two, and the best as each of them knows it.

  Each step's checkpoint holds the training state and a JSON record with the state's checksums, the
  record's own, and what the run must know to go on.

  Attributes:
    path: their folder.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._best_steps: tuple[int | None, ...] = ()
    self._saving: int | None = None
    try:
      path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise self._unwritable(error) from error

  @functools.cached_property
  def _manager(self) -> "ocp.CheckpointManager":
    # Not before there is something to read or to save: a new run's first step waits for nothing.
    import orbax.checkpoint as ocp
    from orbax.checkpoint.checkpoint_managers import save_decision_policy
    options = ocp.CheckpointManagerOptions(
        save_decision_policy=save_decision_policy.FixedIntervalPolicy(1),
        preservation_policy=_LatestAndBest(lambda: self._best_steps),
        cleanup_tmp_directories=True,
    )
    try:
      return ocp.CheckpointManager(self.path, options=options)
    except OSError as error:
      raise self._unwritable(error) from error

  def _unwritable(self, error: OSError) -> UserError:
    return UserError(f"{self.path}: expected a folder for checkpoints that can be written, "
                     f"found: {error.strerror}")

  def save(self, step: int, state: Any, record: Mapping[str, Any], best_step: int | None) -> None:
    """Starts saving; returns before the bytes are on disk.

    Args:
      step: of the state.
      state: a pytree of arrays.
      record: JSON-able, given back by `restore`.
      best_step: the checkpoint to keep besides the latest, if any.

    Raises:
      UserError: where this save, or the one before, failed.
    """
    import orbax.checkpoint as ocp
    self.wait()
    self._best_steps = (*self._best_steps[-1:], best_step)
    record = json.dumps({"record": record, "best_step": best_step,
                         "checksums": _leaf_checksums(state)}, sort_keys=True)
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        record=ocp.args.JsonSave({"text": record, "checksum": _checksum(record)}))
    manager, self._saving = self._manager, step
    try:
      manager.save(step, args=args)
    except Exception as error:  # Orbax wraps full disks in many types
      raise self._failed(error) from error

  def wait(self) -> None:
    """Waits until what was saved is on disk.

    Raises:
      UserError: where saving failed.
    """
    if self._saving is None:
      return
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
      found = (self.path / str(self._saving)).is_dir()
    except Exception as error:  # Orbax wraps full disks in many types
      raise self._failed(error) from error
    if not found:
      raise self._failed(FileNotFoundError("nothing there after saving"))
    self._saving = None

  def _failed(self, error: Exception) -> UserError:
    step, self._saving = self._saving, None
    return UserError(f"{self.path}: the checkpoint of step {step} could not be saved: "
                     f"{reason(error, 200)}\n"
                     "is the disk full or the folder gone? earlier checkpoints are kept; "
                     "make room and launch again to continue")

  def steps(self) -> set[int]:
    """The steps that there are checkpoints of, sound or not."""
    return set(self._manager.all_steps()) if any(self.path.iterdir()) else set()

  def restore_latest(self, abstract_state: Any, warn: Callable[[str], None],
                     among: Collection[int] | None = None
                     ) -> tuple[int, Any, dict[str, Any]] | None:
    """The newest sound checkpoint, or None where there is none at all.

    Damaged ones are named in a warning and set aside under the name `damaged-<step>`.

    Args:
      abstract_state: shapes, dtypes and the shardings to restore to.
      warn: told of each damaged checkpoint.
      among: the steps that may be taken; None for all.

    Returns:
      step, state and record.

    Raises:
      UserError: where all are damaged.
    """
    steps = sorted(self.steps() if among is None else self.steps() & set(among), reverse=True)
    damaged = []
    for step in steps:
      try:
        state, contents = self._restore(step, abstract_state)
      except Damaged as error:
        damaged.append((step, error))
        continue
      self._best_steps = (contents["best_step"],)
      for bad, error in damaged:
        warn(f"checkpoint {bad} is damaged ({error}); continuing from checkpoint {step}")
        (self.path / str(bad)).rename(self.path / f"damaged-{bad}")
      if damaged:
        self._manager.reload()
      return step, state, contents["record"]
    if damaged:
      found = "; ".join(f"{step}: {error}" for step, error in damaged)
      raise UserError(f"{self.path}: expected at least one sound checkpoint, found {found}\n"
                      "if the code or its packages have changed, go back to the run's; else remove "
                      "the run folder to start again")
    return None

  def forget_after(self, step: int) -> None:
    """Removes the checkpoints of later steps, which will be done again."""
    for later in sorted(self.steps()):
      if later > step:
        self._manager.delete(later)

  def restore(self, step: int, abstract_state: Any) -> Any:
    """The state of one step.

    Raises:
      UserError: where it is missing or damaged.
    """
    try:
      return self._restore(step, abstract_state)[0]
    except Damaged as error:
      raise UserError(f"{self.path / str(step)}: expected a sound checkpoint, "
                      f"found it damaged: {error}") from error

  def _restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    import orbax.checkpoint as ocp
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state),
                              record=ocp.args.JsonRestore())
    manager = self._manager
    try:
      restored = manager.restore(step, args=args)
      text, checksum = restored["record"]["text"], restored["record"]["checksum"]
    except _NOT_DAMAGE:
      raise
    except Exception as error:  # damage shows in many types
      raise Damaged(f"cannot be read: {reason(error)}") from error
    if _checksum(text) != checksum:
      raise Damaged("the record's checksum does not match")
    contents = json.loads(text)
    found = _leaf_checksums(restored["state"])
    for name, expected in contents["checksums"].items():
      if found.get(name) != expected:
        raise Damaged(f"the checksum of {name} does not match")
    return restored["state"], contents

  def close(self) -> None:
    """Waits for what is being saved and closes."""
    try:
      self.wait()
    finally:
      if "_manager" in vars(self):
        self._manager.close()


def restore_together(several: Sequence[Checkpoints], abstract_state: Any,
                     warn: Callable[[str], None]) -> list[tuple[int, Any, dict[str, Any]] | None]:
  """The newest sound checkpoint of one run, or of several seeds that go on from one step.

  Seeds save one after the other, and each step's save begins when all have done the one before:
  after a death they have the newest step or the one before it in common. Later ones are removed.

  Args:
    several: the checkpoints of each.
    abstract_state: shapes, dtypes and the shardings to restore to.
    warn: told of each damaged checkpoint.

  Returns:
    Step, state and record of each; None for each where they are to start from the beginning.

  Raises:
    UserError: where all are damaged, or more than the first save is missing somewhere.
  """
  common = set.intersection(*(one.steps() for one in several))
  while True:
    found = [one.restore_latest(abstract_state, warn, common) for one in several]
    steps = {step for step, *_ in filter(None, found)}
    if None not in found and len(steps) == 1:
      break
    if not steps:
      _check_hardly_begun(several)
      break
    common = {step for step in common if step <= min(steps)} & set.intersection(
        *(one.steps() for one in several))
  for one in several:
    one.forget_after(min(steps, default=-1))
  return found


def _check_hardly_begun(several: Sequence[Checkpoints]) -> None:
  if any(len(one.steps()) > 1 for one in several):
    raise UserError("; ".join(f"{one.path}: steps {sorted(one.steps())}" for one in several)
                    + "\nexpected a checkpoint of one step in each; remove these folders to start "
                    "again, or bring back what is missing")


def read_variables(path: pathlib.Path, step: int | None) -> tuple[int, dict[str, Any]]:
  """The model's variables in a run's checkpoint, whatever the run; nothing in its folder changes.

  Args:
    path: the run's checkpoints.
    step: which one; the best that the newest of them knows when None.

  Returns:
    The step, and `{"params": …, "model_state": …}` with numpy arrays.

  Raises:
    UserError: where there is none, or it is damaged.
  """
  steps = [int(p.name) for p in path.iterdir() if p.name.isdigit()] if path.is_dir() else []
  if not steps:
    raise UserError(f"{path}: expected the checkpoints of a run, found none")
  try:
    if step is None:
      step = _read_record(path / str(max(steps)))["best_step"]
    return step, _read_arrays(path / str(step))
  except Damaged as error:
    raise UserError(f"{path}: expected a sound checkpoint of the best step {step or 'known'}, "
                    f"found it damaged: {error}") from error


def _read_record(path: pathlib.Path) -> dict[str, Any]:
  import orbax.checkpoint as ocp
  try:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
      record = reader.restore(path / "record")
    sound = _checksum(record["text"]) == record["checksum"]
  except _NOT_DAMAGE:
    raise
  except Exception as error:  # damage shows in many types
    raise Damaged(f"the record cannot be read: {reason(error)}") from error
  if not sound:
    raise Damaged("the record's checksum does not match")
  return json.loads(record["text"])


def _read_arrays(path: pathlib.Path) -> dict[str, Any]:
  import orbax.checkpoint as ocp
  try:
    with ocp.PyTreeCheckpointer() as reader:
      saved = reader.metadata(path / "state").item_metadata
      wanted = {name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved[name])
                for name in ("params", "model_state")}
      args = ocp.args.PyTreeRestore(wanted, partial_restore=True, restore_args=jax.tree.map(
          lambda x: ocp.RestoreArgs(restore_type=np.ndarray), wanted))
      found = reader.restore(path / "state", args=args)
  except _NOT_DAMAGE:
    raise
  except Exception as error:  # damage shows in many types
    raise Damaged(f"cannot be read: {reason(error)}") from error
  checksums = _read_record(path)["checksums"]
  for place, x in jax.tree_util.tree_leaves_with_path(found):
    name = f".{place[0].key}{jax.tree_util.keystr(place[1:])}"
    if checksums.get(name) != zlib.crc32(np.ascontiguousarray(x)):
      raise Damaged(f"the checksum of {name} does not match")
  return found


class _LatestAndBest:
  """Keeps the latest two checkpoints, so that a damaged one has a predecessor, and their bests."""

  def __init__(self, best_steps: Callable[[], tuple[int | None, ...]]):
    self._best_steps = best_steps

  def should_preserve(self, checkpoints, *, context):
    del context
    kept = {*sorted(checkpoint.step for checkpoint in checkpoints)[-2:], *self._best_steps()}
    return [checkpoint.step in kept for checkpoint in checkpoints]
