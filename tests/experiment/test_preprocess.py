"""What the builder makes of augmentation and statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.data import sources
from mtl_jax.data.augmentation import channel_statistics
from mtl_jax.data.source import ArrayExamples, Label, Source
from mtl_jax.errors import UserError
from tests.experiment.conftest import make, tiny_source


def test_statistics_come_from_what_is_trained_on(monkeypatch):
  """Neither the test split nor what becomes validation has a part in them."""
  def shifted(name):
    source = tiny_source(name)
    test = dict(source.splits["test"].arrays())
    test["image"] = np.full_like(test["image"], 255)
    splits = {**source.splits, "test": ArrayExamples(test)}
    return Source("tiny", splits, source.labels)

  monkeypatch.setattr(sources, "SOURCES", {
      name: lambda dir, download=True, name=name: shifted(name)
      for name in ("cifar10", "cifar100")})
  experiment = make()
  for stream, examples in experiment.examples("train").items():
    images = examples.arrays()["image"]
    assert len(images) < 48
    assert experiment.statistics[stream] == channel_statistics(images)


def test_labels_move_with_the_images_of_a_run(monkeypatch):
  def with_boxes(name):
    source = tiny_source(name)
    splits = {split: ArrayExamples({**examples.arrays(), "box": np.tile(
        np.array([0, 0, 0.5, 1], np.float32), (len(examples), 1))})
              for split, examples in source.splits.items()}
    return Source("tiny", splits, {**source.labels, "box": Label("box")}, ("flip:1",))

  monkeypatch.setattr(sources, "SOURCES", {
      name: lambda dir, download=True, name=name: with_boxes(name)
      for name in ("cifar10", "cifar100")})
  experiment = make()
  batch = {stream: {name: jnp.asarray(column[:4])
                    for name, column in source.splits["train"].arrays().items()}
           for stream, source in experiment.sources.items()}
  zero = jnp.asarray(0, jnp.uint32)
  run = jax.jit(experiment.preprocess, static_argnums=3)
  for stream in batch:
    for train, expected in ((True, [0.5, 0, 1, 1]), (False, [0, 0, 0.5, 1])):
      boxes = run(batch, zero, zero, train)[stream]["box"]
      np.testing.assert_array_equal(boxes, [expected] * 4)


def test_a_stream_may_have_an_augmentation_of_its_own():
  assert make().augmentation == {"cifar10": ("shift",), "cifar100": ("shift",)}
  own = {"data.augmentation": "flip,rotate:10", "data.streams.cifar100.augmentation": "auto"}
  assert make(**own).augmentation == {"cifar10": ("flip", "rotate:10"), "cifar100": ("shift",)}
  assert make(**{"data.streams.cifar10.augmentation": ()}).augmentation["cifar10"] == ()


@pytest.mark.parametrize("field", ["data.augmentation", "data.streams.cifar10.augmentation"])
@pytest.mark.parametrize("value, expected", [
    ("rotat:3", "did you mean rotate?"), ("crop,rotate:x", "found 'rotate:x'"), (3.5, "words")])
def test_an_augmentation_that_cannot_be_is_said(field, value, expected):
  with pytest.raises(UserError) as error:
    make(**{field: value})
  assert str(error.value).startswith(f"config.{field}: ") and expected in str(error.value)
