"""A head whose outputs are cosines, for recognising faces."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def unit(x: jax.Array, axis: int) -> jax.Array:
  """Vectors of length one along an axis; zero stays zero, and its gradient finite.

  >>> unit(jnp.array([[0.0, 4.0], [0.0, 0.0]]), axis=1).tolist()
  [[0.0, 1.0], [0.0, 0.0]]
  """
  square = jnp.sum(x * x, axis=axis, keepdims=True)
  return x / jnp.sqrt(jnp.maximum(square, jnp.asarray(1e-24, x.dtype)))


class Normalized(nn.Module):
  """An embedding on the unit sphere, and its cosines with one learned direction an identity.

  Losses with an angular margin take the cosines; that two images show one person is read off the
  embeddings, also for people who were not among the identities.

  Attributes:
    num_outputs: number of identities.
    width: D, of the embedding.

  >>> features = jnp.array([[1.0, 2.0], [-2.0, -4.0]])
  >>> outputs, _ = Normalized(num_outputs=3, width=4).init_with_output(jax.random.key(0), features)
  >>> {name: x.shape for name, x in outputs.items()}
  {'embedding': (2, 4), 'cosines': (2, 3)}
  >>> bool(jnp.allclose(outputs["embedding"][0], -outputs["embedding"][1]))
  True

  Reference:
    Wang, Wang, Zhou, Ji, Gong, Zhou, Li, Liu: CosFace: Large Margin Cosine Loss for Deep Face
    Recognition. CVPR 2018, arXiv:1801.09414.

  Differences:
    None in the outputs; scale and margin belong to the task's loss.
  """

  num_outputs: int
  width: int = 128

  @nn.compact
  def __call__(self, features: jax.Array) -> dict[str, jax.Array]:
    """`{"embedding": [B, width], "cosines": [B, num_outputs]}` of features [B, F]."""
    embedding = unit(nn.Dense(self.width, name="embedding")(features), axis=1)
    directions = self.param("directions", nn.initializers.lecun_normal(),
                            (self.width, self.num_outputs))
    return {"embedding": embedding, "cosines": embedding @ unit(directions, axis=0)}
