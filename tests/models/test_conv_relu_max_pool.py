"""A convolution, its bias, ReLU and pooling at once equal one after the other."""

import functools

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import pytest

from mtl_jax.models.operators import conv_relu_max_pool
from tests.models.test_operators import LAYOUT, close, close_when_mapped, gradients, temporaries

# images, kernel, padding, pool; between them kernels are read in blocks and not, in slices and not
CASES = {
    "in blocks": ((3, 6, 8, 3), (3, 3, 3, 2), "SAME", (2, 2)),
    "in blocks and slices": ((19, 24, 22, 3), (3, 3, 3, 2), "SAME", (2, 2)),
    "in blocks, with a rest": ((2, 9, 8, 1), (5, 4, 1, 3), "SAME", (2, 3)),
    "in blocks, unpadded": ((2, 8, 9, 2), (2, 3, 2, 3), "VALID", (3, 2)),
    "in blocks, shifted": ((2, 7, 8, 3), (3, 3, 3, 2), ((2, 3), (0, 1)), (2, 2)),
    "few channels, large pools": ((2, 8, 8, 3), (1, 1, 3, 2), "SAME", (4, 4)),
    "more channels": ((3, 6, 4, 5), (3, 3, 5, 4), "SAME", (2, 2)),
    "more channels in slices": ((19, 24, 22, 4), (3, 3, 4, 2), "SAME", (2, 2)),
    "more channels, with a rest": ((2, 7, 8, 4), (3, 3, 4, 2), "VALID", (2, 4)),
    "small maps": ((70, 4, 4, 4), (3, 3, 4, 2), "SAME", (2, 2)),
    "many slices": ((70, 8, 8, 4), (3, 3, 4, 2), "SAME", (2, 2)),
    "large maps": ((19, 32, 32, 4), (3, 3, 4, 2), "SAME", (2, 2)),
    "1x1": ((3, 4, 4, 6), (1, 1, 6, 3), "SAME", (2, 2)),
    "pools of one": ((2, 4, 4, 4), (3, 3, 4, 2), "SAME", (1, 1)),
}
SOME = ("in blocks, with a rest", "more channels, with a rest")
QUICK = (*SOME, "in blocks and slices", "small maps", "many slices", "large maps")


def longer(cases, quick=QUICK):
  return [pytest.param(case, marks=() if case in quick else pytest.mark.slow) for case in cases]


def pair(case, dtype=jnp.float32):
  """Ours, XLA's two operations, and their operands."""
  shape, kernel, padding, pool = CASES[case]
  keys = jax.random.split(jax.random.key(0), 3)
  operands = tuple(jax.random.normal(key, s, dtype)
                   for key, s in zip(keys, (shape, kernel, kernel[3:])))

  def theirs(x, kernel, bias):
    maps = lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=LAYOUT)
    return nn.max_pool(nn.relu(maps + bias[None, None, None]), pool, pool)
  return functools.partial(conv_relu_max_pool, padding=padding, pool=pool), theirs, operands


@pytest.mark.parametrize("case", longer(CASES))
def test_outputs_and_all_gradients(case):
  ours, theirs, operands = pair(case)
  close(jax.jit(gradients(ours))(*operands), jax.jit(gradients(theirs))(*operands))
  assert "conv_relu_max_pool" in str(jax.make_jaxpr(ours)(*operands))


@pytest.mark.parametrize("case", SOME)
def test_of_several_maxima_the_first_has_the_gradient(case):
  ours, theirs, operands = pair(case)
  operands = tuple(jnp.round(x) for x in operands)
  close(*(jax.jit(gradients(f))(*operands) for f in (ours, theirs)))


@pytest.mark.parametrize("case", longer(SOME, SOME[:1]))
def test_forward_mode_and_second_order(case):
  ours, theirs, operands = pair(case)
  directions = tuple(jax.random.normal(jax.random.key(7 + i), x.shape)
                     for i, x in enumerate(operands))

  def all_of(f, forwards):
    def run(operands, directions):
      gradient = lambda *operands: gradients(f)(*operands)[1]
      reverse_over = jax.grad(lambda *x: sum((g ** 2).sum() for g in gradient(*x)), (0, 1, 2))(
          *operands)
      derivatives = reverse_over, gradients(jax.checkpoint(f))(*operands)
      if not forwards:
        return derivatives
      along = jax.linearize(f, *operands)[1](*directions)
      alone = [jax.jvp(lambda x, i=i: f(*operands[:i], x, *operands[i + 1:]), operands[i:i + 1],
                       directions[i:i + 1])[1] for i in range(3)]
      return derivatives, along, alone, jax.jvp(gradient, operands, directions)[1]
    return jax.jit(run)(operands, directions)
  derivatives, along, alone, over_reverse = all_of(ours, True)
  close(derivatives, all_of(theirs, False), 1e-4)
  close(sum(alone), along)
  # XLA's pooling has no derivative forwards of its gradient: reverse mode twice is the judge.
  out, pull = jax.vjp(theirs, *operands)
  backwards = pull(out)
  close((along * out).sum(), sum((g * d).sum() for g, d in zip(backwards, directions)), 1e-4)
  gradient = lambda *x: gradients(theirs)(*x)[1]
  twice = jax.vjp(gradient, *operands)[1](directions)
  close(sum((a * d).sum() for a, d in zip(over_reverse, directions)),
        sum((a * d).sum() for a, d in zip(twice, directions)), 1e-4)


@pytest.mark.parametrize("case", ["in blocks and slices", "more channels in slices"])
def test_forward_mode_in_slices(case):
  """Against the way back through XLA's operations, along one direction."""
  ours, theirs, operands = pair(case)
  directions = tuple(jax.random.normal(jax.random.key(7 + i), x.shape)
                     for i, x in enumerate(operands))
  _, along = jax.jit(lambda x, d: jax.jvp(ours, x, d))(operands, directions)
  cotangent = jax.random.normal(jax.random.key(3), along.shape)
  found = jax.jit(lambda x, ct: jax.vjp(theirs, *x)[1](ct))(operands, cotangent)
  close((along * cotangent).sum(), sum((g * d).sum() for g, d in zip(found, directions)), 1e-4)


@pytest.mark.parametrize("axes", longer(
    ((0, None, None), (None, 0, None), (2, 1, 0), (None, None, 0)), ((2, 1, 0),)), ids=str)
@pytest.mark.parametrize("case", longer(SOME, SOME[:1]))
def test_mapped_over_images_kernels_or_biases(case, axes):
  close_when_mapped(*pair(case), axes)


@pytest.mark.parametrize("case", longer(SOME, SOME[1:]))
def test_mapped_over_cotangents_and_directions(case):
  ours, theirs, operands = pair(case)
  out, _ = jax.vjp(theirs, *operands)
  cotangents = jax.random.normal(jax.random.key(3), (3, *out.shape))
  close(*(jax.jit(lambda ct, f=f: jax.vmap(jax.vjp(f, *operands)[1])(ct))(cotangents)
          for f in (ours, theirs)))
  x, kernel, bias = operands
  directions = jax.random.normal(jax.random.key(4), (3, *kernel.shape))
  _, along = jax.linearize(lambda kernel: ours(x, kernel, bias), kernel)
  close(jax.vmap(along)(directions), jnp.stack([along(d) for d in directions]))


@pytest.mark.parametrize("case", longer(("in blocks and slices", "small maps"), ("small maps",)))
def test_in_half_precision_gradients_are_no_coarser(case):
  ours, theirs, operands = pair(case, jnp.bfloat16)
  close(ours(*operands), theirs(*operands), 1e-2)
  # Exact in half precision, so that the maxima are in the same places.
  operands = tuple(jnp.round(x) for x in operands)
  exact = jax.grad(lambda *x: theirs(*x).sum(), 1)(*(x.astype(jnp.float32) for x in operands))
  gradient = jax.grad(lambda *x: ours(*x).astype(jnp.float32).sum(), 1)(*operands)
  assert gradient.dtype == jnp.bfloat16
  close(gradient.astype(jnp.float32), exact, 1e-2)


@pytest.mark.parametrize("channels", [3, 4])
def test_the_whole_map_is_never_in_memory(channels):
  _, theirs, _ = pair("in blocks")
  ours = functools.partial(conv_relu_max_pool, padding="SAME", pool=(2, 2))
  shapes = ((160, 24, 24, channels), (3, 3, channels, 64), (64,))
  operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  bytes_of = lambda f: temporaries(jax.jit(gradients(f)), *operands)
  one_map = 4 * 160 * 24 * 24 * 64
  assert bytes_of(ours) < one_map < bytes_of(theirs)


def test_no_memory_is_held_for_maps_before_they_are_written():
  """A second block keeps a quarter of what the first keeps, at a time when that is being freed."""
  block = functools.partial(conv_relu_max_pool, padding="SAME", pool=(2, 2))

  def bytes_of(depth):
    def loss(weights, x):
      return (functools.reduce(lambda x, w: block(x, *w), weights, x) ** 2).sum()
    shaped = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    weights = [(shaped(3, 3, 16, 16), shaped(16))] * depth
    return temporaries(jax.jit(jax.grad(loss)), weights, shaped(64, 32, 32, 16))
  first_pooled = 4 * 64 * 16 * 16 * 16
  assert bytes_of(2) < bytes_of(1) + first_pooled / 2


@pytest.mark.parametrize("case", longer(("in blocks and slices", "more channels in slices"),
                                        ("in blocks and slices",)))
def test_eight_devices_equal_one_and_keep_their_examples(case):
  ours, _, (x, *weights) = pair(case)
  x = jnp.concatenate([x] * 4)[:64]
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  split, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
  run = jax.jit(gradients(ours), in_shardings=(split, everywhere, everywhere),
                out_shardings=(split, (split, everywhere, everywhere)))
  close(run(x, *weights), gradients(ours)(x, *weights))
  text = run.lower(x, *weights).compile().as_text()
  assert "all-gather" not in text and "all-to-all" not in text


def test_exported_for_any_batch():
  ours, theirs, (x, *weights) = pair("in blocks and slices")
  batch, = jax.export.symbolic_shape("b")
  images = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
  exported = jax.export.export(jax.jit(gradients(ours)))(
      images, *(jax.ShapeDtypeStruct(w.shape, w.dtype) for w in weights))
  again = jax.export.deserialize(exported.serialize())
  close(again.call(x, *weights), gradients(theirs)(x, *weights))


@pytest.mark.parametrize("images, pool", [
    ((2, 34, 34, 4), (17, 17)), ((0, 8, 8, 4), (2, 2)), ((2, 1, 8, 4), (2, 2))], ids=str)
def test_the_rest_is_pooled_afterwards(images, pool):
  """Pools of more places than 8 bits count, no images, and images smaller than a pool."""
  x, kernel, bias = jnp.ones(images), jnp.ones((3, 3, 4, 2)), -20 * jnp.ones(2)
  ours = functools.partial(conv_relu_max_pool, padding="SAME", pool=pool)
  assert "conv_relu_max_pool" not in str(jax.make_jaxpr(ours)(x, kernel, bias))
  close(ours(x, kernel, bias), nn.relu(nn.max_pool(lax.conv_general_dilated(
      x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT), pool, pool) - 20))


def test_on_an_accelerator_both_are_xlas(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  ours, theirs, operands = pair("in blocks")
  text = str(jax.make_jaxpr(ours)(*operands))
  assert "conv_relu_max_pool" not in text and "reduce_window_max" in text
  close(ours(*operands), theirs(*operands))
