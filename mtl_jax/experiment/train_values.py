"""What a training record holds, from the logs of a step."""

from typing import Any

import numpy as np

from mtl_jax.experiment.experiment import Experiment
from mtl_jax.tasks import compute_metrics


def train_values(experiment: Experiment, logs: dict[str, Any]) -> dict[str, float]:
  """Metrics, weights and norms by name, and how the tasks' gradients lie where they were seen."""
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
