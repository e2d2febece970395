"""What a model is made of: parameters and operations by part, and the map of its tasks."""

import jax
import pytest

from mtl_jax.errors import UserError
from mtl_jax.experiment import inspection
from mtl_jax.models import HEADS
from tests.experiment.conftest import make

# Convolutions of 3x3x3x4 and 3x3x4x4 with biases, then 16 x 8; heads of 8 x 4 and 8 x 6.
TRUNK, HEAD_A, HEAD_B = 108 + 4 + 144 + 4 + 128 + 8, 32 + 4, 48 + 6


def rows(**changes):
  experiment = make(**changes)
  batch = {stream: {"image": jax.ShapeDtypeStruct((1, *shape), "float32")}
           for stream, shape in experiment.shapes.items()}
  variables = jax.eval_shape(lambda b: experiment.model.init(jax.random.key(0), b), batch)
  return {part.name: part for part in inspection.parts_of(experiment.model, variables, batch)}


def test_parameters_are_counted_where_they_belong():
  assert {name: part.parameters for name, part in rows().items()} == {
      "shared by all or some tasks": TRUNK, "features of all tasks": TRUNK, "head of a": HEAD_A,
      "head of b": HEAD_B, "whole model": TRUNK + HEAD_A + HEAD_B,
      "with a as its only task": TRUNK + HEAD_A, "with b as its only task": TRUNK + HEAD_B}
  assert {name: part.parameters
          for name, part in rows(sharing={"name": "independent"}).items()} == {
      "shared by all or some tasks": 0, "a alone, before its head": TRUNK,
      "b alone, before its head": TRUNK, "features of all tasks": 2 * TRUNK,
      "head of a": HEAD_A, "head of b": HEAD_B, "whole model": 2 * TRUNK + HEAD_A + HEAD_B,
      "with a as its only task": TRUNK + HEAD_A, "with b as its only task": TRUNK + HEAD_B}


def test_a_policy_is_its_tasks_own():
  """One choice each: of the second layer, 8 to 8; the first reads 8x8x3 numbers."""
  found = rows(sharing={"name": "adashare"}, trunk={"name": "mlp", "widths": (8, 8)})
  assert found["shared by all or some tasks"].parameters == 192 * 8 + 8 + 8 * 8 + 8
  assert [found[f"{task} alone, before its head"].parameters for task in "ab"] == [1, 1]


def test_operations_are_those_of_the_layers():
  found = {name: part.flops for name, part in rows().items()}
  # A dense layer: a product and a sum for each weight, and the sum of each bias.
  assert found["head of a"] == pytest.approx(2 * 32 + 4, abs=10)
  assert found["shared by all or some tasks"] is None
  one = found["with a as its only task"] - found["head of a"]
  assert found["features of all tasks"] == pytest.approx(2 * one, rel=0.01)  # two streams
  assert found["whole model"] == pytest.approx(
      found["features of all tasks"] + found["head of a"] + found["head of b"], rel=0.01)


def test_tasks_of_one_stream_share_its_operations():
  shared = {name: part.flops for name, part in rows(
      **{"tasks.b.stream": "cifar10", "data.streams": {"cifar10": {"name": "cifar10"}}}).items()}
  apart = {name: part.flops for name, part in rows(
      **{"tasks.b.stream": "cifar10", "data.streams": {"cifar10": {"name": "cifar10"}},
         "sharing": {"name": "independent"}}).items()}
  assert apart["features of all tasks"] == pytest.approx(
      2 * shared["features of all tasks"], rel=0.01)


def test_heads_that_read_maps_stand_beside_those_that_do_not():
  experiment = make()
  model = experiment.model.clone(heads={
      "a": experiment.model.heads["a"],
      "b": HEADS["upsampling"](num_outputs=2, size=(8, 8))})
  batch = {stream: {"image": jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")}
           for stream in experiment.shapes}
  variables = jax.eval_shape(lambda b: model.init(jax.random.key(0), b), batch)
  parts = {part.name: part for part in inspection.parts_of(model, variables, batch)}
  assert parts["head of a"].parameters == HEAD_A and parts["head of b"].flops > 0


@pytest.mark.parametrize("sharing, edges", [
    ("hard", ["stream_cifar10 --> trunk", "stream_cifar100 --> trunk", "trunk --> heads_a",
              "trunk --> heads_b"]),
    ("independent", ["stream_cifar10 --> trunks_a", "trunks_a --> heads_a",
                     "stream_cifar100 --> trunks_b", "trunks_b --> heads_b"]),
])
def test_the_map_says_who_reads_what(tmp_path, capsys, sharing, edges):
  inspection.inspect(make(sharing={"name": sharing}), tmp_path / "run")
  lines = (tmp_path / "run" / "tasks.mmd").read_text().splitlines()
  assert lines[0] == "flowchart LR" and '  stream_cifar10[("cifar10 8x8x3")]' in lines
  assert [line.strip() for line in lines if "-->" in line] == edges
  assert '  heads_a["heads_a: 36"]' in lines
  out = capsys.readouterr().out
  assert "head of a" in out and "MFLOPs" in out and str(tmp_path / "run" / "tasks.mmd") in out


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="tasks.mmd: expected room and permission to write"):
    inspection.inspect(make(), tmp_path / "file")
