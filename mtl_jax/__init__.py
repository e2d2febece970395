"""Multi-task learning research in JAX: one trunk, several heads, every way to balance them."""

from mtl_jax import balancing, data, models, tasks
from mtl_jax.models import MultiTaskModel
from mtl_jax.tasks import Task
from mtl_jax.training import TrainState, create_train_state, eval_step, train_step

__version__ = "0.1.0"

__all__ = ["MultiTaskModel", "Task", "TrainState", "balancing", "create_train_state", "data",
           "eval_step", "models", "tasks", "train_step"]
