"""What the tests of sharing architectures have in common: tasks, trunks, images, checks."""

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import models

TASKS = ("b", "a_1", "c")
TRUNKS = {"cnn": models.CNN(channels=(3, 4), width=5),
          "resnet": models.ResNet(blocks=(1,), channels=3),
          "mlp": models.MLPTrunk(widths=(5, 4))}
ONE, TWO = dict.fromkeys(TASKS, "x"), {"b": "x", "a_1": "y", "c": "y"}


def images_of(sizes, sides=(8, 8)):
  rng = np.random.default_rng(0)
  return {stream: jnp.asarray(rng.normal(size=(size, side, 8, 3)), jnp.float32)
          for (stream, size), side in zip(sizes.items(), sides)}


IMAGES = images_of({"x": 3, "y": 2})


def filled(module, *args):
  """Variables without compiling `init`: random parameters, statistics of one."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))
  return {collection: jax.tree.map(
      lambda x: (jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype)
                 if collection == "params" else jnp.ones(x.shape, x.dtype)), tree)  # noqa: B023
          for collection, tree in shapes.items()}


def joined(variables, *names):
  """Variables of one trunk from the parts of a sharing module that hold its stages."""
  return {collection: {key: leaf for name in names for key, leaf in tree.get(name, {}).items()}
          for collection, tree in variables.items()}


def apart(variables):
  """Variables of independent trunks from those of trunks side by side."""
  trunks = {f"trunks_{task}": joined(variables, f"trunks_{task}", f"branches_{task}")
            for task in TASKS}
  return {collection: {name: trunk[collection] for name, trunk in trunks.items()}
          for collection in variables}


def assert_close(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


def check_drawn_owners(sharing, params, draws):
  """The declared owner against the features that move with a parameter in any of several draws."""
  @jax.jit
  def moved(params, key):
    return jax.jacrev(lambda p: jnp.stack([(x ** 2).sum() for x in sharing.apply(
        {"params": p}, IMAGES, TWO, True, rngs={"dropout": key}).values()]))(params)

  order, reached = list(TWO), {}
  for draw in range(draws):
    for path, leaf in flatten_dict(moved(params, jax.random.key(draw))).items():
      reached.setdefault(path, set()).update(
          task for task, row in zip(order, leaf) if np.abs(row).sum() > 0)
  for path, seen in reached.items():
    owner = sharing.owner(path)
    assert seen == ({owner} if owner else set(TASKS)), path


def check_owners(sharing, images, streams, maps=False):
  """The declared owner against the truth: whose features, or maps, move with the parameter."""
  variables = filled(sharing, images, streams, False, maps)
  params, order = variables.pop("params"), list(streams)

  def energies(params):
    results = sharing.apply({"params": params, **variables}, images, streams, False, maps)
    return jnp.stack([sum((x ** 2).sum() for x in jax.tree.leaves(results[task]))
                      for task in order])

  moved = jax.jit(jax.jacrev(energies))(params)
  for path, rows in flatten_dict(moved).items():
    reached = {task for task, row in zip(order, rows) if np.abs(row).sum() > 0}
    owner = sharing.owner(path)
    if owner:
      assert reached == {owner}, path
    else:
      assert len(reached) > 1 and reached <= set(order), path
