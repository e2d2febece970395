"""A run that starts from the weights of another: what is taken, what stays, what is refused."""

import dataclasses
import json
import shutil

from flax.traverse_util import flatten_dict
import jax
import numpy as np
import pytest
import safetensors.numpy

from mtl_jax.data import sources
from mtl_jax.errors import UserError
from mtl_jax.experiment import experiment, fields, loop, transfer
from mtl_jax.experiment.checkpoint import Checkpoints
from mtl_jax.experiment.console import Console
from mtl_jax.training import sharding
from tests.experiment.conftest import final_checksums, make, records, tiny_config, tiny_source
from tests.experiment.test_resume import Killed

MLP = {"tasks.b.head": {"name": "mlp", "hidden": (5,)}}


def one_device():
  return sharding.data_mesh(jax.devices()[:1])


def variables(state):
  """Arrays by path."""
  return {path: np.asarray(x) for path, x in
          flatten_dict({"params": state.params, **state.model_state}).items()}


def start(**changes):
  """Variables at the start of a run, and those at the same start from nothing."""
  experiment = make(seed=3, **changes)
  plain = dataclasses.replace(experiment, config=fields.complete(tiny_config(seed=3)))
  return (variables(transfer.first_state(experiment, one_device(), Console())),
          variables(transfer.first_state(plain, one_device(), Console(quiet=True))))


def assert_taken_from(found, start, fresh, taken):
  """All that `taken` says is the found, all else the fresh."""
  assert any(map(taken, start)) and start.keys() == fresh.keys()
  for path, x in start.items():
    np.testing.assert_array_equal(x, (found if taken(path) else fresh)[path], strict=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """The folder of a finished run."""
  folder = tmp_path_factory.mktemp("source")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sources, "SOURCES", {name: lambda dir, download=True, name=name: tiny_source(name)
                                       for name in ("cifar10", "cifar100")})
    patch.setattr(loop, "data_mesh", one_device)
    loop.train(make(**{"train.steps": 3, "train.evaluate_every_steps": 1}), folder)
  return folder


@pytest.fixture
def found(source):
  return transfer.read(str(source))[1]


def test_a_run_traces_its_first_state_once(monkeypatch, tmp_path):
  states = []

  def counted(seed, *args, **kwargs):
    states.append(seed)
    return create(seed, *args, **kwargs)

  create = experiment.create_train_state
  monkeypatch.setattr(experiment, "create_train_state", counted)
  loop.train(make(seed=3, **{"train.steps": 1}), tmp_path)
  assert states == [3]


def test_the_best_checkpoint_is_read_and_the_folder_left_alone(source, found, tmp_path):
  copy = shutil.copytree(source, tmp_path / "run")
  before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
  origin, again = transfer.read(str(copy))
  best = json.loads((source / "summary.json").read_text())["best_step"]
  assert origin == f"{copy}, checkpoint {best}, trained on tiny"
  (copy / "summary.json").unlink()  # as in a run that has not finished
  assert transfer.read(str(copy))[0] == origin
  del before[copy / "summary.json"]
  assert before == {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
  checkpoints = Checkpoints(source / "checkpoints")
  state = checkpoints.restore(best, loop._abstract_state(make(), one_device()))
  checkpoints.close()
  for path, x in variables(state).items():
    np.testing.assert_array_equal(found[path], x)
    np.testing.assert_array_equal(again[path], x)


def test_a_trunk_goes_into_a_run_with_other_heads(source, found, capsys):
  begun, _ = start(**{"init_from.path": str(source), **MLP})
  trunk = {path for path in found if path[1] == "sharing"}
  assert len(trunk) == 6
  for path in trunk:
    np.testing.assert_array_equal(begun[path], found[path], strict=True)
  assert not np.array_equal(begun["params", "heads_a", "dense", "kernel"],
                            found["params", "heads_a", "dense", "kernel"])
  out = capsys.readouterr().out
  assert f"init_from {source}, checkpoint" in out and "6 variables taken: sharing/trunk (6)" in out
  assert "6 stay random: heads_a/dense/" in out and "4 of what is there are not used" in out
  assert "warning" not in out


def test_heads_come_along_but_for_those_excepted(source, found):
  begun, fresh = start(**{"init_from.path": str(source), "init_from.part": "all",
                          "init_from.except_heads": "b"})
  assert_taken_from(found, begun, fresh, lambda path: path[1] != "heads_b")


def test_patterns_stay_random(source, found):
  begun, fresh = start(**{"init_from.path": str(source), "init_from.skip": "conv2,bias"})
  assert_taken_from(found, begun, fresh, lambda path: path[1] == "sharing"
                    and not {"conv2", "bias"} & set(path))


def test_every_copy_of_the_trunk_is_given_it(source, found):
  begun, _ = start(**{"init_from.path": str(source), "sharing": {"name": "independent"}})
  copies = [path for path in begun if path[1] == "sharing"]
  assert {path[2] for path in copies} == {"trunks_a", "trunks_b"} and len(copies) == 12
  for path in copies:
    np.testing.assert_array_equal(begun[path], found[(*path[:2], "trunk", *path[3:])])


@pytest.mark.parametrize("suffix", ["float32", "float16"])
def test_safetensors_round_trip(tmp_path, found, suffix):
  path = tmp_path / "weights.safetensors"
  safetensors.numpy.save_file({"/".join(name): x.astype(suffix) for name, x in found.items()}, path)
  begun, fresh = start(**{"init_from.path": str(path), "init_from.part": "all"})
  rounded = {name: x.astype(suffix).astype(np.float32) for name, x in found.items()}
  assert_taken_from(rounded, begun, fresh, lambda path: True)


@pytest.mark.parametrize("fields, lines", [
    ({"trunk.width": 9}, [
        "sharing/trunk/dense/bias: expected shape [9] as the config says, found [8]",
        "set config.trunk to what the weights were trained with, or leave it fresh with "
        "config.init_from.skip=sharing/trunk/dense"]),
    ({"tasks.a.num_classes": 5, "init_from.part": "all"}, [
        "heads_a/dense/bias: expected shape [5] as the config says, found [4]",
        "leave this head fresh with config.init_from.except_heads=a"]),
    ({"trunk.channels": (4,)}, [
        "sharing/trunk/dense/kernel: expected shape [64, 8] as the config says, found [16, 8]"]),
    ({"trunk.channels": (4, 4, 4)}, [
        "sharing/trunk: expected all of its variables, found none for "
        "sharing/trunk/conv3/bias, sharing/trunk/conv3/kernel"]),
    ({"trunk": {"name": "vit", "width": 4, "depth": 1, "num_heads": 1}}, [
        "expected variables of this model, such as sharing/trunk/", "none of which fits"]),
])
def test_what_does_not_fit_is_refused_with_what_to_do(source, fields, lines):
  with pytest.raises(UserError) as refused:
    start(**{"init_from.path": str(source), **fields})
  message = str(refused.value)
  assert message.startswith(f"config.init_from: {source}: ") and len(message.splitlines()) <= 3
  for line in lines:
    assert line in message


def test_a_refused_start_leaves_the_folder_to_another_config(source, tmp_path):
  for changes in ({"trunk.width": 9}, {"trunk.width": 10}):  # not: "belongs to another run"
    with pytest.raises(UserError, match="sharing/trunk/dense/bias: expected shape"):
      loop.train(make(**{"init_from.path": str(source), **changes}), tmp_path)
  assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("fields, message", [
    ({"init_from.part": "trunks"}, "init_from.part: expected one of trunk, all; did you mean"),
    ({"init_from.except_heads": "c", "init_from.part": "all"}, "expected one of a, b, with part="),
    ({"init_from.except_heads": "a"}, "found 'a', with part=trunk"),
    ({"init_from.skip": "layer9"}, "init_from.skip: expected trunk, heads or names on the path"),
    ({"init_from.freeze": "trnk"}, "config.init_from.freeze: .*found 'trnk', which says none"),
    ({"init_from.freeze": "*"}, "freeze: expected parameters that still move"),
    ({"init_from.learning_rate_scale": {"trunk": 0}}, "expected a number > 0, found 0.0"),
    ({"init_from.learning_rate_scale": {"trunk": "x"}}, "trunk: expected a number, found 'x'"),
    ({"init_from.freze": "trunk"}, "did you mean freeze"),
    ({"init_from.path": ""}, "config.init_from: expected a section with a path"),
    ({"init_from": "runs/x"}, "config.init_from: expected a section with a path, found 'runs/x'"),
])
def test_mistakes_in_the_section_are_found_before_anything_runs(fields, message):
  with pytest.raises(UserError, match=message):
    make(**{"init_from.path": "anywhere", **fields})


def test_places_without_weights_are_refused(tmp_path, source):
  def refused(path, message):
    with pytest.raises(UserError, match=message):
      transfer.read(str(path))
  refused(tmp_path / "nowhere", "expected a run folder or a file, found none at")
  refused(tmp_path, "expected a run folder, found .* without a sound config.json")
  shutil.copy(source / "config.json", tmp_path)
  refused(tmp_path, "expected the checkpoints of a run, found none")
  (tmp_path / "w.safetensors").write_bytes(b"nothing of the kind")
  refused(tmp_path / "w.safetensors", "expected tensors in the safetensors format")
  safetensors.numpy.save_file({"conv/kernel": np.zeros(1)}, tmp_path / "w.safetensors")
  refused(tmp_path / "w.safetensors", "such as params/sharing/trunk/conv1/kernel, found 'conv/k")
  safetensors.numpy.save_file({"encoder.weight": np.zeros((1, 1, 1))}, tmp_path / "w.safetensors")
  refused(tmp_path / "w.safetensors", "encoder.weight: expected names and shapes of torchvision's")
  (tmp_path / "w.npz").write_bytes(b"")
  refused(tmp_path / "w.npz", "expected a run folder, a .safetensors or a .pth file, found")


def test_a_damaged_checkpoint_is_refused(tmp_path, source):
  copy = shutil.copytree(source, tmp_path / "run")
  best = json.loads((copy / "summary.json").read_text())["best_step"]
  for path in (copy / "checkpoints" / str(best) / "state").rglob("*"):
    if path.is_file() and path.parent.name == "d":
      path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))
  with pytest.raises(UserError, match=f"expected a sound checkpoint of the best step {best}"):
    transfer.read(str(copy))


@pytest.mark.slow
def test_a_resumed_run_does_not_read_again_and_ends_the_same(source, found, tmp_path, monkeypatch):
  changes = {"init_from.path": str(source), "init_from.part": "all",
             "init_from.freeze": "conv?,heads_b",
             "init_from.learning_rate_scale": {"trunk": 0.5, "kernel": 0.5}, "train.steps": 6,
             "balancer.name": "mgda", "penalties.l2": 0.01, "optimizer.name": "adamw",
             "optimizer.weight_decay": 0.1, "optimizer.clip_norm": 1.0}
  loop.train(make(**changes), tmp_path / "whole")
  for path, x in transfer.read(str(tmp_path / "whole"))[1].items():
    frozen = path[1] == "heads_b" or path[-2].startswith("conv")
    assert np.array_equal(x, found[path]) == frozen, path
  reads, real, save = [], transfer.read, Checkpoints.save
  monkeypatch.setattr(transfer, "read", lambda path: (reads.append(path), real(path))[1])

  def dying(*args):
    save(*args)
    raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(Checkpoints, "save", dying)
    with pytest.raises(Killed):
      loop.train(make(**changes), tmp_path / "broken")
  loop.train(make(**changes), tmp_path / "broken")
  assert reads == [str(source)]
  assert final_checksums(tmp_path / "whole") == final_checksums(tmp_path / "broken")
  assert records(tmp_path / "whole") == records(tmp_path / "broken")
  section = json.loads((tmp_path / "broken" / "config.json").read_text())["config"]["init_from"]
  assert section == {"path": str(source), "part": "all", "except_heads": [], "skip": [],
                     "freeze": ["conv?", "heads_b"],
                     "learning_rate_scale": {"trunk": 0.5, "kernel": 0.5}}
  with pytest.raises(UserError, match="config.init_from.path"):
    loop.train(make(**{**changes, "init_from.path": "elsewhere"}), tmp_path / "broken")
