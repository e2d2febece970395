"""What the user sees: banner, progress bar, lines as the run goes, the final table."""

import collections
from collections.abc import Mapping, Sequence
import sys

import numpy as np
from rich.console import Console as RichConsole
from rich.panel import Panel
from rich.progress import (BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn,
                           TimeRemainingColumn)
from rich.table import Table

from mtl_jax.tasks import Task
from mtl_jax.training.transfer import Account, module_of, some


def _shown(value: float | None, unit: str) -> str:
  if value is None or value != value:
    return "-"
  return f"{100 * value:.2f} %" if unit == "fraction" else f"{value:.4f}"


def _is_sample(origin: str) -> bool:
  """Whether examples of this origin were rendered here: "sample", or "sample:" and what of."""
  return origin.partition(":")[0] == "sample"


class Console:
  """Prints to standard output on the first process, and nothing on the others."""

  def __init__(self, *, quiet: bool = False):
    self._out = RichConsole(quiet=quiet, highlight=False, soft_wrap=True,
                            width=None if sys.stdout.isatty() else 120)
    self._progress: Progress | None = None
    self._bar = None

  def say(self, text: str) -> None:
    """One line, above the progress bar where there is one."""
    self._out.print(text, markup=False)

  def warn(self, text: str) -> None:
    """One line that stands out."""
    self._out.print(f"warning: {text}", style="bold yellow", markup=False)

  def data_banner(self, data: Mapping[str, str],
                  reports: Mapping[str, Mapping[str, int]] | None = None) -> None:
    """Says where the examples come from, unmistakably where they are the bundled sample.

    Args:
      data: origin of each stream.
      reports: what was wrong with the data of each stream, and how many times.
    """
    stand_ins = [stream for stream, origin in data.items() if origin == "sample"]
    scenes = [stream for stream, origin in data.items()
              if _is_sample(origin) and stream not in stand_ins]
    for stream, origin in data.items():
      if stream not in stand_ins:
        self.say(f"stream {stream}: {origin}")
      for problem, count in (reports or {}).get(stream, {}).items():
        self.warn(f"stream {stream}: {count} × {problem}")
    if stand_ins:
      self._panel(
          f"SAMPLE DATA for {', '.join(stand_ins)}: rendered handwritten digits, not CIFAR.\n"
          "The numbers of this run say nothing about CIFAR. To train on CIFAR see README, Data.")
    if scenes:
      self._panel(f"SAMPLE DATA for {', '.join(scenes)}: rendered handwritten digits.\n"
                  "The numbers of this run say nothing about photographs.")

  def transfer(self, origin: str, account: Account) -> None:
    """Says what a run starts from; a warning where a part of a trunk was of no use.

    Args:
      origin: of the variables.
      account: what became of them.
    """
    taken = collections.Counter(map(module_of, account.matched))
    counts = ", ".join(f"{'/'.join(module)} ({count})" for module, count in taken.items())
    self.say(f"init_from {origin}: {len(account.matched)} variables taken: {counts}")
    if account.random:
      self.say(f"  {len(account.random)} stay random: {some(account.random)}")
    if account.unused:
      trunk = [path for path in account.unused if path[1] == "sharing" and "fc" not in path]
      (self.warn if trunk else self.say)(
          f"  {len(account.unused)} of what is there are not used: {some(trunk or account.unused)}")

  def _panel(self, text: str) -> None:
    self._out.print(Panel(text, title="sample", style="bold yellow", expand=False))

  def start_progress(self, done: int, total: int) -> None:
    """Shows the progress bar."""
    self._progress = Progress(
        TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[losses]}"), console=self._out)
    self._bar = self._progress.add_task("", completed=done, total=total, losses="")
    self._progress.start()

  def advance(self, done: int, losses: Sequence[float], tasks: Sequence[Task]) -> None:
    """Moves the progress bar."""
    if self._progress:
      text = "  ".join(f"{task.name} {loss:.3f}" for task, loss in zip(tasks, losses)
                       if np.isfinite(loss))
      self._progress.update(self._bar, completed=done, losses=text)

  def stop_progress(self) -> None:
    """Takes the progress bar away."""
    if self._progress:
      self._progress.stop()
      self._progress = None

  def evaluation(self, record: Mapping[str, float], tasks: Sequence[Task], best: bool,
                 whose: str = "") -> None:
    """One line a task for an evaluation on validation; `whose` leads the first, as "seed 3, "."""
    lead = f"{whose}epoch {record['epoch']:g}, step {record['step']}"
    for i, task in enumerate(tasks):
      values = ", ".join(f"{metric.name} {_shown(record[f'{task.name}/{metric.name}'], metric.unit)}"
                         for metric in task.all_metrics)
      self.say(f"{lead if i == 0 else ' ' * len(lead)}  validation {task.name}: {values}"
               + ("  *" if best and i == 0 else ""))

  def summary(self, summary: Mapping, tasks: Sequence[Task]) -> None:
    """The final table."""
    sampled = any(map(_is_sample, summary["data"].values()))
    table = Table(title="results" + (" on SAMPLE DATA" if sampled else ""),
                  caption=f"checkpoint of step {summary['best_step']}, the best on validation; "
                          "one seed")
    table.add_column("task")
    table.add_column("data")
    table.add_column("metric")
    table.add_column("validation", justify="right")
    table.add_column("test", justify="right")
    for task in tasks:
      for metric in task.all_metrics:
        name = f"{task.name}/{metric.name}"
        table.add_row(task.name, summary["data"][task.stream], metric.name,
                      _shown(summary["validation"][name], metric.unit),
                      _shown(summary["test"][name], metric.unit))
    self._out.print(table)

  def parts(self, parts: Sequence[tuple[str, int, float | None]]) -> None:
    """The table of a model's parts: name, parameters, operations or None."""
    table = Table(title="the model", caption="operations of a forward pass on one image of each "
                                             "stream, before XLA optimizes")
    for name, justify in (("part", "left"), ("parameters", "right"), ("MFLOPs", "right")):
      table.add_column(name, justify=justify)
    for part, parameters, flops in parts:
      table.add_row(part, f"{parameters:,}", "" if flops is None else f"{flops / 1e6:,.3f}")
    self._out.print(table)

  def spread(self, title: str, summary: Mapping, tasks: Sequence[Task]) -> None:
    """The table of what several runs come to on test: mean and standard deviation."""
    table = Table(title=title
                  + (" (SAMPLE DATA)" if any(map(_is_sample, summary["data"].values())) else ""))
    for name, justify in (("task", "left"), ("metric", "left"), ("mean", "right"), ("std", "right")):
      table.add_column(name, justify=justify)
    for task in tasks:
      for metric in task.all_metrics:
        found = summary["test"][f"{task.name}/{metric.name}"]
        table.add_row(task.name, metric.name, _shown(found["mean"], metric.unit),
                      _shown(found["std"], metric.unit))
    self._out.print(table)
