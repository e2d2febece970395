"""PyTorch's ResNet-18 and ours are one: its weights under our names give its features."""

import pathlib

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models
from mtl_jax.experiment.torch_files import read_state_dict
from mtl_jax.models.torchvision import from_torchvision

DATA = pathlib.Path(__file__).parent / "data"  # made by record_resnet18.py


@pytest.fixture(scope="module")
def weights():
  return read_state_dict(DATA / "resnet18_narrow.pth")


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_features_are_pytorchs(stem, weights):
  recorded = np.load(DATA / "resnet18_narrow.npz")
  if stem == "cifar":
    weights = weights | {"conv1.weight": weights["conv1.weight"][:, :, 2:5, 2:5]}
  found = from_torchvision(weights)
  trunk, images = models.resnet18(channels=4, stem=stem), recorded["images"].transpose(0, 2, 3, 1)
  expected = jax.eval_shape(trunk.init, jax.random.key(0), images)
  del found["params", "fc", "kernel"], found["params", "fc", "bias"]
  assert ({path: x.shape for path, x in found.items()}
          == {path: x.shape for path, x in flatten_dict(expected).items()})
  features = jax.jit(trunk.apply)(jax.tree.map(jnp.asarray, unflatten_dict(found)), images)
  assert features.shape == (2, 32) and np.abs(recorded[stem]).max() > 1
  np.testing.assert_allclose(features, recorded[stem], rtol=1e-4, atol=1e-5)


def test_kernels_are_turned():
  x = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
  found = from_torchvision({"layer3.1.conv2.weight": x, "fc.weight": x[0, 0],
                            "layer3.0.downsample.1.num_batches_tracked": np.array(3)})
  assert set(found) == {("params", "layer3_1", "conv2", "kernel"), ("params", "fc", "kernel")}
  kernel = found["params", "layer3_1", "conv2", "kernel"]
  assert kernel.shape == (4, 5, 3, 2) and kernel[1, 2, 0, 1] == x[1, 0, 1, 2]
  np.testing.assert_array_equal(found["params", "fc", "kernel"], x[0, 0].T)


@pytest.mark.parametrize("name, shape", [
    ("conv1.kernel", (1,)), ("weight", (1,)), ("bn1.running_mean", (1, 1)),
    ("conv1.weight", (1, 1, 1)), ("bn1.bias", ())])
def test_other_names_and_shapes_are_refused(name, shape):
  with pytest.raises(ValueError, match=f"{name}: expected names and shapes of torchvision's"):
    from_torchvision({name: np.zeros(shape)})
