"""Damage is noticed, named, and never used; what was good is kept."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from mtl_jax.errors import UserError
from mtl_jax.experiment import loop
from mtl_jax.experiment.checkpoint import Checkpoints, read_variables
from tests.experiment.conftest import final_checksums, make, records


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """A run cut after its last checkpoint, before its end, beside the same run uncut."""
  return {"root": tmp_path_factory.mktemp("runs")}


@pytest.fixture
def run(stopped, tmp_path):
  """A fresh copy of an unfinished run with checkpoints at 5, 10 and 12, and the finished one."""
  root = stopped["root"]
  if not (root / "whole").exists():
    loop.train(make(), root / "whole")
  shutil.copytree(root / "whole", tmp_path / "run")
  (tmp_path / "run" / "summary.json").unlink()
  return tmp_path / "run", root / "whole"


def data_files(checkpoint):
  return sorted((p for p in (checkpoint / "state").rglob("*") if p.is_file()
                 and "/d/" in str(p)), key=lambda p: p.stat().st_size)


def truncate(checkpoint):
  for file in data_files(checkpoint):  # which of them is read depends on Orbax's version
    file.write_bytes(file.read_bytes()[:-40])


def flip_a_byte(checkpoint):
  for file in data_files(checkpoint):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lose_a_file(checkpoint):
  for file in data_files(checkpoint):
    file.unlink()


def lose_the_state(checkpoint):
  shutil.rmtree(checkpoint / "state")


def hold_another_state(checkpoint):
  """Reads well and is wrong: only a checksum can tell."""
  shutil.rmtree(checkpoint / "state")
  shutil.copytree(checkpoint.with_name("10") / "state", checkpoint / "state")


def change_the_record(checkpoint):
  file = checkpoint / "record" / "metadata"
  file.write_text(file.read_text().replace("wall_seconds", "wall_secunds"))


def empty_the_record(checkpoint):
  (checkpoint / "record" / "metadata").write_text("")


@pytest.mark.parametrize("damage", [truncate, empty_the_record, *(
    pytest.param(damage, marks=pytest.mark.slow)
    for damage in (flip_a_byte, lose_a_file, lose_the_state, hold_another_state,
                   change_the_record))])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(run, capsys, damage):
  folder, whole = run
  damage(folder / "checkpoints" / "12")
  loop.train(make(), folder)
  out = capsys.readouterr().out
  assert "checkpoint 12 is damaged" in out and "continuing from checkpoint 10" in out
  assert (folder / "checkpoints" / "damaged-12").is_dir()
  assert final_checksums(folder) == final_checksums(whole)
  assert records(folder) == records(whole)


def test_all_damaged_is_an_error_that_leaves_them(run):
  folder, _ = run
  steps = [p for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]
  for checkpoint in steps:
    flip_a_byte(checkpoint)
  with pytest.raises(UserError, match="expected at least one sound checkpoint, found 12: .*; 10: "):
    loop.train(make(), folder)
  assert all(p.is_dir() for p in steps)


@pytest.mark.parametrize("error", [
    MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")],
    ids=["host", "device"])
def test_where_memory_runs_out_nothing_is_called_damaged(tmp_path, monkeypatch, error):
  import orbax.checkpoint as ocp
  saved = Checkpoints(tmp_path / "a")
  saved.save(1, {"params": {"x": jnp.zeros(2)}, "model_state": {}}, {}, None)
  saved.close()
  def fail(*_, **__):
    raise error
  monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
  monkeypatch.setattr(ocp.Checkpointer, "restore", fail)
  monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", fail)
  for read in (lambda: Checkpoints(tmp_path / "a").restore_latest({}, print),
               lambda: read_variables(tmp_path / "a", None),
               lambda: read_variables(tmp_path / "a", 1)):
    with pytest.raises(type(error)):
      read()
  assert [p.name for p in (tmp_path / "a").iterdir()] == ["1"]


def test_latest_and_best_are_kept(run, monkeypatch):
  folder, _ = run
  shutil.rmtree(folder)
  scores = iter([0.9, 0.1, 0.2, 0.3, 0.4])
  monkeypatch.setattr("mtl_jax.experiment.run.score", lambda *args: next(scores))
  summary = loop.train(make(**{"train.steps": 10, "train.evaluate_every_steps": 2}), folder)
  kept = sorted(int(p.name) for p in (folder / "checkpoints").iterdir())
  assert kept == [2, 8, 10] and summary["best_step"] == 2


def test_a_leftover_of_an_unfinished_save_is_ignored(run):
  folder, whole = run
  newest = folder / "checkpoints" / "12"
  newest.rename(newest.with_name("12.orbax-checkpoint-tmp"))
  loop.train(make(), folder)
  assert final_checksums(folder) == final_checksums(whole)


def test_metrics_that_were_cut_are_an_error(run):
  folder, _ = run
  (folder / "metrics.jsonl").write_text("")
  with pytest.raises(UserError, match="expected at least the .* bytes that the checkpoint knows of"):
    loop.train(make(), folder)


def test_a_failing_save_is_named_and_keeps_what_was_there(run, monkeypatch):
  folder, _ = run
  shutil.rmtree(folder / "checkpoints" / "12")
  before = final_checksums(folder)
  import orbax.checkpoint as ocp
  def full(self, step, **kwargs):
    raise OSError(28, "No space left on device")
  monkeypatch.setattr(ocp.CheckpointManager, "save", full)
  with pytest.raises(UserError, match="checkpoint of step 12 could not be saved.*No space left"):
    loop.train(make(), folder)
  assert final_checksums(folder) == before


@pytest.mark.parametrize("use", [
    lambda checkpoints: checkpoints.save(1, {"x": jnp.zeros(2)}, {}, None),
    lambda checkpoints: checkpoints.restore(1, {})], ids=["save", "restore"])
def test_a_folder_that_cannot_be_used_is_neither_damage_nor_a_full_disk(use, tmp_path, monkeypatch):
  def refuse(*_, **__):
    raise PermissionError(13, "Permission denied")
  monkeypatch.setattr("orbax.checkpoint.CheckpointManager", refuse)
  with pytest.raises(UserError) as caught:
    use(Checkpoints(tmp_path))
  assert str(caught.value) == (f"{tmp_path}: expected a folder for checkpoints that can be written, "
                               "found: Permission denied")


def test_evaluation_refuses_a_damaged_best(run):
  folder, whole = run
  shutil.copy(whole / "summary.json", folder)
  best = json.loads((folder / "summary.json").read_text())["best_step"]
  flip_a_byte(folder / "checkpoints" / str(best))
  with pytest.raises(UserError, match=f"{best}: expected a sound checkpoint, found it damaged"):
    loop.evaluate(make(), folder)
