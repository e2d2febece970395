"""Order, streams, splits and augmentation."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.data import augmentation, order, splits, streams
from mtl_jax.data.source import ArrayExamples, Columns, Joined, Label, Source, Subset, Unlabelled, \
    rows

LABELS = {"s": {"label": Label("class", 1000)}}


def numbered(size, start=0):
  """Examples whose image and label carry their number."""
  numbers = np.arange(start, start + size)
  return ArrayExamples({"image": np.tile((numbers % 256).astype(np.uint8)[:, None, None, None],
                                         (1, 4, 4, 3)),
                        "label": numbers.astype(np.int32)})


@pytest.mark.parametrize("size", [
    1, 3, 65, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 7, 64, 1000))])
def test_permute_is_a_bijection_that_keys_change(size):
  positions = jnp.arange(size, dtype=jnp.uint32)
  orders = [np.asarray(order.permute(positions, size, jnp.full(size, key, jnp.uint32)))
            for key in (1, 2)]
  for permuted in orders:
    assert sorted(permuted.tolist()) == list(range(size))
  if size > 7:
    assert (orders[0] == orders[1]).mean() < 0.2


def test_permutations_are_spread_evenly():
  """Where position 0 lands over many keys: chi-square of 16 cells, and no adjacency kept."""
  keys = jnp.arange(4096, dtype=jnp.uint32) * jnp.uint32(2654435761)
  landed = [np.asarray(order.permute(jnp.full(4096, p, jnp.uint32), 16, keys)) for p in (0, 1)]
  counts = np.bincount(landed[0], minlength=16)
  assert ((counts - 256) ** 2 / 256).sum() < 45  # 99.99 % of chi-square with 15 degrees
  assert abs(np.corrcoef(landed[0], landed[1])[0, 1] + 1 / 15) < 0.06


def test_every_epoch_holds_every_example_once():
  key = jax.random.key(0)
  drawn = np.concatenate([order.batch_indices(key, jnp.asarray(s), 4, 10) for s in range(10)])
  epochs = drawn.reshape(4, 10)
  for epoch in epochs:
    assert sorted(epoch.tolist()) == list(range(10))
  assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_resident_batches_depend_on_seed_and_step_alone_and_differ_by_stream():
  columns = {s: {k: jnp.asarray(v) for k, v in numbered(50).arrays().items()} for s in "ab"}
  batch = lambda seed, step: streams.resident_batch(columns, 8, jnp.asarray(seed),
                                                   dict.fromkeys("ab", jnp.asarray(step)))
  one, again, other = batch(0, 3), batch(0, 3), batch(1, 3)
  np.testing.assert_array_equal(one["a"]["label"], again["a"]["label"])
  assert not np.array_equal(one["a"]["label"], other["a"]["label"])
  assert not np.array_equal(one["a"]["label"], one["b"]["label"])
  np.testing.assert_array_equal(one["a"]["image"][:, 0, 0, 0], one["a"]["label"])


def test_grain_batches_start_anywhere_as_if_they_had_come_there():
  make = lambda start, **kwargs: streams.grain_batches(
      {"s": numbered(20)}, 4, 0, {"s": start}, labels=LABELS, **kwargs)
  from_start = [b["s"]["label"] for b in itertools.islice(make(0), 12)]
  from_seven = [b["s"]["label"] for b in itertools.islice(make(7), 5)]
  np.testing.assert_array_equal(from_start[7:], from_seven)
  assert sorted(np.concatenate(from_start[:5]).tolist()) == list(range(20))
  assert not np.array_equal(from_start[:5], from_start[5:10])
  two = [itertools.islice(make(7, process=p, num_processes=2), 5) for p in (0, 1)]
  for whole, *shares in zip(from_seven, *two):
    assert sorted(whole) == sorted(np.concatenate([s["s"]["label"] for s in shares]))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_both_engines_draw_the_same_batches(num_processes):
  seed = np.uint32(2 ** 32 - 1)  # the largest
  examples = {s: numbered(size) for s, size in [("long", 21), ("short", 3)]}
  columns = {s: {k: jnp.asarray(v) for k, v in e.arrays().items()} for s, e in examples.items()}
  labels = {s: LABELS["s"] for s in examples}
  shares = [streams.grain_batches(examples, 4, seed, {"long": 12, "short": 0}, labels=labels, process=p,
                                  num_processes=num_processes) for p in range(num_processes)]
  for turn, parts in enumerate(itertools.islice(zip(*shares), 9)):
    turns = {"long": jnp.asarray(turn + 12), "short": jnp.asarray(turn)}
    resident = streams.resident_batch(columns, 4, jnp.asarray(seed), turns)
    host = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), host, resident)


@pytest.mark.parametrize("size", [1, 2, 5, 97, 1 << 12, 50_000])
def test_the_host_draws_what_a_compiled_step_draws(size):
  key = jax.random.key(3)
  for step in (0, 1, 700, 2 ** 32 // 16 - 1):
    found = order.batch_indices_on_host(np.asarray(jax.random.bits(key)), step, 16, size)
    np.testing.assert_array_equal(found, order.batch_indices(key, jnp.asarray(step), 16, size),
                                  strict=True)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_evaluation_holds_every_example_once_and_pads_with_missing_labels(num_processes):
  examples = {"long": numbered(11), "short": numbered(3, start=100)}
  labels = {stream: LABELS["s"] for stream in examples}
  batches = [batch for p in range(num_processes) for batch in streams.evaluation_batches(
      examples, 4, labels=labels, process=p, num_processes=num_processes)]
  assert len(batches) == 3 * num_processes
  for stream, expected in (("long", range(11)), ("short", range(100, 103))):
    labels = np.concatenate([batch[stream]["label"] for batch in batches])
    assert sorted(labels[labels >= 0].tolist()) == list(expected)
    assert all(len(batch[stream]["label"]) == 4 // num_processes for batch in batches)


@pytest.mark.parametrize("bad", [1000, -2])
def test_a_label_out_of_range_is_named_by_every_reader(bad):
  columns = dict(numbered(8).arrays())
  columns["label"] = columns["label"].copy()
  columns["label"][3] = bad
  examples = {"s": ArrayExamples(columns)}
  expected = rf"stream 's': label: expected labels 0 … 999 \(-1 where missing\), found {bad}"
  with pytest.raises(ValueError, match=expected):
    list(itertools.islice(streams.grain_batches(examples, 4, 0, {"s": 0}, labels=LABELS), 2))
  with pytest.raises(ValueError, match=expected):
    list(streams.evaluation_batches(examples, 4, labels=LABELS))
  with pytest.raises(ValueError, match=expected):
    streams.check_labels("s", columns, LABELS["s"])


def test_validation_is_cut_by_seed_and_disjoint():
  source = Source("here", {"train": numbered(100), "test": numbered(5)}, {"label": 100})
  cut = splits.with_validation(source, 0.2, seed=1)
  train, validation = (cut.splits[s].arrays()["label"] for s in ("train", "validation"))
  assert len(validation) == 20 and sorted([*train, *validation]) == list(range(100))
  again = splits.with_validation(source, 0.2, seed=1).splits["validation"].arrays()["label"]
  other = splits.with_validation(source, 0.2, seed=2).splits["validation"].arrays()["label"]
  np.testing.assert_array_equal(validation, again)
  assert not np.array_equal(validation, other)
  assert splits.with_validation(cut, 0.5, seed=9) is cut
  assert int(cut.splits["validation"][0]["label"]) == validation[0]
  with pytest.raises(ValueError, match="validation: expected a fraction"):
    splits.with_validation(source, 0.001, seed=1)


def test_subset_keeps_its_order():
  subset = Subset(numbered(10), np.array([7, 2]))
  assert subset.arrays()["label"].tolist() == [7, 2] and int(subset[1]["label"]) == 2


@pytest.mark.parametrize("wrap", [
    lambda whole: whole, lambda whole: Subset(whole, np.array([8, 3, 5])),
    lambda whole: Joined(whole, numbered(4, 50)), lambda whole: Columns(whole, ["label"]),
    lambda whole: Unlabelled(Subset(whole, np.arange(9)[::-1]), {"label": np.arange(9) % 2 == 0})])
def test_rows_are_the_examples_one_by_one(wrap):
  examples = wrap(numbered(9))
  indices = [2, 0, 1, 2, len(examples) - 1]
  found = rows(examples, indices)
  assert found.keys() == examples[0].keys()
  for name, values in found.items():
    alone = [examples[i][name] for i in indices]
    np.testing.assert_array_equal(values, alone)
    assert values.dtype == alone[0].dtype


def test_crop_moves_by_at_most_its_padding_and_flip_mirrors():
  images = jnp.arange(2 * 6 * 6, dtype=jnp.uint8).reshape(2, 6, 6, 1)
  padded = np.pad(np.asarray(images), ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
  for key in range(5):
    for image, source in zip(np.asarray(augmentation.shift(images, jax.random.key(key))), padded):
      assert any(np.array_equal(image, source[y:y + 6, x:x + 6])
                 for y in range(5) for x in range(5))
  flipped = np.asarray(augmentation.flip(jnp.repeat(images, 50, axis=0), jax.random.key(0)))
  is_mirror = np.array([np.array_equal(a, b[:, ::-1]) for a, b in
                        zip(flipped, np.repeat(np.asarray(images), 50, axis=0))])
  assert 30 < is_mirror.sum() < 70


def test_normalized_images_have_zero_mean_and_unit_deviation():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 200, (50, 4, 4, 3)).astype(np.uint8)
  statistics = augmentation.channel_statistics(images)
  normal = np.asarray(augmentation.normalize(jnp.asarray(images), **statistics))
  np.testing.assert_allclose(normal.mean((0, 1, 2)), 0, atol=1e-5)
  np.testing.assert_allclose(normal.std((0, 1, 2)), 1, atol=1e-4)


@pytest.mark.parametrize("shape", [(700, 20, 20, 3), (3, 400, 400, 2), (5, 1, 1, 1)])
def test_statistics_are_those_of_all_bytes(shape):
  images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
  found, values = augmentation.channel_statistics(images), images.reshape(-1, shape[-1]) / 255
  np.testing.assert_allclose(found["mean"], values.mean(axis=0), rtol=1e-12)
  np.testing.assert_allclose(found["std"], values.std(axis=0), rtol=1e-12)


def test_preprocess_augments_training_batches_only():
  batch = {"s": {k: jnp.asarray(v) for k, v in numbered(8).arrays().items()}}
  batch["s"]["image"] = jax.random.randint(jax.random.key(0), (8, 6, 6, 3), 0, 255).astype(jnp.uint8)
  statistics = {"s": {"mean": (0.0,) * 3, "std": (1.0,) * 3}}
  run = lambda names, step: np.asarray(streams.preprocess(
      batch, jnp.asarray(0), jnp.asarray(step), statistics=statistics,
      augmentation=names)["s"]["image"])
  np.testing.assert_allclose(run(None, 0), np.asarray(batch["s"]["image"], np.float32) / 255)
  assert not np.array_equal(run({"s": ("crop",)}, 0), run({"s": ("crop",)}, 1))
  np.testing.assert_array_equal(run({"s": ("crop",)}, 1), run({"s": ("crop",)}, 1))
