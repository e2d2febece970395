"""Convolution, dense layers and max-pooling equal XLA's own, also derived and transformed."""

import functools

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from mtl_jax.models.operators import Conv, Dense, conv, max_pool
from mtl_jax.models.operators.dense import dot

LAYOUT = ("NHWC", "HWIO", "NHWC")
# images, kernel, strides, padding; between them the batch is in one slice, in whole ones and not
CASES = {
    "3x3": ((3, 5, 6, 4), (3, 3, 4, 2), (1, 1), "SAME"),
    "3x3 whole slices": ((32, 24, 22, 4), (3, 3, 4, 5), (1, 1), "SAME"),
    "3x3 part of a slice": ((17, 24, 22, 5), (3, 3, 5, 2), (1, 1), "SAME"),
    "3x3 small maps": ((70, 4, 4, 4), (3, 3, 4, 2), (1, 1), "SAME"),
    "3x3 few channels": ((3, 5, 6, 3), (3, 3, 3, 1), (1, 1), "VALID"),
    "3x3 stride 2": ((3, 7, 6, 5), (3, 3, 5, 4), (2, 2), "SAME"),
    "3x3 stride 2 both sides": ((3, 6, 5, 3), (3, 3, 3, 4), (2, 2), ((1, 1), (1, 1))),
    "3x3 strides": ((2, 9, 8, 4), (3, 3, 4, 2), (1, 2), ((0, 2), (1, 0))),
    "7x7 stride 2": ((2, 13, 12, 3), (7, 7, 3, 4), (2, 2), ((3, 3), (3, 3))),
    "5x2": ((2, 7, 6, 2), (5, 2, 2, 3), (1, 1), "SAME"),
    "2x2 not to the edge": ((2, 7, 8, 3), (2, 2, 3, 4), (3, 3), "VALID"),
    "4x4 patches": ((2, 8, 8, 3), (4, 4, 3, 5), (4, 4), "VALID"),
    "1x1": ((3, 4, 5, 6), (1, 1, 6, 3), (1, 1), "SAME"),
    "1x1 larger batch": ((9, 2, 2, 4), (1, 1, 4, 3), (1, 1), "SAME"),
    "1x1 more channels than places": ((8, 1, 1, 70), (1, 1, 70, 3), (1, 1), "VALID"),
    "1x1 stride 2": ((3, 5, 6, 4), (1, 1, 4, 3), (2, 2), ((0, 0), (0, 0))),
    "1x1 padded": ((2, 3, 4, 4), (1, 1, 4, 3), (1, 1), ((1, 1), (0, 1))),
    "more padding than kernel": ((2, 3, 4, 4), (2, 2, 4, 3), (1, 1), ((3, 2), (2, 3))),
}
SOME = ("3x3 stride 2", "1x1 stride 2")
QUICK = ("3x3 part of a slice", "3x3 small maps", "3x3 few channels", "3x3 stride 2 both sides",
         "3x3 strides", "1x1 stride 2", "1x1 more channels than places")


def pair(case, dtype=jnp.float32):
  """Our convolution, XLA's, and their operands."""
  shape, kernel, strides, padding = CASES[case]
  keys = jax.random.split(jax.random.key(0), 2)
  operands = tuple(jax.random.normal(key, s, dtype) for key, s in zip(keys, (shape, kernel)))
  return *(functools.partial(f, window_strides=strides, padding=padding, dimension_numbers=LAYOUT)
           for f in (conv, lax.conv_general_dilated)), operands


def close(ours, theirs, tolerance=2e-5):
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max(initial=1))


def primitives(jaxpr):
  """Names of all primitives of a program, of its inner ones too."""
  names = set()
  for eqn in jaxpr.eqns:
    names.add(eqn.primitive.name)
    for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
      names |= primitives(inner.jaxpr) if hasattr(inner, "jaxpr") else set()
  return names


def temporaries(program, *operands):
  """Bytes that a jitted function works in, besides its arguments and results."""
  return program.lower(*operands).compile().memory_analysis().temp_size_in_bytes


def gradients(f):
  """Outputs of `f`, and all gradients of a function that is not linear in them."""
  def run(*operands):
    out, pullback = jax.vjp(f, *operands)
    return out, pullback(out ** 2 + 1)
  return run


def close_when_mapped(ours, theirs, operands, axes):
  """Also with gradients inside and outside of the mapping."""
  mapped = tuple(x if axis is None else jnp.stack([x, -2 * x, x ** 2], axis)
                 for x, axis in zip(operands, axes))

  def all_of(f):
    inside, outside = jax.vmap(gradients(f), axes), gradients(jax.vmap(f, axes, out_axes=-1))
    return jax.jit(lambda *x: (inside(*x), outside(*x)))(*mapped)
  close(all_of(ours), all_of(theirs), 1e-4)


@pytest.mark.parametrize("case", [
    pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES])
def test_convolution_and_both_gradients(case):
  ours, theirs, operands = pair(case)
  close(jax.jit(gradients(ours))(*operands), jax.jit(gradients(theirs))(*operands))
  assert "conv" in primitives(jax.make_jaxpr(ours)(*operands).jaxpr)


@pytest.mark.parametrize("case", [SOME[0], *(
    pytest.param(case, marks=pytest.mark.slow) for case in SOME[1:])])
def test_forward_mode_and_second_order(case):
  ours, theirs, operands = pair(case)
  directions = tuple(jax.random.normal(jax.random.key(7 + i), x.shape)
                     for i, x in enumerate(operands))

  def all_of(f):
    def run(operands, directions):
      gradient = lambda *operands: gradients(f)(*operands)[1]
      forward = jax.jvp(f, operands, directions)
      over_reverse = jax.jvp(gradient, operands, directions)[1]
      reverse_over = jax.grad(lambda *x: sum((g ** 2).sum() for g in gradient(*x)), (0, 1))(
          *operands)
      linear = jax.linearize(f, *operands)[1](*directions)
      return forward, over_reverse, reverse_over, linear, gradients(jax.checkpoint(f))(*operands)
    return jax.jit(run)(operands, directions)
  close(all_of(ours), all_of(theirs), 1e-4)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (2, 1), (0, 0)], ids=str)
@pytest.mark.parametrize("case", [SOME[0], *(
    pytest.param(case, marks=pytest.mark.slow) for case in SOME[1:])])
def test_mapped_over_images_kernels_or_both(case, axes):
  close_when_mapped(*pair(case), axes)


@pytest.mark.parametrize("case", (*SOME, "1x1 larger batch"))
def test_mapped_over_cotangents(case):
  ours, theirs, operands = pair(case)
  out, _ = jax.vjp(theirs, *operands)
  cotangents = jax.random.normal(jax.random.key(3), (3, *out.shape))
  close(*(jax.jit(lambda ct, f=f: jax.vmap(jax.vjp(f, *operands)[1])(ct))(cotangents)
          for f in (ours, theirs)))


@pytest.mark.parametrize("case", (
    "1x1", *(pytest.param(case, marks=pytest.mark.slow)
             for case in ("3x3 whole slices", "3x3 small maps"))))
def test_in_half_precision_gradients_are_no_coarser(case):
  ours, theirs, operands = pair(case, jnp.bfloat16)
  close(ours(*operands), theirs(*operands), 1e-2)
  exact = jax.grad(lambda *x: theirs(*x).sum(), 1)(*(x.astype(jnp.float32) for x in operands))
  gradient = jax.grad(lambda *x: ours(*x).astype(jnp.float32).sum(), 1)(*operands)
  assert gradient.dtype == jnp.bfloat16
  close(gradient.astype(jnp.float32), exact, 1e-2)


@pytest.mark.parametrize("outer", ["scan", "cond", "switch"])
def test_inside_loops_and_branches(outer):
  ours, theirs, operands = pair("3x3 stride 2")

  def inside(f):
    of = gradients(f)
    if outer == "scan":
      return jax.jit(lambda x, w: lax.scan(
          lambda w, _: (w - 1e-2 * of(x, w)[1][1], None), w, length=2))
    if outer == "cond":
      return jax.jit(lambda x, w: lax.cond(x.sum() > 1e9, lambda: (x, w), lambda: of(x, w)[1]))
    return jax.jit(lambda x, w: lax.switch((x.sum() < 1e9).astype(jnp.int32), [
        lambda: (x, w), lambda: of(x, w)[1]]))
  close(inside(ours)(*operands), inside(theirs)(*operands))


@pytest.mark.parametrize("case", ("3x3", "3x3 few channels", "3x3 stride 2", "1x1 stride 2"))
def test_compiled_convolutions_are_canonical(case):
  """What XLA would run slowly inside a loop: another layout, or a reversed kernel."""
  ours, _, operands = pair(case)
  text = jax.jit(gradients(ours)).lower(*operands).as_text()
  convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
  assert len(convolutions) == (0 if case.startswith("1x1") else 3)
  for line in convolutions:
    assert "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line and "true" not in line


@pytest.mark.parametrize("case", ["3x3 whole slices", "3x3 small maps", "1x1",
                                  "1x1 more channels than places"])
def test_eight_devices_equal_one_and_keep_their_examples(case):
  ours, _, (x, kernel) = pair(case)
  x = jnp.concatenate([x] * 8)[:64]
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  split, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
  run = jax.jit(gradients(ours), in_shardings=(split, everywhere),
                out_shardings=(split, (split, everywhere)))
  close(run(x, kernel), gradients(ours)(x, kernel))
  text = run.lower(x, kernel).compile().as_text()
  assert "all-gather" not in text and "all-to-all" not in text


@pytest.mark.parametrize("case", ["3x3 whole slices", "1x1 more channels than places"])
def test_exported_for_any_batch(case):
  ours, theirs, (x, kernel) = pair(case)
  batch, = jax.export.symbolic_shape("b")
  images = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
  exported = jax.export.export(jax.jit(gradients(ours)))(
      images, jax.ShapeDtypeStruct(kernel.shape, kernel.dtype))
  again = jax.export.deserialize(exported.serialize())
  close(again.call(x, kernel), gradients(theirs)(x, kernel))


@pytest.mark.parametrize("how", [
    dict(feature_group_count=2, kernel=(3, 3, 2, 4)), dict(rhs_dilation=(2, 2)),
    dict(lhs_dilation=(2, 1), padding=((0, 0), (1, 1))), dict(precision="highest"),
    dict(dimension_numbers=("NCHW", "HWIO", "NCHW"), images=(2, 4, 9, 9), kernel=(3, 3, 4, 4)),
    dict(dimension_numbers=("NWC", "WIO", "NWC"), images=(2, 9, 4), kernel=(3, 4, 4),
         window_strides=(1,)), dict(images=(0, 9, 9, 4)), dict(images=(2, 2, 9, 4))], ids=str)
def test_the_rest_is_left_to_xla(how):
  how = dict(how)
  x = jnp.ones(how.pop("images", (2, 9, 9, 4)))
  kernel = jnp.ones(how.pop("kernel", (3, 3, x.shape[-1], 4)))
  how = dict(window_strides=(1, 1), padding="VALID", dimension_numbers=LAYOUT) | how
  names = primitives(jax.make_jaxpr(functools.partial(conv, **how))(x, kernel).jaxpr)
  assert "conv" not in names and "conv_general_dilated" in names
  close(conv(x, kernel, **how), lax.conv_general_dilated(x, kernel, **how))


def test_on_an_accelerator_both_are_xlas(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  ours, _, operands = pair("3x3")
  assert "conv" not in primitives(jax.make_jaxpr(ours)(*operands).jaxpr)
  pooled = jax.make_jaxpr(lambda x: max_pool(x, (2, 2), (2, 2)))(operands[0])
  assert "custom_jvp_call" not in primitives(pooled.jaxpr)


@pytest.mark.parametrize("shape", [(2, 5, 5, 3), (2, 5)], ids=["Conv", "Dense"])
def test_layers_have_the_parameters_of_linens(shape):
  x = jax.random.normal(jax.random.key(0), shape)
  ours, theirs = (Conv(4, (3, 3), (2, 2)), nn.Conv(4, (3, 3), (2, 2))) if len(shape) == 4 else (
      Dense(4), nn.Dense(4))
  variables = theirs.init(jax.random.key(1), x)
  jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(1), x), variables)
  close(ours.apply(variables, x), theirs.apply(variables, x))


PRODUCT = (((1,), (0,)), ((), ()))


@pytest.mark.parametrize("vectors", [3, 8], ids=["fewer vectors than inputs", "more"])
def test_dense_products_and_their_gradients(vectors):
  shapes = [(vectors, 5), (5, 2)]
  x, kernel = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
  cts = jnp.arange(2.0 * vectors * 4).reshape(4, vectors, 2)

  def all_of(product):
    product = functools.partial(product, dimension_numbers=PRODUCT)

    def run(x, kernel):
      out, pull = jax.vjp(product, x, kernel)
      return (out, gradients(product)(x, kernel), lax.map(pull, cts), jax.vmap(pull)(cts),
              jax.vmap(product, (None, 0))(x, jnp.stack([kernel, 2 * kernel])))
    return jax.jit(run)(x, kernel)
  close(all_of(dot), all_of(lax.dot_general))
  assert "conv" in primitives(jax.make_jaxpr(lambda *x: dot(*x, PRODUCT))(x, kernel).jaxpr)


@pytest.mark.parametrize("how", [
    dict(x=(2, 3, 4)), dict(dimension_numbers=(((0,), (0,)), ((), ())), x=(4, 4)),
    dict(precision="highest"), dict(preferred_element_type=jnp.float32), dict(x=(0, 4)),
    dict(dtype=jnp.int32), dict(accelerator="tpu")], ids=str)
def test_other_products_are_left_to_xla(how, monkeypatch):
  how = dict(how)
  shape, dtype = how.pop("x", (2, 4)), how.pop("dtype", jnp.float32)
  if accelerator := how.pop("accelerator", None):
    monkeypatch.setattr(jax, "default_backend", lambda: accelerator)
  x, kernel = jnp.ones(shape, dtype), jnp.ones((4, 3), dtype)
  how = dict(dimension_numbers=(((x.ndim - 1,), (0,)), ((), ()))) | how
  names = primitives(jax.make_jaxpr(functools.partial(dot, **how))(x, kernel).jaxpr)
  assert "conv" not in names and "dot_general" in names
  close(dot(x, kernel, **how), lax.dot_general(x, kernel, **how))


POOLS = {
    "halves": ((2, 6, 4, 3), (2, 2), (2, 2), "VALID"),
    "not to the edge": ((2, 5, 7, 3), (2, 3), (2, 3), "VALID"),
    "resnet's stem": ((2, 7, 6, 3), (3, 3), (2, 2), ((1, 1), (1, 1))),
    "overlapping": ((2, 6, 5, 2), (3, 2), (1, 1), "SAME"),
    "with gaps": ((2, 7, 7, 2), (2, 2), (3, 3), "VALID"),
}


@pytest.mark.parametrize("ties", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("case", ["halves", *(
    pytest.param(case, marks=pytest.mark.slow) for case in POOLS if case != "halves")])
def test_max_pool_and_its_derivatives(case, ties):
  """Rounded to a few values, negative ones too, most windows have several maxima."""
  shape, *how = POOLS[case]
  x = jax.random.normal(jax.random.key(0), shape) - 1
  x = jnp.round(x) if ties else x
  ours, theirs = (lambda x, f=f: f(x, *how) for f in (max_pool, nn.max_pool))
  np.testing.assert_array_equal(ours(x), theirs(x))
  a, b = (jax.jit(jax.grad(lambda x, f=f: (f(x) ** 3).sum())) for f in (ours, theirs))
  close(a(x), b(x))
  direction = jax.random.normal(jax.random.key(1), shape)
  out, change = jax.jvp(ours, (x,), (direction,))
  close((change * out).sum(), (jax.vjp(theirs, x)[1](out)[0] * direction).sum())
  close(jax.vmap(jax.grad(lambda x: (ours(x) ** 3).sum()))(jnp.stack([x, -x])),
        jnp.stack([b(x), b(-x)]))


def test_second_derivative_of_max_pool():
  """d²/dx² of max³ is 6 max at the first maximum and nothing elsewhere."""
  x = jnp.array([1.0, 3.0, 2.0, 2.0]).reshape(1, 1, 4, 1)
  hessian = jax.hessian(lambda x: (max_pool(x, (1, 2), (1, 2)) ** 3).sum())(x).reshape(4, 4)
  np.testing.assert_array_equal(hessian, np.diag([0.0, 18.0, 12.0, 0.0]))


def test_max_pool_of_integers_and_half_precision():
  x = jnp.arange(16).reshape(1, 4, 4, 1)
  assert max_pool(x.astype(jnp.bfloat16), (2, 2), (2, 2)).ravel().tolist() == [5, 7, 13, 15]
  gradient = jax.grad(lambda x: max_pool(x, (2, 2), (2, 2)).sum())(x.astype(jnp.bfloat16))
  assert gradient.dtype == jnp.bfloat16 and gradient.sum() == 4
