"""Margins by hand, and verification against scikit-learn and known embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from mtl_jax import tasks
from mtl_jax.tasks import verification


def outputs_of(cosines):
  return {"embedding": jnp.ones((len(cosines), 1)), "cosines": jnp.asarray(cosines, jnp.float32)}


@pytest.mark.parametrize("loss, own", [("cosface", 0.5 - 0.2),
                                       ("arcface", np.cos(np.pi / 3 + 0.2))])
def test_margins_by_hand(loss, own):
  task = tasks.identity("t", num_classes=3, loss=loss, scale=4.0, margin=0.2)
  logits = 4 * np.array([own, 0.1, -0.3])
  expected = np.log(np.exp(logits).sum()) - logits[0]
  found = task.loss(outputs_of([[0.5, 0.1, -0.3]]), jnp.array([0]))
  np.testing.assert_allclose(found, [expected], rtol=1e-5)


@pytest.mark.parametrize("loss", ["cosface", "arcface"])
def test_the_loss_falls_as_the_own_cosine_grows_and_its_gradient_is_finite(loss):
  task = tasks.identity("t", num_classes=2, loss=loss, scale=2.0, margin=0.5)
  cosines = jnp.linspace(-1, 1, 201)
  of = lambda c: task.loss({"cosines": jnp.stack([c, jnp.zeros_like(c)], axis=1)},
                           jnp.zeros(201, jnp.int32))
  losses, gradients = jax.jit(lambda c: (of(c), jax.grad(lambda c: of(c).sum())(c)))(cosines)
  assert jnp.isfinite(gradients).all() and (jnp.diff(losses) < 1e-6).all()


def values_of(embeddings, labels, most_pairs=3000):
  task = tasks.identity("t", num_classes=50, most_pairs=most_pairs)
  embeddings, labels = np.asarray(embeddings, np.float32), np.asarray(labels, np.int32)
  return {metric.name: metric.compute(metric.update({"embedding": embeddings}, labels, labels >= 0))
          for metric in task.metrics if metric.gathered}


def embedded(noise, seed=0, people=20, images=6):
  rng = np.random.default_rng(seed)
  labels = np.repeat(np.arange(people), images)
  vectors = rng.normal(size=(people, 16))[labels] + noise * rng.normal(size=(len(labels), 16))
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), labels


def test_embeddings_that_tell_everybody_apart_are_perfect():
  found = values_of(*embedded(0.01))
  assert found["verification_accuracy"] == 1 and found["roc_auc"] == 1


def test_embeddings_that_say_nothing_are_at_chance():
  rng = np.random.default_rng(0)
  vectors = rng.normal(size=(400, 16))
  found = values_of(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.arange(400) % 40)
  assert abs(found["verification_accuracy"] - 0.5) < 0.03 and abs(found["roc_auc"] - 0.5) < 0.03


def test_pairs_do_not_depend_on_the_order_of_the_examples():
  vectors, labels = embedded(1.0)
  order = np.random.default_rng(3).permutation(len(labels))
  assert values_of(vectors, labels, 100) == values_of(vectors[order], labels[order], 100)


def test_auc_of_all_pairs_is_that_of_scikit_learn():
  vectors, labels = embedded(0.8, people=2, images=5)  # 20 pairs of one, 25 of two: draws 20
  vectors = vectors.astype(np.float32)
  first, second, same = verification.pairs(labels, 3000)
  cosines = (vectors[first] * vectors[second]).sum(axis=1)
  assert verification.roc_auc(cosines, same) == sklearn_metrics.roc_auc_score(same, cosines)


@pytest.mark.parametrize("most, expected", [(3000, 20), (7, 7)])
def test_pairs_are_different_balanced_and_what_they_say(most, expected):
  labels = np.repeat([3, 8], 5)
  first, second, same = verification.pairs(labels, most)
  assert same.sum() == (~same).sum() == expected
  assert ((labels[first] == labels[second]) == same).all() and (first < second).all()
  assert len(set(zip(first.tolist(), second.tolist()))) == 2 * expected


def test_the_threshold_is_not_learnt_from_the_fold_that_is_judged():
  # In the first fold alone, pairs of two are nearer than pairs of one.
  same = np.tile([True, False], 50)
  cosines = np.where(same, 0.8, 0.2)
  first_fold = np.arange(100) % 10 == 0
  cosines[first_fold & same] = 0.1
  np.testing.assert_allclose(verification.best_threshold_accuracy(cosines, same), 0.9)


@pytest.mark.parametrize("labels", [[-1, -1, -1, -1], [0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 1, 2]])
def test_too_few_pairs_are_nan(labels):
  found = values_of(np.eye(4), labels)
  assert np.isnan(found["verification_accuracy"]) and np.isnan(found["roc_auc"])


def test_embeddings_that_are_not_finite_are_nan():
  vectors, labels = embedded(0.1)
  vectors[3] = np.nan
  assert np.isnan(values_of(vectors, labels)["roc_auc"])


def test_verification_is_not_taken_in_training_steps():
  task = tasks.identity("t", num_classes=2)
  states = tasks.task_metrics((task,), {"t": outputs_of([[0.5, 0.1]])},
                              {"t": {"identity": jnp.array([0])}}, gathered=False)
  assert set(states["t"]) == {"loss", "accuracy"}
