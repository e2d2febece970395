"""One pure step: state, task gradients, training and evaluation, sharding, optimizer."""

from mtl_jax.training.state import TrainState, create_train_state
from mtl_jax.training.step import eval_step, train_step
