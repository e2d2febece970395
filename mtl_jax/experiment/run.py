"""One run: its state, its files, and what is written into them."""

from collections.abc import Callable
import contextlib
import importlib.metadata
import math
import platform
import time
from typing import Any

import jax
import numpy as np

from mtl_jax.errors import UserError
from mtl_jax.experiment.checkpoint import Checkpoints
from mtl_jax.experiment.console import Console
from mtl_jax.experiment.evaluation import score
from mtl_jax.experiment.events import EventFile
from mtl_jax.experiment.experiment import Experiment
from mtl_jax.experiment.run_folder import MetricsFile, RunFolder, without_nan
from mtl_jax.experiment.train_values import train_values
from mtl_jax.training.task_weights import weigh


class Run:
  """One run from its first or restored state to its end, alone or beside those of other seeds.

  What moves besides the training state is in `record`, saved with every checkpoint: bytes of
  metrics.jsonl, seconds so far, the best step with its score and metrics, those of the first
  evaluation, and the data.

  Attributes:
    experiment: what is run.
    checkpoints: its own.
    step: steps whose logs have been read.
    state: after the newest step; a call of steps may be on its way whose logs are not read yet.
  """

  def __init__(self, experiment: Experiment, folder: RunFolder, checkpoints: Checkpoints,
               evaluate: Callable[[Any, str], dict[str, float]],
               restored: tuple[int, Any, dict[str, Any] | None], console: Console,
               stack: contextlib.ExitStack, *, is_only: bool):
    """Opens the run's files.

    Args:
      experiment: what to run.
      folder: open.
      checkpoints: in that folder.
      evaluate: `evaluate(state, split) -> metrics`.
      restored: step, state and record, None at step 0.
      console: is told.
      stack: closes the files.
      is_only: False where messages must say which seed they are about.
    """
    self.experiment, self.checkpoints = experiment, checkpoints
    self._folder, self._evaluate, self._console = folder, evaluate, console
    self._whose = "" if is_only else f"seed {experiment.config.seed}, "
    self.step, self.state, record = restored
    self._record = record or {
        "metrics_bytes": 0, "wall_seconds": 0.0, "best_step": None, "best_score": -math.inf,
        "best_metrics": {}, "first_metrics": None, "data": experiment.data}
    if self._record["data"] != experiment.data:
      raise UserError(f"{folder.path}: expected checkpoints of a run on {experiment.data}, "
                      f"found one on {self._record['data']}")
    self._saved_step = self.step
    self._started = time.perf_counter() - self._record["wall_seconds"]
    writes = jax.process_index() == 0
    self._metrics = stack.enter_context(contextlib.closing(MetricsFile(
        folder.path / "metrics.jsonl", self._record["metrics_bytes"], writes=writes)))
    self._events = stack.enter_context(contextlib.closing(
        EventFile(folder.path, self.step + 1))) if writes else None

  def evaluate_at_start(self) -> None:
    """Finds the first task weights from an evaluation of the untrained model."""
    first = self._record["first_metrics"] = self._evaluate(self.state, "validation")
    self._write({**self._header(0, "validation"), **first})
    self._weigh_tasks(first)

  def finish(self) -> dict[str, Any]:
    """Reads the test split, once, with the best checkpoint, and writes the summary."""
    experiment, best = self.experiment, self._record["best_step"]
    validation, abstract = self._record["best_metrics"], shapes_of(self.state)
    try:
      state = self.checkpoints.restore(best, abstract)
    except UserError as error:
      best, state, _ = self.checkpoints.restore_latest(abstract, self._console.warn)
      self._console.warn(f"{error}\nusing checkpoint {best}, the newest sound one, in its place")
      validation = self._evaluate(state, "validation")
    test = self._evaluate(state, "test")
    self._write({**self._header(best, "test"), **test})
    self._metrics.flush()
    summary = without_nan({
        "data": experiment.data,
        "test": test,
        "validation": validation,
        "best_step": best,
        "steps": self.step,
        "wall_seconds": round(time.perf_counter() - self._started, 1),
        "versions": _versions(),
        "devices": [device.device_kind for device in jax.devices()],
    })
    self._folder.write_summary(summary)
    return summary

  def _header(self, step: int, split: str) -> dict[str, Any]:
    return {"step": step, "epoch": round(step / self.experiment.steps_per_epoch, 4),
            "split": split, "data": "+".join(dict.fromkeys(self.experiment.data.values()))}

  def _write(self, record: dict[str, Any]) -> None:
    self._metrics.write(record)
    if self._events:
      self._events.write(record["step"], {
          f"{record['split']}/{name}": value for name, value in record.items()
          if isinstance(value, float) and name != "epoch"})

  def log(self, logs: dict[str, Any], count: int, rate: float) -> np.ndarray:
    """Writes the records of the steps just done, and stops a run that diverged.

    Args:
      logs: of each step, with a leading axis of length `count`.
      count: of the steps.
      rate: examples a second of this run.

    Returns:
      The losses of the last step, [T], NaN of tasks that took no part.
    """
    for i in range(count):
      self.step += 1
      self._check_finite(*(logs[key][i] for key in ("finite", "gradient_norm", "update_norm")))
      if self.step % self.experiment.config.train.log_every_steps == 0:
        step_logs = jax.tree.map(lambda x: x[i], logs)  # noqa: B023
        self._write({**self._header(self.step, "train"),
                     **train_values(self.experiment, step_logs),
                     "examples_per_second": round(rate, 1)})
    return np.where(logs["active"][-1], logs["losses"][-1], np.nan)

  def _check_finite(self, finite: Any, gradient_norm: Any, update_norm: Any) -> None:
    bad = [task.name for task, is_finite in zip(self.experiment.tasks, finite) if not is_finite]
    if not bad and np.isfinite(gradient_norm) and np.isfinite(update_norm):
      return
    where = f"of task {' and '.join(bad)}" if bad else "of the model"
    kept = (f"the last good checkpoint is that of step {self._saved_step} in "
            f"{self._folder.path / 'checkpoints'}" if self._saved_step else "no checkpoint yet")
    raise UserError(f"{self._whose}step {self.step}: expected finite losses and gradients, found "
                    f"the loss or gradient {where} not finite; {kept}\n"
                    "a lower config.optimizer.learning_rate or config.optimizer.clip_norm may help")

  def _weigh_tasks(self, metrics: dict[str, float]) -> None:
    """Sets the tasks' weights by the rule, from validation metrics."""
    rule, tasks = self.experiment.rule, self.experiment.tasks
    losses = np.array([metrics[f"{task.name}/loss"] for task in tasks])
    if rule.reads == "relative_losses":
      losses /= [self._record["first_metrics"][f"{task.name}/loss"] for task in tasks]
    weights = np.asarray(weigh(losses, rule.power), np.float32)
    self.state = self.state.replace(
        task_weights=jax.device_put(weights, self.state.task_weights.sharding))

  def validate(self) -> None:
    """Evaluates on validation, and keeps the step in mind if it is the best."""
    metrics = self._evaluate(self.state, "validation")
    self._record["first_metrics"] = self._record["first_metrics"] or metrics
    record = {**self._header(self.step, "validation"), **metrics}
    value = score(self.experiment, metrics, self._record["first_metrics"])
    if self.experiment.rule and self.experiment.rule.reads == "relative_losses":
      self._weigh_tasks(metrics)
    is_best = self._record["best_step"] is None or value > self._record["best_score"]
    if is_best:
      self._record |= {"best_step": self.step, "best_score": value, "best_metrics": metrics}
    self._write(record)
    self._console.evaluation(record, self.experiment.tasks, is_best, self._whose)

  def save(self) -> None:
    """Starts saving state and record."""
    self._record |= {"metrics_bytes": self._metrics.flush(),
                     "wall_seconds": time.perf_counter() - self._started}
    self.checkpoints.save(self.step, self.state, self._record, self._record["best_step"])
    self._saved_step = self.step


def _versions() -> dict[str, str]:
  packages = ("mtl_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
  return {"python": platform.python_version(),
          **{name: importlib.metadata.version(name) for name in packages}}


def shapes_of(state: Any, sharding: jax.sharding.Sharding | None = None) -> Any:
  """What a state is restored to: its shapes, types and shardings, or one sharding for all."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding or x.sharding), state)
