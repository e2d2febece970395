"""The run: evaluate → save → next batch → step → log, in this order, whatever happens."""

from collections.abc import Iterator, Sequence
import contextlib
import importlib.metadata
import math
import os
import platform
import signal
import time
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from mtl_jax.errors import UserError
from mtl_jax.experiment.experiment import Experiment
from mtl_jax.experiment.checkpoint import Checkpoints
from mtl_jax.experiment.console import Console
from mtl_jax.experiment.events import EventFile
from mtl_jax.experiment.evaluation import evaluator, score
from mtl_jax.experiment.run_folder import MetricsFile, RunFolder, without_nan
from mtl_jax.experiment.stepper import stepper, steps_per_call
from mtl_jax.experiment.transfer import first_state
from mtl_jax.tasks import compute_metrics
from mtl_jax.training.sharding import check_divides, data_mesh, replicated
from mtl_jax.training.task_weights import weigh


class Interrupted(Exception):
  """A signal asked the run to stop; it has been saved. `args[0]` is the signal's number."""


def train(experiment: Experiment, workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Trains to the end, from the beginning or from the newest sound checkpoint.

  Args:
    experiment: what to run.
    workdir: the run folder.

  Returns:
    The summary, as written to `summary.json`.

  Raises:
    UserError: for a folder of another run, one that cannot be written, or a run that diverged.
    Interrupted: after SIGTERM or Ctrl-C, once all is saved.
  """
  first = jax.process_index() == 0
  folder = RunFolder(workdir, writes=first)
  console = Console(quiet=not first)
  mesh = _mesh(experiment)
  console.data_banner(experiment.data, experiment.reports)
  with contextlib.ExitStack() as stack:
    stack.enter_context(contextlib.closing(folder))
    folder.open(experiment.config.to_dict(), experiment.data)
    summary = folder.summary()
    if summary is not None:
      console.say(f"{folder.path} holds a finished run")
      console.summary(summary, experiment.tasks)
      return summary
    checkpoints = stack.enter_context(contextlib.closing(Checkpoints(folder.path / "checkpoints")))
    run = _Run(experiment, mesh, folder, checkpoints, console, stack)
    with _stop_signals() as stop, _memory_errors():
      run.to_the_end(stop)
      summary = run.finish()
  console.summary(summary, experiment.tasks)
  console.say(f"run folder: {folder.path}")
  return summary


def evaluate(experiment: Experiment, workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Evaluates a finished run again, from its best checkpoint.

  Returns:
    `{"validation": …, "test": …}`.

  Raises:
    UserError: where there is no finished run of this config and data, or its numbers are not
      reproduced.
  """
  folder = RunFolder(workdir, writes=False)
  console = Console(quiet=jax.process_index() != 0)
  if not (folder.path / "config.json").exists():
    raise UserError(f"--workdir: expected the folder of a run, found none at {folder.path}")
  folder.check(experiment.config.to_dict(), experiment.data)
  summary = folder.summary()
  if summary is None:
    raise UserError(f"{folder.path}: expected a finished run, found no summary.json; "
                    "launch with --mode=train to finish it")
  mesh = _mesh(experiment)
  console.data_banner(experiment.data)
  with contextlib.closing(Checkpoints(folder.path / "checkpoints")) as checkpoints:
    state = checkpoints.restore(summary["best_step"], _abstract_state(experiment, mesh))
  evaluate_split = evaluator(experiment, mesh)
  found = without_nan({split: evaluate_split(state, split) for split in ("validation", "test")})
  console.summary({**summary, **found}, experiment.tasks)
  differ = [f"{split} {name}: {value!r} here, {summary[split][name]!r} in summary.json"
            for split, values in found.items() for name, value in values.items()
            if value != summary[split][name]]
  if differ:
    raise UserError(f"{len(differ)} numbers differ from those of the run, such as {differ[0]}\n"
                    "they are the same only with the run's devices and package versions")
  console.say("reproduced exactly")
  return found


def _mesh(experiment: Experiment) -> Mesh:
  mesh = data_mesh()
  data = experiment.config.data
  for name in ("batch_size", "evaluation_batch_size"):
    if data[name] is not None:
      try:
        check_divides(data[name], mesh)
      except ValueError as error:
        raise UserError(f"config.data.{str(error).replace('batch_size', name)}") from error
  return mesh


def _abstract_state(experiment: Experiment, mesh: Mesh) -> Any:
  shapes = jax.eval_shape(lambda: experiment.create_state(experiment.config.seed))
  sharding = replicated(mesh)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


class _Run:
  """One run from its first or restored state to its end.

  What moves besides the training state is in `record`, saved with every checkpoint: bytes of
  metrics.jsonl, seconds so far, the best step with its score and metrics, those of the first
  evaluation, and the data.
  """

  def __init__(self, experiment: Experiment, mesh: Mesh, folder: RunFolder,
               checkpoints: Checkpoints, console: Console, stack: contextlib.ExitStack):
    self._experiment, self._mesh, self._folder = experiment, mesh, folder
    self._checkpoints, self._console = checkpoints, console
    self._record = {"metrics_bytes": 0, "wall_seconds": 0.0, "best_step": None,
                    "best_score": -math.inf, "best_metrics": {}, "first_metrics": None,
                    "data": experiment.data}
    restored = checkpoints.restore_latest(_abstract_state(experiment, mesh), console.warn)
    if restored is None:
      self._step = 0
      self._state = first_state(experiment, mesh, folder, console)
    else:
      self._step, self._state, self._record = restored
      if self._record["data"] != experiment.data:
        raise UserError(f"{folder.path}: expected checkpoints of a run on {experiment.data}, "
                        f"found one on {self._record['data']}")
      console.say(f"continuing from step {self._step}")
    self._saved_step = self._step
    self._started = time.perf_counter() - self._record["wall_seconds"]
    self._called_at = time.perf_counter()
    writes = jax.process_index() == 0
    self._metrics = stack.enter_context(contextlib.closing(MetricsFile(
        folder.path / "metrics.jsonl", self._record["metrics_bytes"], writes=writes)))
    self._events = stack.enter_context(contextlib.closing(
        EventFile(folder.path, self._step + 1))) if writes else None
    self._evaluate = evaluator(experiment, mesh)
    if restored is None and experiment.rule:
      first = self._record["first_metrics"] = self._evaluate(self._state, "validation")
      self._write({**self._header(0, "validation"), **first})
      self._weigh_tasks(first)
    self._steps = stepper(experiment, mesh, self._step, jax.device_get(self._state.turns), stack)

  def to_the_end(self, stop: Sequence[int]) -> None:
    """Trains, evaluates and saves until the last step is done, or `stop` holds a signal."""
    experiment, total = self._experiment, self._experiment.num_steps
    per_call = steps_per_call(experiment)
    self._console.start_progress(self._step, total)
    try:
      while self._step < total:
        event = min((self._step // experiment.evaluate_every + 1) * experiment.evaluate_every,
                    total)
        count = min((self._step // per_call + 1) * per_call, event) - self._step
        self._state, logs = self._steps(self._state, count)
        self._log(jax.device_get(logs), count)
        if self._step == event:
          self._validate()
        if self._step == event or stop:
          self._save()
        if stop:
          self._checkpoints.wait()
          raise Interrupted(stop[0])
      self._checkpoints.wait()
    finally:
      self._console.stop_progress()

  def finish(self) -> dict[str, Any]:
    """Reads the test split, once, with the best checkpoint, and writes the summary."""
    experiment, best = self._experiment, self._record["best_step"]
    validation, abstract = self._record["best_metrics"], _abstract_state(experiment, self._mesh)
    try:
      state = self._checkpoints.restore(best, abstract)
    except UserError as error:
      best, state, _ = self._checkpoints.restore_latest(abstract, self._console.warn)
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
        "steps": self._step,
        "wall_seconds": round(time.perf_counter() - self._started, 1),
        "versions": _versions(),
        "devices": [device.device_kind for device in jax.devices()],
    })
    self._folder.write_summary(summary)
    return summary

  def _header(self, step: int, split: str) -> dict[str, Any]:
    return {"step": step, "epoch": round(step / self._experiment.steps_per_epoch, 4),
            "split": split, "data": "+".join(dict.fromkeys(self._experiment.data.values()))}

  def _write(self, record: dict[str, Any]) -> None:
    self._metrics.write(record)
    if self._events:
      self._events.write(record["step"], {
          f"{record['split']}/{name}": value for name, value in record.items()
          if isinstance(value, float) and name != "epoch"})

  def _log(self, logs: dict[str, Any], count: int) -> None:
    """Writes the records of the steps just done, and stops a run that diverged."""
    every = self._experiment.config.train.log_every_steps
    examples = (count * self._experiment.config.data.batch_size
                * sum(self._experiment.schedule.shares.values()))
    now = time.perf_counter()
    rate, self._called_at = examples / (now - self._called_at), now
    losses = {}
    for i in range(count):
      self._step += 1
      step_logs = jax.tree.map(lambda x: x[i], logs)  # noqa: B023
      self._check_finite(step_logs)
      losses |= {task.name: loss for task, loss, active in zip(
          self._experiment.tasks, step_logs["losses"], step_logs["active"]) if active}
      if self._step % every == 0:
        self._write({**self._header(self._step, "train"),
                     **_train_values(self._experiment, step_logs),
                     "examples_per_second": round(rate, 1)})
    self._console.advance(self._step, losses)

  def _check_finite(self, logs: dict[str, Any]) -> None:
    bad = [task.name for task, finite in zip(self._experiment.tasks, logs["finite"]) if not finite]
    if not bad and np.isfinite(logs["gradient_norm"]) and np.isfinite(logs["update_norm"]):
      return
    where = f"of task {' and '.join(bad)}" if bad else "of the model"
    kept = (f"the last good checkpoint is that of step {self._saved_step} in "
            f"{self._folder.path / 'checkpoints'}" if self._saved_step else "no checkpoint yet")
    raise UserError(f"step {self._step}: expected finite losses and gradients, found the loss or "
                    f"gradient {where} not finite; {kept}\n"
                    "a lower config.optimizer.learning_rate or config.optimizer.clip_norm may help")

  def _weigh_tasks(self, metrics: dict[str, float]) -> None:
    """Sets the tasks' weights by the rule, from validation metrics."""
    rule, tasks = self._experiment.rule, self._experiment.tasks
    losses = np.array([metrics[f"{task.name}/loss"] for task in tasks])
    if rule.reads == "relative_losses":
      losses /= [self._record["first_metrics"][f"{task.name}/loss"] for task in tasks]
    weights = np.asarray(weigh(losses, rule.power), np.float32)
    self._state = self._state.replace(
        task_weights=jax.device_put(weights, replicated(self._mesh)))

  def _validate(self) -> None:
    metrics = self._evaluate(self._state, "validation")
    self._record["first_metrics"] = self._record["first_metrics"] or metrics
    record = {**self._header(self._step, "validation"), **metrics}
    value = score(self._experiment, metrics, self._record["first_metrics"])
    if self._experiment.rule and self._experiment.rule.reads == "relative_losses":
      self._weigh_tasks(metrics)
    is_best = self._record["best_step"] is None or value > self._record["best_score"]
    if is_best:
      self._record |= {"best_step": self._step, "best_score": value, "best_metrics": metrics}
    self._write(record)
    self._console.evaluation(record, self._experiment.tasks, is_best)

  def _save(self) -> None:
    self._record |= {"metrics_bytes": self._metrics.flush(),
                     "wall_seconds": time.perf_counter() - self._started}
    self._checkpoints.save(self._step, self._state, self._record, self._record["best_step"])
    self._saved_step = self._step
    self._called_at = time.perf_counter()


def _train_values(experiment: Experiment, logs: dict[str, Any]) -> dict[str, float]:
  values = compute_metrics(experiment.tasks, logs["metrics"])
  for i, task in enumerate(experiment.tasks):
    values[f"{task.name}/weight"] = float(logs["weights"][i])
    if experiment.config.task_weights or experiment.schedule.factors_at:
      values[f"{task.name}/task_weight"] = float(logs["task_weights"][i])
  for name, value in logs["penalties"].items():
    values[f"penalty/{name}"] = float(value)
  values["gradient_norm"] = float(logs["gradient_norm"])
  values |= {name: float(logs[name]) for name in ("weights_error", "gramian_error")
             if np.isfinite(logs.get(name, np.nan))}
  if "gramian" in logs and np.isfinite(logs["gramian"]).all():  # else not looked at
    norms = np.sqrt(np.maximum(np.diag(logs["gramian"]), 0))
    for task, norm in zip(experiment.tasks, norms):
      values[f"{task.name}/gradient_norm"] = float(norm)
    cosines = logs["gramian"] / np.maximum(np.outer(norms, norms), 1e-30)
    pairs = cosines[np.triu_indices(len(norms), 1)]
    if pairs.size:
      values |= {"cosine": float(pairs.mean()), "conflict": float((pairs < 0).mean())}
  return values


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
  """Turns a device that runs out of memory into a UserError."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error) and "ut of memory" not in str(error):
      raise
    raise UserError(f"the device ran out of memory: {str(error).splitlines()[0][:160]}\n"
                    "a smaller config.data.batch_size or config.trunk, or config.data.engine=grain, "
                    "may help") from error


def _versions() -> dict[str, str]:
  packages = ("mtl_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
  return {"python": platform.python_version(),
          **{name: importlib.metadata.version(name) for name in packages}}


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
  """A list that holds the signal's number once SIGTERM or Ctrl-C has come.

  A second one ends the process at once, as it would have without this.
  """
  received: list[int] = []
  old = {}

  def handle(number: int, frame: Any) -> None:
    del frame
    received.append(number)
    signal.signal(number, old[number])

  for number in (signal.SIGTERM, signal.SIGINT):
    old[number] = signal.getsignal(number)
    signal.signal(number, handle)
  try:
    yield received
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)
